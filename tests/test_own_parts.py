"""Fits, quantizers and arounds as people write them, in NumPy's types."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import msfp_jax as msfp
from msfp_jax import kernels
from msfp_jax.kernels import choice
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import serialize
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import FindAround
from msfp_jax.quant.block import Block
from msfp_jax.quant.fit import Dynamic
from msfp_jax.quant.fit import Fit
from msfp_jax.quant.fit import Fitted
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static

E2M1, INT4 = FPFormat.parse('E2M1'), FPFormat(1, 3, signed=False)
RNG = np.random.default_rng(0)
KERNEL = np.float32(RNG.normal(size=(3, 3, 8, 2)))
ROWS = np.float32(RNG.normal(size=(50, 8)) * np.arange(1, 9))
DYNAMIC = Dynamic(lambda bits: Block(E2M1, 'token'))


def static(name):
  return flax.struct.field(pytree_node=False, default=name)


@flax.struct.dataclass
class Amax(Quantizer):
  """One scale from the data for the whole tensor; fields with odd names."""

  fmt: FPFormat = static(E2M1)
  scale: str = static('amax')
  table: tuple[float, ...] = static((1.0, 2.0))

  @property
  def bits(self):
    return self.fmt.bits

  def quantize(self, x, axis=-1):
    scale = jnp.abs(x).max() / self.fmt.max
    levels = Static(self.fmt, scale).quantize(x, axis).data
    return QTensor(levels, scale, fmt=self.fmt, length=x.shape[axis], axis=axis)


class Extremes(Fit):
  """In Python's numbers."""

  needs = ('extremes',)

  def __call__(self, seen, bits, axis):
    largest = max(-seen.minimum, seen.maximum)
    return Fitted(Static(E2M1, largest / E2M1.max), None)


class Smooth(FindAround):
  """In float64, as NumPy makes it of Python's numbers."""

  def __init__(self, *needs):
    self.needs = ('channel_maxima', *needs)

  def __call__(self, trial):
    return Around(smooth=np.float64(trial.seen.channel_maxima))


def seen_of(*needs):
  every = {'rows': ROWS, 'channel_maxima': np.abs(ROWS).max(0)}
  return Seen(minimum=float(ROWS.min()), maximum=float(ROWS.max()), **{
      need: every[need] for need in needs})


def fitted(recipe, seen):
  return calibrate_lib.fit_layer(recipe, 'conv', seen, KERNEL, 4, 4)


def test_what_fits_and_arounds_compute_in_numpy_comes_back_from_a_file():
  recipe = msfp.Recipe(DYNAMIC, Extremes(), Extremes(), Smooth('rows'))
  layer = fitted(recipe, seen_of('rows', 'channel_maxima'))
  spec = spec_lib.QuantSpec('own', {'conv': layer})
  back = msfp.QuantSpec.from_json(spec.to_json()).layers['conv']
  # Smoothed, the largest of every channel is 1.
  np.testing.assert_allclose(back.act.scale, 1 / 6, rtol=1e-6)
  np.testing.assert_allclose(back.around.smooth, np.abs(ROWS).max(0))
  assert back.around.smooth.dtype == back.act.scale.dtype == np.float32


def test_extremes_of_another_input_than_the_products_are_not_used():
  recipe = msfp.Recipe(DYNAMIC, Extremes(), Extremes(), Smooth())
  with pytest.raises(ValueError, match=r"Extremes needs .*'extremes'.*'rows'"):
    fitted(recipe, seen_of('channel_maxima'))
  # What looks at nothing needs no vectors either.
  layer = fitted(msfp.Recipe(DYNAMIC, DYNAMIC, DYNAMIC, Smooth()),
                 seen_of('channel_maxima'))
  assert layer.around.smooth is not None


def test_a_smoothing_by_zero_is_refused():
  seen = Seen(channel_maxima=np.float32([1] * 7 + [0]))
  with pytest.raises(ValueError, match='smooth holds .* not positive'):
    fitted(msfp.Recipe(DYNAMIC, DYNAMIC, DYNAMIC, Smooth()), seen)


def test_weights_that_a_fit_leaves_in_full_precision():
  full = Dynamic(lambda bits: Full())
  layer = fitted(msfp.Recipe(full, DYNAMIC, DYNAMIC), Seen())
  assert layer.weight.is_full and layer.quantized
  with pytest.raises(ValueError, match='leave `around` out'):
    fitted(msfp.Recipe(full, DYNAMIC, DYNAMIC, Smooth()),
           seen_of('channel_maxima'))


def test_fields_of_any_name_and_annotation_come_back():
  # Annotations of this file are text, and `scale` is no array.
  given = Amax(INT4, 'other', (0.5, (1, 2)))
  back = serialize.quantizer_from_dict(serialize.quantizer_to_dict(given))
  assert back == given and hash(back.table)


def test_a_type_that_no_file_can_hold_is_refused_when_written():
  with pytest.raises(ValueError, match="'?float64'?: must be of"):
    serialize.array_to_json(np.zeros(3))


@pytest.mark.slow
def test_banks_of_one_scale_each():
  """Each by itself: a scale for the tensor is no scale for all banks."""
  kernels_of = np.stack([KERNEL, 3 * KERNEL])
  banks = Amax().quantize_banks(kernels_of)
  for i, kernel in enumerate(kernels_of):
    np.testing.assert_array_equal(
        banks.bank(i).dequantize(),
        Amax().quantize(kernel, axis=-2).dequantize())
  # Its `scale` is a word: what is prepared asks the quantizer, not its fields.
  layer = kernels.prepare(QLayer(banks.packed(), Amax()))
  x = np.float32(RNG.normal(size=(5, 8)))
  alone = QLayer(Amax().quantize_banks(KERNEL[None, 0, 0]).packed(), Amax())
  np.testing.assert_allclose(
      kernels.run(alone.at(0), x),
      Amax().quantize(x).dequantize() @ np.asarray(
          Amax().quantize(KERNEL[0, 0], axis=-2).dequantize()),
      rtol=1e-5, atol=1e-5)
  assert layer.prepared.parts == 0


def test_zero_points_of_groups_under_one_scale():
  """The reference sums over what both scale and zero point share."""
  x = np.float32(RNG.normal(size=(4, 8)))
  tensor = Block(INT4, 'group', 4).quantize(x)
  tensor = tensor.replace(scale=jnp.float32(0.3))

  @flax.struct.dataclass
  class Same(Quantizer):

    @property
    def bits(self):
      return 4

    def quantize(self, x, axis=-1):
      return tensor

  w = Static(E2M1, jnp.float32(0.25)).quantize(KERNEL[0, 0], axis=-2)
  found = kernels.run(QLayer(w, Same()), x, implementation='reference')
  expected = np.float64(tensor.dequantize()) @ np.float64(w.dequantize())
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_plan_of_other_steps_than_the_quantizers():
  steps = Static(E2M1, jnp.full(3, 0.1), by_step=True)
  spec = toy.spec()
  layers = {name: toy.layer(layer.weight, steps)
            for name, layer in spec.layers.items()}
  spec = spec_lib.QuantSpec('steps', layers)
  with pytest.raises(ValueError, match='each of 3 steps, and the plan has 2'):
    packed_lib.simulate(toy.Toy(), toy.params(), spec, toy.plan())


def test_weight_norm_is_refused_though_calibration_runs_no_model(monkeypatch):

  class Normed(nn.Module):

    @nn.compact
    def __call__(self, x, t):
      return nn.WeightNorm(nn.Dense(1, name='odd'))(x)

  monkeypatch.setitem(
      msfp.RECIPES, 'dynamic', msfp.Recipe(DYNAMIC, DYNAMIC, DYNAMIC))
  noise = jnp.ones((1, *toy.SHAPE))
  params = jax.jit(Normed().init)(
      jax.random.key(0), noise, jnp.zeros(1))['params']
  options = {'recipe': 'dynamic', 'roles': {'any': '.*'}}
  spec = msfp.calibrate(Normed(), params, **options)
  packed = msfp.pack(Normed(), params, spec, toy.plan())
  with pytest.raises(ValueError, match='odd computes with another kernel'):
    packed.eps_fn(noise, jnp.zeros(1), 0)
  with pytest.raises(ValueError, match='odd computes with another kernel'):
    msfp.calibrate(Normed(), params, batches=[noise], **options)


@pytest.mark.parametrize('shape', [(), (1, 1), (1, 4)])
def test_kernels_refuse_weights_with_one_scale(shape):
  """They read one a channel; what they would read of one is another number."""
  weight = Static(E2M1, jnp.full(shape, 0.25)).quantize_banks(
      KERNEL[None, 0, 0, :, :1] * np.ones(4, np.float32))
  layer = QLayer(weight.packed(), Static(E2M1, jnp.float32(0.5))).at(0)
  for chip in ('mosaic_tpu', 'mosaic_gpu'):
    reason = choice.why_not(chip, layer, (5, 8)) or ''
    assert ('a scale for each output channel' in reason) == (shape != (1, 4))


@pytest.mark.parametrize('options', [
    {'bits': 4.0}, {'bits': '4'}, {'bits': None},
    {'exceptions': {'any': 2}}])
def test_widths_that_are_none(options, monkeypatch):
  monkeypatch.setitem(
      msfp.RECIPES, 'dynamic', msfp.Recipe(DYNAMIC, DYNAMIC, DYNAMIC))
  with pytest.raises(ValueError, match='bits: must be 3 to 8 bits, or 32'):
    msfp.calibrate(toy.Toy(), toy.params(), recipe='dynamic',
                   roles={'any': '.*'}, **options)


def test_weights_are_quantized_once():
  qparams = msfp.quantize(toy.params(), toy.spec())
  with pytest.raises(ValueError, match='conv_.* are quantized already'):
    msfp.quantize(qparams, toy.spec())
  with pytest.raises(ValueError, match='conv_.* are quantized already'):
    msfp.pack(toy.Toy(), qparams, toy.spec(), toy.plan())
