"""What this CPU multiplies fastest, by a measurement."""

from collections.abc import Callable
import concurrent.futures
import functools
import threading
import time
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import compiler
from msfp_jax.kernels import winograd

# Carrier -> the algorithm by which it is measured.
_ALGORITHMS = {'f32': winograd.FLOAT, 'int8': winograd.BYTES}
# Images, side, channels and outputs of the layer that is measured: as wide ones
# of CIFAR-10's UNet. What fits the inner caches would say nothing of it.
_SHAPE = (32, 16, 256, 256)
_ROUNDS = 5
# A layer of fewer takes some 0.2 ms and would win 0.05 by int8: a race would be
# paid by tens of thousands of them.
_FEWEST_PRODUCTS = 2**25
# By so much int8 must win: less is noise.
_MARGIN = 1.03


_LOCK = threading.Lock()


def carrier(products: int) -> str:
  """'int8' where quantized layers by it are faster here, else 'f32'.

  Takes about a second, once a process, and none for small layers. Where layers
  are taken by it (see `choice`) both give the same numbers, so that nothing but
  time depends on it.

  Args:
    products: multiplications of the layer.
  """
  if products < _FEWEST_PRODUCTS:
    return 'f32'
  # Two races at once would disturb each other, and might end differently.
  with _LOCK:
    return _decided()


@functools.cache
def _decided():
  # Programs of several processes must be the same in each.
  if jax.process_count() > 1:
    return 'f32'
  # In a thread of its own: whoever asks may be tracing, or have a mesh, or have
  # switched compiling off, all of which are matters of a thread.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(_decide).result()


def _decide():
  # Not by a list of instruction sets: what matters is what XLA makes of them.
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    seconds = _race({name: _layer(name) for name in _ALGORITHMS})
  found = 'int8' if seconds['int8'] * _MARGIN < seconds['f32'] else 'f32'
  logging.info('this CPU runs a packed layer in %.1f ms by int8, in %.1f by '
               'float32: %s is taken', seconds['int8'] * 1e3,
               seconds['f32'] * 1e3, found)
  return found


def _layer(name: str) -> Callable[[], Any]:
  """A convolution as packed layers run it by a carrier, compiled."""
  images, side, channels, outputs = _SHAPE
  x = np.ones((images, side, side, channels), np.float32)
  w = np.ones((3, 3, channels, outputs), np.float32)
  run = jax.jit(
      lambda x, w: winograd.conv(
          _ALGORITHMS[name], x, w, 1, jnp.round,
          lambda y: y.astype(jnp.float32)),
      compiler_options=compiler.options()).lower(x, w).compile()
  return functools.partial(run, *jax.device_put((x, w)))


def _race(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
  """The least time of each, in turn."""
  seconds = dict.fromkeys(runs, float('inf'))
  for _ in range(_ROUNDS):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name] = min(seconds[name], time.perf_counter() - start)
  return seconds
