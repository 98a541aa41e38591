"""Products of quantized layers, exact, by the fastest that a device has."""

from msfp_jax.kernels.choice import are_there
from msfp_jax.kernels.choice import IMPLEMENTATIONS
from msfp_jax.kernels.compiler import options as compiler_options
from msfp_jax.kernels.door import run
from msfp_jax.kernels.prepare import prepare

__all__ = ['IMPLEMENTATIONS', 'are_there', 'compiler_options', 'prepare', 'run']
