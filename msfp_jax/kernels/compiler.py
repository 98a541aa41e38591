"""How XLA is asked to compile whole samplers."""

import functools

import jax

# XLA's CPU back end runs small products of its YNN library on one core each;
# those of Winograd's algorithm are faster by Eigen. The value names what is
# left to YNN.
_CPU = {'xla_cpu_experimental_ynn_fusion_type':
        'LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'}


@functools.cache
def options() -> dict[str, str] | None:
  """For `jax.jit(compiler_options=)`; None where XLA does not know them."""
  if jax.default_backend() != 'cpu':
    return None
  try:
    jax.jit(lambda x: x + 1, compiler_options=_CPU).lower(0.0).compile()
  except (jax.errors.JaxRuntimeError, ValueError):
    return None
  return dict(_CPU)
