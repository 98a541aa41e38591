"""Low-bit layers: packed weights, quantized inputs, exact products."""

from msfp_jax.kernels.compiler import options as compiler_options
from msfp_jax.kernels.dispatch import IMPLEMENTATIONS
from msfp_jax.kernels.layer import make_layer
from msfp_jax.kernels.layer import pack
from msfp_jax.kernels.layer import PackedLayer
from msfp_jax.kernels.ops import conv
from msfp_jax.kernels.ops import matmul
from msfp_jax.kernels.ops import prepare

__all__ = ['IMPLEMENTATIONS', 'PackedLayer', 'compiler_options', 'conv',
           'make_layer', 'matmul', 'pack', 'prepare']
