"""Describes the machine of a benchmark, and measures how fast it can be."""

from collections.abc import Callable
import dataclasses
import os
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from msfp_jax.kernels import carriers


def describe() -> dict[str, Any]:
  """Describes the device and its software."""
  device = jax.devices()[0]
  name = device.device_kind
  if device.platform == 'cpu':
    name = f'{_cpu_name()}, {os.cpu_count()} cores'
  return {'platform': device.platform, 'device': name,
          'jax': jax.__version__, 'python': platform.python_version()}


def _cpu_name() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next(line.split(':')[1].strip() for line in file
                  if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def rounds(functions: dict[str, Callable[[], Any]], count: int,
           warm: bool = False) -> dict[str, list[float]]:
  """Times functions in turn, A B C A B C, after a call of each unmeasured.

  Machines drift: figures of the same round are comparable.

  Args:
    functions: {name: what is timed}.
    count: of rounds.
    warm: whether there is a call unmeasured before every one, after which
      short functions find their memory mapped, as parts of a program do.
  """
  times = {name: [] for name in functions}
  for function in functions.values():
    jax.block_until_ready(function())
  for _ in range(count):
    for name, function in functions.items():
      if warm:
        jax.block_until_ready(function())
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(time.perf_counter() - start)
  return times


def paired(a: Callable[[], Any], b: Callable[[], Any], pairs: int = 15,
           warmup: int = 2) -> tuple[float, float, float]:
  """Median seconds of a and of b, and the median ratio a / b of the pairs."""
  times = {a: [], b: []}
  for i in range(pairs + warmup):
    for work in (a, b):
      start = time.perf_counter()
      jax.block_until_ready(work())
      if i >= warmup:
        times[work].append(time.perf_counter() - start)
  ratios = [x / y for x, y in zip(times[a], times[b], strict=True)]
  return tuple(map(statistics.median, (times[a], times[b], ratios)))


def ratio(base: list[float], other: list[float]) -> float:
  """Tells how many times faster `other` is: the median over the rounds."""
  return statistics.median(
      a / b for a, b in zip(base, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The highest rates at which XLA computes and moves bytes here.

  Attributes:
    flops: {carrier: multiplications and additions a second}, of a large square
      product.
    bandwidth: bytes a second, read and written, of x + 1.
  """

  flops: dict[str, float]
  bandwidth: float

  def seconds(self, flop: float, size: float, carrier: str) -> float:
    """The least time of an operation of `size` bytes."""
    return max(flop / self.flops[carrier], size / self.bandwidth)


def measure() -> Roofline:
  """Measures the roofline, which takes seconds on a CPU."""
  small = jax.default_backend() == 'cpu'
  n = 2048 if small else 8192
  flops = {}
  for carrier in ('f32', 'bf16', 'int8'):
    dtype, sums = carriers.DTYPES[carrier]
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x, sums=sums: jax.lax.dot(
        x, x, preferred_element_type=sums))
    flops[carrier] = 2 * n**3 / _fastest(lambda f=product, x=x: f(x))
  x = jnp.ones(2**26 if small else 2**28, jnp.float32)
  move = jax.jit(lambda x: x + 1)
  return Roofline(flops, 2 * x.nbytes / _fastest(lambda: move(x)))


def _fastest(function: Callable[[], Any]) -> float:
  return min(rounds({'': function}, 5)[''])
