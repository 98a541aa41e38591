"""Programs that tests start for what they do, not for how fast they are."""

import os


def compiling_fast(**more: str) -> dict[str, str]:
  """An environment in which XLA compiles as fast as it can.

  Its programs are slower, and may round sums otherwise than those of this
  process: for tests that compare programs with each other, or with nothing.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  return os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{flags} --xla_backend_optimization_level=0 '
                   '--xla_cpu_use_fusion_emitters=false'} | more
