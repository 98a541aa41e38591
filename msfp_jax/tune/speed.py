"""What share of a device's speed a training step gets."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

# Sides of the matrices that are multiplied to find out: a CPU's cores need no
# more, other devices do. And for how long, in seconds.
_SIDE_CPU, _SIDE = 1024, 8192
_LONG_ENOUGH = 0.1


@dataclasses.dataclass(frozen=True)
class Speed:
  """What a step computes, and how fast the device could.

  Attributes:
    flops: of a step on one device, by the compiler's count; 0: not known.
    peak: FLOP/s of one device, as measured; 0 if that was of no use.
  """

  flops: float
  peak: float

  def share(self, steps_per_second: float) -> str:
    """'22% of 506 GFLOP/s'; '' where it is not known."""
    if not (self.flops and self.peak):
      return ''
    percent = 100 * self.flops * steps_per_second / self.peak
    return f'{percent:.0f}% of {self.peak / 1e9:.0f} GFLOP/s'


def of(step: Any, dtype: str, accumulate: int = 1) -> Speed:
  """Measures the device, in a fraction of a second.

  Args:
    step: a `step.Step`, compiled.
    dtype: that it computes in.
    accumulate: parts that it computes a batch in, which compilers count once.
  """
  # Devices of one CPU share its cores, of which a step on all of them gets no
  # part that could be told.
  several = jax.default_backend() == 'cpu' and jax.local_device_count() > 1
  flops = 0.0
  if (isinstance(step.update, jax.stages.Compiled) and accumulate == 1
      and not several):
    flops = (step.update.cost_analysis() or {}).get('flops', 0.0)
  return Speed(flops, peak(dtype) if flops else 0.0)


def peak(dtype: str) -> float:
  """FLOP/s of a device, by the product of two large matrices: the best seen.
  """
  side = _SIDE_CPU if jax.default_backend() == 'cpu' else _SIDE
  x = jax.device_put(jnp.ones((side, side), dtype), jax.local_devices()[0])
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  jax.block_until_ready(product(x, x))
  least, until = float('inf'), time.perf_counter() + _LONG_ENOUGH
  while True:  # once at least, however long this process was paused
    begin = time.perf_counter()
    jax.block_until_ready(product(x, x))
    least = min(least, time.perf_counter() - begin)
    if time.perf_counter() > until:
      break
  return 2 * side**3 / least
