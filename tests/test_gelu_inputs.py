"""Inputs behind GELU, as `benchmarks.gelu_inputs` measures them."""

import math

import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import gelu_cases
from benchmarks import gelu_inputs
from benchmarks.gelu_cases import Case
from msfp_jax.models import flux_blocks
from msfp_jax.quant import recipes
from msfp_jax.quant.around import Around
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.spec import LayerSpec

# Levels 0 to 1.875 in steps of 0.125; of a scale of 8, whole numbers.
UNSIGNED, SIGNED = FPFormat.parse('UE1M3'), FPFormat.parse('E1M6')


def test_decibels_by_the_formula():
  rng = np.random.default_rng(0)
  exact = rng.standard_normal((3, 5)).astype(np.float32)
  noise = np.float32(rng.standard_normal((3, 5)) * 1e-4)
  back = exact + noise
  error = np.float64(back) - np.float64(exact)
  expected = 20 * np.log10(
      np.linalg.norm(np.float64(exact)) / np.linalg.norm(error))
  assert gelu_inputs.decibels(exact, back) == pytest.approx(expected, abs=1e-9)
  assert gelu_inputs.decibels(exact, exact) == math.inf
  # A tenth of the amplitude is 20 dB.
  assert gelu_inputs.decibels(exact, exact * np.float32(1.1)) == pytest.approx(
      20, abs=1e-4)


def whole(fmt):
  return Static(fmt, jnp.float32(1 / fmt.step))


@pytest.mark.parametrize('around, shift', [
    (None, 0.0), (None, 3.0),
    (Around(smooth=np.float32([2, 1, 4, 0.5])), 4.0),
    (Around(rotation=4), 0.0), (Around(rotation=4), 2.0),
    (Around(down=np.ones((4, 1), ml_dtypes.bfloat16),
            up=np.full((1, 3), 2, ml_dtypes.bfloat16)), 1.0)])
def test_what_stands_around_a_product_is_taken_back(around, shift):
  """Numbers that lie on the grids lose nothing, moved or not."""
  rng = np.random.default_rng(1)
  smooth = 1 if around is None or around.smooth is None else around.smooth
  if around is not None and around.rotation:
    # A matrix of +-1/2 makes whole numbers of multiples of 2.
    x = np.float32(2 * rng.integers(0, 3, (2, 5, 4)))
    kernel = np.float32(2 * rng.integers(-4, 5, (4, 3)))
    act = SIGNED
  else:
    x = np.float32(rng.integers(0, 12, (2, 5, 4)) * smooth)
    kernel = np.float32(rng.integers(-9, 10, (4, 3)) / np.reshape(
        smooth * np.ones(4), (4, 1)))
    act = UNSIGNED
  x -= np.float32(shift) * (act == UNSIGNED)
  layer = LayerSpec('', '', whole(SIGNED), whole(act), around)
  found = gelu_inputs.run(layer, x, kernel, shift)
  np.testing.assert_array_equal(found.x_back, np.float64(x))
  np.testing.assert_allclose(
      found.y_back, np.float64(x) @ np.float64(kernel), atol=1e-9)
  np.testing.assert_array_equal(found.y, np.float64(x) @ np.float64(kernel))
  np.testing.assert_allclose(found.y_weights, found.y, atol=1e-9)


def test_errors_of_input_and_weights_reach_the_output():
  x = np.float32([[[1.25, 2.0, 0.0]]])
  kernel = np.float32([[1.0], [2.25], [5.0]])
  layer = LayerSpec('', '', whole(SIGNED), whole(UNSIGNED))
  found = gelu_inputs.run(layer, x, kernel)
  assert found.x_back.tolist() == [[[1.0, 2.0, 0.0]]]
  assert (found.y.item(), found.y_back.item()) == (1.25 + 4.5, 1.0 + 4.0)
  assert found.y_weights.item() == 1.25 + 4.0
  assert found.bits == 4 + 32 / (128 * 3)  # a scale for 128 tokens


def post_gelu(seed, width=1.0, shape=(4, 64, 128)):
  x = np.random.default_rng(seed).standard_normal(shape) * width
  # By tanh, as FLUX has it, in float64.
  return np.float32(0.5 * x * (1 + np.tanh(
      np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


@pytest.mark.parametrize('width', [0.6, 1.0, 2.0])
def test_the_zero_point_of_msfp_reaches_gelus_minimum(width):
  """-0.17 comes back within a step; a signed format's step there is wider."""
  x = post_gelu(0, width)
  minimum = np.float64(x).min()
  assert minimum == pytest.approx(-0.17004, abs=2e-4)
  seen = gelu_cases.seen_of(x)
  unsigned, signed = (recipes.get(name).aal(seen, 4, -1)
                      for name in ('msfp', 'signed_fp'))
  quantizer = unsigned.quantizer
  assert not quantizer.fmt.signed
  step = float(quantizer.scale) * np.diff(quantizer.fmt.values())[0]
  assert abs(float(quantizer.zero_point) - minimum) <= step
  assert unsigned.mse < 0.8 * signed.mse


def test_a_shift_makes_inputs_behind_gelu_unsigned():
  seen = gelu_cases.seen_of(post_gelu(0) + np.float32(gelu_inputs.SHIFT))
  recipe, shift = gelu_inputs.ROWS[gelu_inputs.SHIFTED]
  assert shift == 0.171875 and seen.minimum >= 0
  assert not recipe.aal(seen, 4, -1).quantizer.fmt.signed


def test_rows_are_all_recipes_and_others_ways():
  assert [*gelu_inputs.ROWS][:len(recipes.RECIPES)] == [*recipes.RECIPES]
  kernel = np.random.default_rng(2).standard_normal((128, 8), np.float32)
  case = Case(post_gelu(1), post_gelu(2), kernel)
  names = ['int4_group', 'quartz', 'quartz signed', 'quartz by 64']
  found = dict(gelu_inputs.outcomes(case, names))
  # Bits with scales: an image of 128 tokens of 128 channels.
  assert [found[name].bits for name in names] == [
      4 + 16 / 64, 4 + 3 / 16 + 64 / 128, 4 + 3 / 16 + 32 / 128,
      4 + 3 / 16 + 2 * 16 / 64]
  error = lambda name: gelu_inputs.decibels(
      found[name].x, found[name].x_back)
  assert error('quartz') > error('quartz signed') + 3


@pytest.fixture(scope='module')
def draws():
  """{kind: (model, parameters by path, inputs)}, two heads of a small image."""
  model = gelu_cases.model_of(1, side=8)
  found = {}
  for kind in gelu_cases.KINDS:
    params = gelu_cases.params_of(model, kind, 3)
    found[kind] = (flax.traverse_util.flatten_dict(params, sep='/'),
                   gelu_cases.inputs_of(model, params, 4))
  return found


@pytest.mark.slow
def test_a_small_flux_has_the_inputs_that_are_stated(draws):
  """Before GELU normal at first; then channels of many widths, few large."""
  ratios = {}
  for kind, (_, inputs) in draws.items():
    for name in (gelu_cases.FEED_FORWARD, gelu_cases.GELU_HALF):
      x = inputs[name]
      assert x.shape[0] == 4 and x.shape[-1] == 512
      assert -0.1701 < x.min() < -0.165
    assert inputs[gelu_cases.ATTENTION_HALF].min() < -0.3
    x = np.float64(inputs[gelu_cases.FEED_FORWARD]).reshape(-1, 512)
    widths = np.sort(x.std(0))
    ratios[kind] = widths[-5:] / np.median(widths)
  # Xavier's layer [D, 4 D] makes 0.4^(1/2) of what a norm makes 1.
  assert np.all(ratios['initial'] < 2)
  assert np.all(ratios['uneven'] > 3) and np.all(ratios['uneven'] < 15)
  assert np.all(ratios['outliers'] > 10) and np.median(ratios['outliers']) > 30
  x = draws['initial'][1][gelu_cases.FEED_FORWARD]
  normal = np.random.default_rng(0).standard_normal(10**6) * np.sqrt(0.4)
  expected = np.asarray(flux_blocks.gelu(jnp.asarray(normal)))
  for quantile in (0.1, 0.5, 0.9, 0.99):
    assert np.quantile(x, quantile) == pytest.approx(
        np.quantile(expected, quantile), abs=0.02)


def test_outliers_are_the_channels_of_both_layers():
  model = gelu_cases.model_of(1, side=8)
  plain, large = (flax.traverse_util.flatten_dict(
      gelu_cases.params_of(model, kind, 0), sep='/')
                  for kind in ('uneven', 'outliers'))
  for first, second in (('ff.net.0.proj', 'ff.net.2'),
                        ('ff_context.net.0.proj', 'ff_context.net.2'),
                        ('proj_mlp', 'proj_out.mlp')):
    names = [name for name in plain if name.endswith(f'/{first}/kernel')]
    assert len(names) == 2
    for name in names:
      ratio = large[name] / plain[name]
      wide = np.flatnonzero(np.isclose(ratio[0], 30))
      assert len(wide) == 5  # 1 % of 512
      np.testing.assert_allclose(ratio[:, wide], 30, rtol=1e-5)
      behind = name.replace(first, second)
      rows = large[behind] / plain[behind]
      np.testing.assert_allclose(rows[wide], 30**-0.5, rtol=1e-5)
      assert (np.delete(rows, wide, 0) == 1).all()
      assert (large[name.replace('kernel', 'bias')][wide] == 0).all()


def test_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="kind='x'.*'initial'"):
    gelu_cases.params_of(gelu_cases.model_of(1, side=8), 'x', 0)


def test_one_layer_of_two_halves():
  rng = np.random.default_rng(0)
  halves = [Case(*(rng.standard_normal((2, 3, width)) for _ in range(2)),
                 rng.standard_normal((width, 4))) for width in (2, 5)]
  found = gelu_cases.joined(*halves)
  np.testing.assert_allclose(
      found.x @ found.kernel, sum(one.x @ one.kernel for one in halves))
  assert found.given.shape == (2, 3, 7)


def test_a_table_has_means_and_deviations():
  figures = {('a', 'bits'): [4.0, 4.5], ('a', 'dB'): [1.0, 3.0],
             ('b', 'bits'): [4.0, 4.0], ('b', 'dB'): [2.0, 2.0]}
  assert gelu_inputs.table(figures).splitlines()[2:] == [
      '| a | 4.25 | 2.00 ± 1.41 |', '| b | 4.00 | 2.00 ± 0.00 |']


def test_statistics_by_hand():
  x = np.zeros((1, 4, 200), np.float32)
  x[..., 0] = [-3, 3, -3, 3]
  x[..., 1:] = np.float32([-1, 1, -1, 1])[:, None]
  found = gelu_cases.statistics(Case(x, x, None))
  assert found['minimum'] == -3 and found['below 0, %'] == 50
  assert found['kurtosis'] == pytest.approx(
      (81 + 199) / 200 / ((9 + 199) / 200)**2)
  # Of two channels, the widest 1 %, one has 3 times the median.
  assert found['widest 1 % of channels over the median'] == 2
  assert found['their share of the energy, %'] == pytest.approx(
      100 * (9 + 1) / (9 + 199))
