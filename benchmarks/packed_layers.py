"""Times the layers of a packed model, one by one, against XLA's."""

from collections.abc import Iterator
import dataclasses
import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from msfp_jax import kernels
from msfp_jax.kernels import apply as apply_lib
from msfp_jax.kernels import choice
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant.qlayer import QLayer


@dataclasses.dataclass
class Case:
  """Layers of equal shape and formats.

  Attributes:
    names: of the layers.
    module: of the first, unbound.
    layer: its packed weights, one set of them.
    params: its own, in float32.
    x: shape of its input.
    y: of its output.
  """

  names: list[str]
  module: nn.Module
  layer: QLayer
  params: Any
  x: tuple[int, ...]
  y: tuple[int, ...]

  @property
  def flop(self) -> int:
    """The multiplications and additions of the direct product."""
    return 2 * int(np.prod(self.params['kernel'].shape[:-1]) * np.prod(self.y))

  def bytes(self, weights: int, each: int) -> int:
    """The bytes of weights, input and output, with `each` bytes a value."""
    return weights + each * int(np.prod(self.x) + np.prod(self.y))

  def run(self, layer: QLayer, x: jax.Array,
          implementation: str | None) -> jax.Array:
    return apply_lib.apply(
        self.module, {}, {'': layer}, x, implementation=implementation)

  def fell_back(self) -> str:
    """Why the device's kernel does not take the layer; '' if it does."""
    kernel = choice.KERNELS.get(jax.default_backend())
    if kernel is None:
      return ''
    try:
      jax.eval_shape(lambda layer, x: self.run(layer, x, kernel), self.layer,
                     jax.ShapeDtypeStruct(self.x, jnp.float32))
    except ValueError as error:
      return str(error).removeprefix('layer : ')
    return ''


def cases(model: packed_lib.PackedModel, params: Any, *inputs: Any
          ) -> list[Case]:
  """Groups a packed model's layers into cases, those of the most work first."""
  layers = {name: jax.tree.map(jnp.asarray, layer).at(0)
            for name, layer in model.layers.items()
            if layer.weight is not None}
  kinds = {name: formats(layer) for name, layer in layers.items()}
  weights = interception.leaves(params, 'kernel')
  biases = interception.leaves(params, 'bias')
  found: dict[Any, Case] = {}

  def visit(module, x, compute):
    y = compute(x)
    name = interception.layer_name(module)
    if name in layers:
      layer = layers[name]
      parts = layer.prepared and layer.prepared.parts
      key = (x.shape, y.shape, layer.weight.data.shape, kinds[name], parts)
      own = {'kernel': weights[name]} | (
          {'bias': biases[name]} if name in biases else {})
      found.setdefault(key, Case(
          [], module.clone(parent=None), layer, own, x.shape, y.shape)
                       ).names.append(name)
    return y

  jax.eval_shape(lambda params, *inputs: interception.call(
      model.model, params, visit, *inputs), params, *inputs)
  return sorted(found.values(), key=lambda c: -c.flop * len(c.names))


def formats(layer: QLayer) -> tuple[str, str]:
  """The formats of a layer's weights and of its input, for people."""
  return str(layer.weight.fmt), layer.input.describe()['format']


def count_fallen(cases: list[Case]) -> int:
  """Counts the layers of 4 bits that the device's kernel does not take."""
  return sum(len(case.names) for case in cases
             if case.layer.weight.fmt.bits == 4 and case.fell_back())


def measure(case: Case, roofline: machine.Roofline, count: int
            ) -> dict[str, Any]:
  """Measures a row of the table, and of the JSON beside it."""
  x = jax.random.normal(jax.random.key(0), case.x)
  half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
  apply = jax.jit(lambda params, x: case.module.apply({'params': params}, x))
  packed = jax.jit(lambda layer, x: case.run(layer, x, None),
                   compiler_options=kernels.compiler_options())
  halves = half(case.params), half(x)
  times = machine.rounds({
      'float32': lambda: apply(case.params, x),
      'bfloat16': lambda: apply(*halves),
      'packed': lambda: packed(case.layer, x)}, count, warm=True)
  weights = sum(a.nbytes for a in jax.tree.leaves(case.params))
  stored = sum(a.nbytes for a in jax.tree.leaves(case.layer))
  reason = case.fell_back()
  kernel = choice.KERNELS.get(jax.default_backend(), 'xla')
  carrier = choice.pick_carrier(
      case.layer, case.x, 'xla' if reason else kernel)
  floors = {
      'float32': roofline.seconds(case.flop, case.bytes(weights, 4), 'f32'),
      'bfloat16': roofline.seconds(
          case.flop, case.bytes(weights // 2, 2), 'bf16'),
      'packed': roofline.seconds(case.flop, case.bytes(stored, 4), carrier)}
  return {
      'layers': case.names, 'input': case.x,
      'kernel': case.params['kernel'].shape, 'format': formats(case.layer)[0],
      'act_format': formats(case.layer)[1], 'carrier': carrier,
      'bytes': {'float32': weights, 'bfloat16': weights // 2,
                'packed': stored},
      'seconds': {name: statistics.median(t) for name, t in times.items()},
      'share_of_roofline': {
          name: floors[name] / statistics.median(t)
          for name, t in times.items()},
      'fell_back': reason,
      'speedup': None if reason else {
          name: machine.ratio(times[name], times['packed'])
          for name in ('float32', 'bfloat16')}}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Formats the rows as a Markdown table."""
  yield ('| layers | input | kernel | formats | carrier | KB of float32 | KB | '
         'ms of float32 | bfloat16 | packed | share of the roofline | times '
         'float32 | bfloat16 |')
  yield '|---' * 13 + '|'
  for row in rows:
    ms = [f'{t * 1e3:.2f}' for t in row['seconds'].values()]
    times = [f'fell back: {row["fell_back"]}', '-'] if row['fell_back'] else [
        f'{value:.2f}x' for value in row['speedup'].values()]
    cells = [
        str(len(row['layers'])), 'x'.join(map(str, row['input'])),
        'x'.join(map(str, row['kernel'])),
        f'{row["format"]} {row["act_format"]}', row['carrier'],
        f'{row["bytes"]["float32"] / 1e3:.0f}',
        f'{row["bytes"]["packed"] / 1e3:.0f}', *ms,
        f'{row["share_of_roofline"]["packed"]:.0%}', *times]
    yield '| ' + ' | '.join(cells) + ' |'
