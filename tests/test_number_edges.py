"""The ends of number ranges: subnormal scales, minima in half precision."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import interception
from msfp_jax.quant import recipes
from msfp_jax.quant import search
from msfp_jax.quant import serialize
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.calibrate import fit_layer
from msfp_jax.quant.calibrate import is_aal
from msfp_jax.quant.dual_scale import DualScale
from msfp_jax.quant.dual_scale import FitDualScale
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.observe import collect
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import Suppressed

pytestmark = pytest.mark.optimized

TINY = np.finfo(np.float32).tiny
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
RNG = np.random.default_rng(0)
# Largest magnitudes of a layer's output channels: subnormal numbers, such as
# have subnormal scales, zeros, and small ones that stay.
MAGNITUDES = (1.0, 1e-40, 1e-44, 0.0, 1e-38, 3e-5)


def seen_of(rows):
  wide = np.float32(rows)
  return Seen(rows.ravel(), float(wide.min()), float(wide.max()), rows,
              np.abs(rows).max(0), np.float64(wide.T) @ np.float64(wide),
              rows.dtype)


QUICK = [('msfp', ml_dtypes.bfloat16), ('int', np.float32),
         ('nvfp4', np.float16), ('quartz', ml_dtypes.bfloat16),
         ('dual_scale', np.float32)]


def cases():
  """(recipe, dtype): all recipes, of which most are slow, and types in turn."""
  yield from QUICK
  for recipe, dtype in zip(recipes.RECIPES, itertools.cycle(DTYPES)):
    if (recipe, dtype) not in QUICK:
      yield pytest.param(recipe, dtype, marks=pytest.mark.slow)


def restored(layer, kernel):
  if layer.around is not None:
    kernel = layer.around.residual(kernel)
  return np.asarray(fit_lib.restored(layer.weight, kernel, -2))


@pytest.mark.parametrize('recipe, dtype', [*cases()])
def test_subnormal_channels_count_as_zero(recipe, dtype):
  """Weights, as if their channels held zeros; inputs, alone or among others."""
  shares = RNG.uniform(0.3, 1, (32, len(MAGNITUDES))) * RNG.choice(
      [-1, 1], (32, len(MAGNITUDES)))
  kernel = (shares * np.asarray(MAGNITUDES)).astype(dtype)
  without = np.where(np.abs(np.float64(kernel)) < 1e-37, 0, kernel)
  rows = np.abs(RNG.standard_normal((64, 32))).astype(dtype)
  rows[:, 5] = 1e-40
  fitted = lambda kernel, rows: fit_layer(
      recipes.get(recipe), 'conv', seen_of(rows), kernel, 4, 4)
  layer = fitted(kernel, rows)
  found = restored(layer, kernel)
  expected = restored(fitted(without.astype(dtype), rows), without)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-36)
  for few in (rows, (rows * np.float32(1e-40)).astype(dtype)):
    layer = fitted(kernel, few)
    for quantizer in (layer.weight, layer.act):
      serialize.quantizer_from_dict(serialize.quantizer_to_dict(quantizer))
    x = jnp.asarray(few)
    x = x if layer.around is None else layer.around.input(x)
    back = np.float64(layer.act.fake_quant(x, -1))
    assert np.isfinite(back).all()
    assert np.abs(back).max() < 1e-30 or few is rows


@pytest.mark.parametrize('fmt', ['E2M1', 'E4M3', 'E7M0'])
@pytest.mark.parametrize('magnitude', [1e-44, 1e-38, 1e-25, 1e-18])
def test_searched_scales_are_normal_or_of_zeros(fmt, magnitude):
  """E7M0 reaches 2^64: at 1e-25 its scale would be subnormal, E2M1's not."""
  x = np.float32(magnitude) * np.linspace(-1, 1, 9, dtype=np.float32)
  found = search.search(x, (FPFormat.parse(fmt),), zero_points=None)
  assert found.scale >= TINY
  quantizer = found.quantizer()
  back = np.float64(quantizer.fake_quant(jnp.asarray(x)))
  if magnitude / FPFormat.parse(fmt).max < 1e-2 * TINY:
    np.testing.assert_array_equal(back, 0)
    assert found.mse == np.mean(np.float64(x)**2)
  elif magnitude / FPFormat.parse(fmt).max > 1e2 * TINY:
    np.testing.assert_allclose(found.mse, np.mean((back - x)**2), rtol=1e-3)
    assert found.mse < 0.1 * np.mean(np.float64(x)**2)


@pytest.mark.parametrize('shift', [-87, -300])
def test_learned_ranges_stay_normal(shift):
  x = jnp.asarray(RNG.standard_normal(64), jnp.float32)
  of = lambda name: jnp.float32(shift)
  static = Static(FPFormat.parse('UE2M2'), jnp.float32(0.1), jnp.float32(-.3))
  dual = DualScale(FPFormat.parse('E2M1'), jnp.float32(.1), jnp.float32(.2))
  for quantizer in (static, dual, Suppressed(
      Static(FPFormat(1, 6), jnp.float32(0.1)))):
    offsets = {name: jnp.zeros(()) if name == 'zero_point' else of(name)
               for name in quantizer.offsets()}
    moved = quantizer.moved(offsets)
    assert not moved.flaws()
    value, gradient = jax.value_and_grad(
        lambda x, moved=moved: moved.fake_quant(x[None], -1).sum())(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize('positive, negative', [
    (1.0, 1e-42), (1e-42, 1.0), (1e-30, 1e30), (1e30, 1e-30), (0.0, 1e-20),
    (1e-20, 0.0), (0.0, 0.0), (1e-41, 1e-44)])
def test_signs_of_very_different_scales(positive, negative):
  values = np.float32([*np.linspace(0, positive, 50),
                       *-np.linspace(0, negative, 50)])
  fitted = FitDualScale()(Seen(values), 4, -1)
  assert not fitted.quantizer.flaws()
  back = np.float64(fitted.quantizer.fake_quant(jnp.asarray(values)))
  # Next to the larger sign the other may be 0; both are near their values.
  largest = max(positive, negative)
  assert np.abs(back - values).max() <= 0.2 * largest + 1e-37


def test_what_could_not_be_loaded_is_not_found():
  class Bad(fit_lib.Fit):
    def __call__(self, seen, bits, axis):
      return fit_lib.Fitted(
          Static(FPFormat(2, 1), jnp.float32(self.scale)), 0.0)

  for scale in (1e-44, 0.0, -1.0, np.inf, np.nan):
    of = Bad()
    of.scale = scale
    with pytest.raises(ValueError, match='Bad found a quantizer with a scale'):
      fit_lib.fit(of, Seen(), 4, -1)
    row = serialize.quantizer_to_dict(Static(FPFormat(2, 1),
                                             jnp.float32(scale)))
    with pytest.raises(ValueError, match='a scale'):
      serialize.quantizer_from_dict(row)


def test_weights_that_float32_has_no_range_for():
  kernels = {'a': np.float32([[1, 2]]), 'b': np.float32([[3e38, -3e38]])}
  with pytest.raises(ValueError, match=r'layer b: 2 of 2 .* beyond 8.51e\+37'):
    interception.check_finite(kernels)


ACTIVATIONS = (nn.silu, nn.gelu, lambda x: nn.gelu(x, approximate=False),
               nn.relu, lambda x: x / (1 + jnp.exp(-x)))


@pytest.mark.parametrize('dtype', DTYPES)
def test_activations_of_any_dtype_are_aals(dtype):
  """All numbers of 16 bits there are, from -60 up."""
  x = (np.linspace(-60, 60, 100_001, dtype=np.float32) if dtype == np.float32
       else np.arange(2**16, dtype=np.uint16).view(dtype))
  with np.errstate(invalid='ignore'):  # of bfloat16's NaN
    x = jnp.asarray(x[np.abs(np.float32(x)) <= 60])
  for activation in ACTIVATIONS:
    for run in (activation, jax.jit(activation)):
      y = run(x)
      assert y.dtype == dtype
      assert is_aal(float(y.min()), float(y.max()), y.dtype)
  # Two numbers below SiLU's minimum is none of them, nor is one of float32.
  assert not is_aal(-0.2813, 3.0, dtype)
  assert is_aal(-0.2793, 3.0, dtype) == (dtype == ml_dtypes.bfloat16)


class Silu(nn.Module):
  """Its layers see the noise, then SiLU of 8 times that."""

  dtype: Any

  @nn.compact
  def __call__(self, x, t):
    y = nn.Dense(8, name='first', dtype=self.dtype)(x)
    return nn.Dense(x.shape[-1], name='second', dtype=self.dtype)(
        nn.silu(8 * y))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_a_half_precision_model_has_aals(dtype):
  noise = jax.random.normal(jax.random.key(0), (4, 32, 32, 2))
  model = Silu(dtype)
  params = jax.jit(model.init)(jax.random.key(1), noise, jnp.zeros(4))['params']
  seen = collect(model, params, tiny.PLAN, [noise], samples_per_layer=512,
                 key=jax.random.key(2))
  assert seen['second'].dtype == dtype
  assert seen['second'].minimum < (-0.279 if dtype == jnp.bfloat16 else -0.278)
  found = calibrate(model, params, recipe='msfp', exceptions={},
                    roles={'all': '.*'}, activations=seen)
  assert [layer.kind for layer in found.layers.values()] == ['NAL', 'AAL']
  assert not found.layers['second'].act.fmt.signed
