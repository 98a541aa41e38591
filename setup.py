"""What pyproject.toml cannot say: configs/ is installed as msfp_jax/configs."""

import setuptools

setuptools.setup(
    packages=['msfp_jax.configs', *setuptools.find_namespace_packages(
        include=['msfp_jax*'], exclude=['*.__pycache__'])],
    package_dir={'msfp_jax.configs': 'configs'})
