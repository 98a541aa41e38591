"""The cases that benchmarks/hopper.py measures, and ways to compute them."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import limits
from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import FPFormat

E2M1, INT4, INT8 = map(FPFormat.parse, ('E2M1', 'E1M2', 'E1M6'))
LARGEST = 7  # of the activations, which bf16, int8 and fp8 hold


@dataclasses.dataclass(frozen=True)
class Case:
  """A product of [M, K] and [K, N], or a 3x3 convolution of M images.

  Attributes:
    name: of the row.
    m: rows of x, or images.
    k: channels of x.
    n: of y.
    size: height and width of the images; 0 for a matrix product.
    flag_group: neighbours that share a FLAG of QuaRTZ's weights; 0 for weights
      in E2M1.
    more: whether it is also measured with scales by token and by group.
  """

  name: str
  m: int
  k: int
  n: int
  size: int = 0
  flag_group: int = 0
  more: bool = False

  @property
  def x_shape(self) -> tuple[int, ...]:
    image = (self.size, self.size) if self.size else ()
    return (self.m, *image, self.k)

  @property
  def w_shape(self) -> tuple[int, ...]:
    """The shape of the weights' codes: HWIO, or `[K, N]`."""
    return (3, 3, self.k, self.n) if self.size else (self.k, self.n)

  @property
  def pixels(self) -> int:
    return math.prod(self.x_shape[:-1])

  @property
  def length(self) -> int:
    return math.prod(self.w_shape[:-1])

  @property
  def flop(self) -> int:
    return 2 * self.pixels * self.length * self.n

  def by_group(self, group: int) -> tuple[int, ...]:
    """The shape of what each group of the weights has."""
    return (*self.w_shape[:-2], -(-self.k // group), self.n)

  @property
  def y_shape(self) -> tuple[int, ...]:
    return (*self.x_shape[:-1], self.n)

  def bytes(self, x_bits: int, w_bits: int) -> int:
    """The bytes that are read and written at least, y in bf16."""
    return (self.pixels * (self.k * x_bits + self.n * 16)
            + self.length * self.n * w_bits) // 8


CASES = (
    Case('large', 8192, 8192, 8192), Case('few 16', 16, 8192, 8192, more=True),
    Case('few 64', 64, 8192, 8192), Case('few 128', 128, 8192, 8192),
    Case('conv SD 64', 8, 320, 320, 64),
    Case('conv SD 32', 8, 640, 640, 32, more=True),
    Case('conv SD 16', 8, 1280, 1280, 16), Case('conv SD 8', 8, 1280, 1280, 8),
    Case('conv SD up', 8, 960, 320, 64),
    Case('conv CIFAR 32', 128, 128, 128, 32),
    Case('conv CIFAR 16', 128, 256, 256, 16),
    Case('conv LDM 64', 8, 224, 224, 64),
    Case('DiT qkv', 2048, 1152, 3456),
    Case('DiT fc1', 2048, 1152, 4608, more=True),
    Case('DiT fc2', 2048, 4608, 1152), Case('SD proj 64', 32768, 320, 320),
    Case('SD geglu 64', 32768, 320, 2560), Case('SD geglu 32', 8192, 640, 5120),
    Case('quartz large', 8192, 8192, 8192, flag_group=16),
    Case('quartz few 16', 16, 8192, 8192, flag_group=16),
    Case('quartz DiT fc1', 2048, 1152, 4608, flag_group=16),
    Case('quartz SD 32', 8, 640, 640, 32, flag_group=32),
)


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to compute a case: function(x, weights, scale, shift, *more).

  Attributes:
    name: of the row.
    carrier: of x.
    function: as above.
    packed: whether weights are.
    more: option of the kernels -> shape of it: arrays of ones, or 0 where they
      are added, so that every way has the same result.
  """

  name: str
  carrier: str
  function: Callable[..., jax.Array]
  packed: bool = False
  more: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def xla(x, w, scale, shift, *, sums):
  """Computes a case by XLA; w is `[N, K]` or OHWI."""
  if x.ndim == 2:
    y = lax.dot_general(x, w, (((1,), (1,)), ((), ())),
                        preferred_element_type=sums)
  else:
    y = lax.conv_general_dilated(
        x, w, (1, 1), ((1, 1), (1, 1)), preferred_element_type=sums,
        dimension_numbers=('NHWC', 'OHWI', 'NHWC'))
  return (y.astype(jnp.float32) * scale + shift).astype(jnp.bfloat16)


def packed(x, w, scale, shift, *more, names=(), blocks=None, **options):
  """Computes a case by our kernels; `more` are what `names` says."""
  given = dict(zip(names, more, strict=True))
  part = lambda kind: kind(**{
      field: given.pop(f'{kind.__name__}.{field}') for field in kind._fields
      if f'{kind.__name__}.{field}' in given})
  settings = {'fmt': E2M1, 'rows': part(Rows), 'columns': part(Columns),
              'out_dtype': jnp.bfloat16, 'blocks': blocks} | options | given
  if x.ndim == 2:
    return mosaic_gpu.matmul(x, w, scale, shift, **settings)
  return mosaic_gpu.conv(x, w, scale, shift, strides=(1, 1),
                         padding=((1, 1), (1, 1)), **settings)


def methods(case: Case) -> Iterator[Method]:
  """Yields the ways to compute a case, bf16 first."""
  # XLA widens bf16 convolutions that are asked for float32 sums.
  yield Method('XLA bf16', 'bf16', functools.partial(
      xla, sums=None if case.size else jnp.float32))
  for carrier in ('int8', 'fp8'):
    yield Method(f'XLA {carrier}', carrier, functools.partial(
        xla, sums=carriers.DTYPES[carrier][1]))
  if case.flag_group:
    yield with_more('packed QuaRTZ', 'int8', {
        'flags': case.by_group(case.flag_group)}, fmt=INT4, wide=INT8,
                    flag_group=case.flag_group)
    return
  for carrier in ('int8', 'fp8'):
    yield Method(f'packed {carrier}, chosen', carrier, packed, True)
  if case.more:
    yield from more_methods(case)


def of_kernel(case: Case) -> Method:
  """The kernel with nothing beside the weights, by int8."""
  return next(method for method in methods(case) if method.packed)


def with_more(name: str, carrier: str, more, **options) -> Method:
  return Method(name, carrier, functools.partial(
      packed, names=tuple(more), **options), True, more)


def more_methods(case: Case) -> Iterator[Method]:
  """Yields kernels with all that a layer may bring along."""
  rows, columns = case.y_shape[:-1], (case.n,)
  token = {'Rows.scale': rows}
  yield with_more('packed int8, by token', 'int8', token)
  yield with_more('packed int8, zeros of weights', 'int8', token | {
      'Rows.total': rows, 'Columns.offset': columns, 'Rows.zero': rows,
      'Columns.zero': columns})
  for group in (16, 32, 64):
    by_group = {'groups': case.by_group(group)}
    yield with_more(f'packed int8, groups of {group}', 'int8', by_group,
                    group=group)
    inputs = (*case.x_shape[:-1], -(-case.k // group))
    yield with_more(f'packed int8, both in groups of {group}', 'int8',
                    by_group | {'inputs': inputs}, group=group,
                    input_group=group)


def work(case: Case, group: int = 0, input_group: int = 0) -> blocks_lib.Work:
  """What a case's kernel cuts into blocks; groups as for the kernel."""
  row = -(-case.k // blocks_lib.LEAST_DEPTH) * blocks_lib.LEAST_DEPTH
  groups = limits.groups_of(group, input_group, case.flag_group)
  if not case.size:
    return blocks_lib.Work(case.m, case.n, row, groups=groups)
  # The window's columns side by side, and a row of zeros below each image.
  rows = case.m * (case.size + 1) * case.size
  return blocks_lib.Work(rows, case.n, 3 * row, 3, groups=groups)


def draw(case: Case) -> dict[str, np.ndarray]:
  """Draws x, codes and their levels, and scales that are powers of two."""
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 16, case.w_shape, np.uint8)
  fmt = INT4 if case.flag_group else E2M1
  levels = carriers.carry(fmt, 'int8').values().astype(np.int8)[codes]
  drawn = {}
  if case.flag_group:
    drawn['flags'] = rng.integers(
        0, 5, case.by_group(case.flag_group), np.uint8)
    levels <<= drawn['flags'].repeat(case.flag_group, -2)[..., :case.k, :]
  return drawn | {
      'x': rng.integers(-LARGEST, LARGEST + 1, case.x_shape, np.int8),
      'packed': mosaic_gpu.prepare(layout_lib.pack_halves(codes), case.k),
      'levels': np.ascontiguousarray(np.moveaxis(levels, -1, 0)),
      'scale': np.ldexp(np.float32(1), rng.integers(-9, -5, case.n)),
      'shift': np.zeros(case.n, np.float32)}


def arguments(method: Method, drawn: dict[str, Any]) -> tuple[Any, ...]:
  dtype = carriers.DTYPES[method.carrier][0]
  weights = (jnp.asarray(drawn['packed']) if method.packed
             else jnp.asarray(drawn['levels'], dtype))
  more = [
      drawn['flags'] if name == 'flags' else filled(name, shape)
      for name, shape in method.more.items()]
  return (jnp.asarray(drawn['x'], dtype), weights, drawn['scale'],
          drawn['shift'], *more)


def filled(name: str, shape: tuple[int, ...]) -> jax.Array:
  added = name in ('Columns.offset', 'Columns.zero')
  return jnp.full(shape, 0 if added else 1, jnp.float32)
