"""SVDQuant: smoothing by search, a branch for what its quantizer leaves."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from scipy import linalg
import tiny

import msfp_jax as msfp
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import block_formats
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import interception
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant import svdquant
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import Trial
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.svdquant import SVDQuant

CHANNELS, OUT = 32, 24
SHAPES = {'dense': (CHANNELS, OUT), 'conv': (3, 3, CHANNELS, OUT)}
INT4 = block_formats.int_group(4)


def restored(x, axis):
  return np.asarray(fit_lib.restored(INT4, x, axis))


def trial_of(kernel, rows, bits=4):
  seen = Seen(rows=rows, minimum=float(rows.min()), maximum=float(rows.max()),
              channel_maxima=np.abs(rows).max(0))
  return Trial(seen, kernel, lambda w: restored(w, -2),
               lambda seen: restored(seen.rows, -1), bits)


@functools.cache
def trial(kind, bits=4):
  """A layer with outliers: one channel of its inputs, one vector of weights."""
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(300, CHANNELS)).astype(np.float32)
  rows[:, 5] *= 30
  shape = SHAPES[kind]
  strong = rng.normal(size=(*shape[:-1], 1)) * rng.normal(size=OUT)
  return trial_of(
      np.float32(rng.normal(size=shape) + 4 * strong), rows, bits)


@pytest.fixture(scope='module', params=['randomized', 'exact'])
def course(request):
  """(trial, smoothing, [(error, around)]) of all iterations of a layer."""
  finder, one = SVDQuant(rank=4, svd=request.param), trial('conv')
  smoothed = finder.search(one, 4)
  return one, smoothed, list(finder.branches(one, smoothed, 4))


def test_errors_fall_from_branch_to_branch_until_the_last(course):
  """And each branch is the best for what the quantizer did to the one before.

  By scipy's SVD in float64; its next branch would bring no more, which is why
  this one was the last.
  """
  one, smoothed, found = course
  errors = [error for error, _ in found]
  assert len(found) > 2 and (np.diff(errors) < 0).all()
  moved = np.float64(one.kernel) * np.float64(smoothed.smooth)[:, None]
  target = moved
  for error, around in found:
    assert one.error(around) == pytest.approx(error, rel=1e-4)
    flat = target.reshape(-1, OUT)
    u, s, v = linalg.svd(flat, full_matrices=False)
    branch = np.float64(around.down).reshape(-1, 4) @ np.float64(around.up)
    assert linalg.norm(flat - branch) <= 1.01 * linalg.norm(s[4:])
    residual = moved - branch.reshape(moved.shape)
    target = moved - restored(np.float32(residual), -2)
  u, s, v = linalg.svd(target.reshape(-1, OUT), full_matrices=False)
  down = (u[:, :4] * s[:4]).reshape(*moved.shape[:-1], 4)
  following = smoothed.replace(down=np.float32(down), up=np.float32(v[:4]))
  # A branch that is not rounded to 16 bits is another by a little.
  assert one.error(following) > 0.98 * errors[-1]


def test_the_number_of_iterations_has_a_limit():
  one = trial('conv')
  smoothed = SVDQuant().search(one, 4)
  assert len(list(SVDQuant(iterations=2).branches(one, smoothed, 4))) == 2


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('svd', ['randomized', 'exact'])
def test_the_output_has_less_error_than_without(kind, svd):
  """Than plain INT4, than smoothing alone and than the branch alone."""
  one = trial(kind)
  finder = SVDQuant(svd=svd)
  found = finder(one)
  assert found.down.shape == (*SHAPES[kind][:-1], found.up.shape[0])
  assert found.down.dtype == found.up.dtype == ml_dtypes.bfloat16
  others = {'plain': Around(), 'smoothed': found.replace(down=None, up=None),
            'branch': min(finder.branches(
                one, Around(), found.up.shape[0]), key=lambda pair: pair[0])[1]}
  for name, other in others.items():
    assert one.error(found) < 0.9 * one.error(other), name


@pytest.mark.parametrize('kind', SHAPES)
def test_full_precision_is_left_as_it_is(kind):
  """x W = (x / s) (W' + A B), in float64."""
  one = trial(kind)
  found = SVDQuant()(one)
  smooth = np.float64(found.smooth)
  rows = np.float64(one.seen.rows)
  branch = np.float64(found.down) @ np.float64(found.up)
  whole = np.float64(found.residual(one.kernel)) + branch
  expected = rows @ np.float64(one.kernel)
  np.testing.assert_allclose(
      (rows / smooth) @ whole, expected, rtol=1e-5,
      atol=1e-6 * np.abs(expected).max())


def test_the_quick_svd_costs_little():
  """Against the exact one: of the smoothing that both search alike."""
  for kind in SHAPES:
    one = trial(kind)
    quick, exact = (one.error(SVDQuant(svd=svd)(one))
                    for svd in ('randomized', 'exact'))
    assert quick < 1.05 * exact


def test_smoothing_factors_are_the_papers():
  rng = np.random.default_rng(1)
  maxima = np.exp(rng.normal(size=6))
  kernel = rng.normal(size=(3, 3, 6, 2))
  weights = [np.abs(kernel[:, :, c]).max() for c in range(6)]
  first, *found = svdquant.factors(maxima, kernel)
  assert first is None
  powers = [(a / 20, b) for a in range(1, 20) for b in (0, 1 - a / 20)]
  assert len(found) == len(powers) == 38
  for smooth, (alpha, beta) in zip(found, powers, strict=True):
    np.testing.assert_allclose(
        smooth, [maxima[c]**alpha / weights[c]**beta for c in range(6)],
        rtol=1e-5)


def test_the_search_takes_the_smoothing_of_least_error():
  """Without a branch, against every candidate by itself."""
  one = trial('dense')
  found = SVDQuant().search(one, 0)
  errors = [one.error(Around(smooth=smooth)) for smooth in svdquant.factors(
      one.seen.channel_maxima, one.kernel)]
  assert one.error(found) == min(errors) < errors[0]


def test_channels_of_zeros_get_the_factors_of_the_least():
  maxima = np.float32([0, 1e-30, 4, 0.5])
  kernel = np.float32([[1, -2], [0.25, 0.5], [0, 0], [1e-38, 0]])
  for smooth in list(svdquant.factors(maxima, kernel))[1:]:
    assert np.isfinite(smooth).all() and (smooth > 0).all()
  no_beta = list(svdquant.factors(maxima, kernel))[1]
  assert no_beta[0] == no_beta[1]
  nothing = list(svdquant.factors(np.zeros(3), np.zeros((3, 2))))
  np.testing.assert_array_equal(nothing[1:], np.ones((38, 3)))


@pytest.mark.parametrize('dead', ['input', 'weights', 'both'])
def test_layers_with_dead_channels(dead):
  rng = np.random.default_rng(2)
  rows = rng.normal(size=(50, CHANNELS)).astype(np.float32)
  kernel = rng.normal(size=(CHANNELS, OUT)).astype(np.float32)
  if dead != 'weights':
    rows[:, :3] = 0
  if dead != 'input':
    kernel[2:5] = 0
  one = trial_of(kernel, rows)
  found = SVDQuant()(one)
  assert not found.flaws(CHANNELS)
  assert one.error(found) <= one.error(Around())


@pytest.mark.parametrize('shape, rank', [
    ((3072, 3072), 32), ((640, 640), 32), ((256, 256), 16), ((3, 3, 64, 64), 7),
    ((3, 3, 1, 16), 0), ((1, 1, 16, 32), 1), ((1, 4000), 0), ((4000, 1), 0)])
def test_a_branch_is_no_heavier_than_its_share(shape, rank):
  """Counted by the bits of what is stored, codes and branch."""
  assert SVDQuant().rank_of(shape, 4) == rank
  inner, outer = int(np.prod(shape[:-1])), shape[-1]
  bits = lambda rank: Around(
      down=np.zeros((*shape[:-1], rank), np.float16),
      up=np.zeros((rank, outer), np.float16)).nbits
  assert bits(rank) <= 0.5 * 4 * inner * outer
  assert rank == 32 or bits(rank + 1) > 0.5 * 4 * inner * outer


@pytest.mark.parametrize('shape', [(1, 1, 1, 8), (1, 7), (7, 1), (3, 3, 1, 2)])
def test_small_layers_have_the_rank_that_they_can(shape):
  rng = np.random.default_rng(3)
  kernel = rng.normal(size=shape).astype(np.float32)
  one = trial_of(kernel, rng.normal(size=(40, shape[-2])).astype(np.float32))
  finder = SVDQuant(share=1e6)
  assert finder.rank_of(shape, 4) == min(np.prod(shape[:-1]), shape[-1])
  # All of the weights fit into the branch.
  assert one.error(finder(one)) < 1e-4 * one.error(Around())
  assert SVDQuant()(one).down is None


def test_layers_of_eight_bits_stay_as_they_are():
  assert SVDQuant()(trial('dense', bits=8)) == Around()
  assert SVDQuant()(trial('dense', bits=6)).down is not None


@pytest.mark.parametrize('name, value', [
    ('rank', 0), ('rank', -1), ('rank', 2.0), ('iterations', 0), ('share', 0),
    ('svd', 'fast'), ('dtype', 'float32')])
def test_what_there_cannot_be_is_refused(name, value):
  with pytest.raises(ValueError, match=f'{name}={value!r}: must be'):
    SVDQuant(**{name: value})


def test_inputs_that_are_never_negative_get_all_levels():
  x = np.abs(np.random.default_rng(4).normal(size=(20, 64))).astype(np.float32)
  recipe = recipes.get('svdquant')
  errors = []
  for low in (0.0, -0.1):
    quantizer = fit_lib.fit(
        recipe.nal, Seen(minimum=low, maximum=3.0), 4, -1).quantizer
    tensor = quantizer.quantize(x)
    assert tensor.zero_point is None and tensor.fmt.signed == (low < 0)
    errors.append(fit_lib.error_of(quantizer, x, -1))
  assert errors[0] < 0.3 * errors[1]


def test_negative_values_that_no_row_holds_stay_known_once_smoothed():
  rows = np.ones((5, 2), np.float32)
  around = Around(smooth=np.float32([2, 4]))
  assert around.seen(Seen(rows=rows, minimum=-1.0, maximum=1.0)).minimum < 0
  assert around.seen(Seen(rows=rows, minimum=0.5, maximum=1.0)).minimum > 0


ROOMY = msfp.Recipe(
    recipes.get('svdquant').weight, recipes.get('svdquant').nal,
    recipes.get('svdquant').aal, SVDQuant(rank=2, share=10))


def calibrated(recipe, monkeypatch):
  """A spec of the tiny net, whose layers get branches by `ROOMY` alone."""
  monkeypatch.setitem(msfp.RECIPES, 'roomy', ROOMY)
  return msfp.calibrate(
      tiny.NET, tiny.params(tiny.NET), recipe=recipe, bits=4,
      batches=[tiny.noise(0)], plan=tiny.PLAN, roles=tiny.NET_ROLES,
      exceptions={'out': 8})


@pytest.mark.slow
def test_a_packed_file_is_the_simulation_and_counts_every_bit(
    monkeypatch, tmp_path):
  spec = calibrated('roomy', monkeypatch)
  params = tiny.params(tiny.NET)
  msfp.save(tmp_path / 'net.safetensors',
            msfp.pack(tiny.NET, params, spec, tiny.PLAN))
  packed = msfp.load(tmp_path / 'net.safetensors', model=tiny.NET)
  simulated = packed_lib.simulate(tiny.NET, params, spec, tiny.PLAN)
  np.testing.assert_array_equal(
      packed.sample(tiny.noise(1)), simulated.sample(tiny.noise(1)))
  assert packed.layers['conv_out'].around == Around()
  for name, kernel in interception.leaves(params, 'kernel').items():
    layer = packed.layers[name]
    codes = (8 if name == 'conv_out' else 4) * kernel.size
    scales = 16 * kernel.size // kernel.shape[-2]  # a group: all of the inputs
    bias = 32 * kernel.shape[-1]
    inner, outer = kernel.size // kernel.shape[-1], kernel.shape[-1]
    branch = 0 if name == 'conv_out' else 2 * 16 * (inner + outer)
    smooth = (0 if layer.around.smooth is None else 32 * kernel.shape[-2])
    assert layer.nbits == codes + scales + bias + branch + smooth, name


@pytest.mark.slow
def test_the_same_spec_twice(monkeypatch):
  first, again = (calibrated('roomy', monkeypatch).to_json() for _ in range(2))
  assert first == again


@pytest.fixture(scope='module')
def digits():
  """(kernels, what was seen of 4-bit layers, once more from other noise)."""
  model, params = msfp.load_pretrained('digits16')
  plan = msfp.make_plan(tiny.SCHEDULE, 'ddim', num_steps=10)
  needs = recipes.get('svdquant').needs
  seen = [observe.collect(
      model, params, plan, [jax.random.normal(
          jax.random.key(seed), (32, 16, 16, 1))],
      key=jax.random.key(seed), needs=needs) for seed in (0, 1)]
  kernels = jax.device_get(interception.leaves(
      interception.parameters(params), 'kernel'))
  return model, params, plan, kernels, seen


@pytest.fixture(scope='module')
def digits_spec(digits):
  model, params, _, _, (seen, _) = digits
  return msfp.calibrate(model, params, recipe='svdquant', activations=seen)


@pytest.mark.long
def test_every_layer_of_digits_loses_less_than_by_blocks_alone(
    digits, digits_spec):
  """On the inputs that it was fitted to, and on those of other noise."""
  _, _, _, kernels, (seen, other) = digits
  quantized = {name: layer for name, layer in digits_spec.layers.items()
               if layer.weight.bits == 4}
  assert len(quantized) == 61
  quantizer = recipes.get('int4_group').weight.make(4)
  back = lambda x, axis: np.asarray(fit_lib.restored(quantizer, x, axis))
  for name, layer in quantized.items():
    for rows in (seen[name], other[name]):
      trial = Trial(rows, kernels[name], lambda w: back(w, -2),
                    lambda seen: back(seen.rows, -1))
      assert trial.error(layer.around) < trial.error(Around()), name


@pytest.mark.long
def test_digits_from_calibration_to_a_file_that_samples(
    digits, digits_spec, tmp_path):
  model, params, plan, _, _ = digits
  msfp.save(tmp_path / 'digits.safetensors',
            msfp.pack(model, params, digits_spec, plan))
  noise = jax.random.normal(jax.random.key(2), (8, 16, 16, 1))
  packed = msfp.load(tmp_path / 'digits.safetensors')
  simulated = packed_lib.simulate(model, params, digits_spec, plan)
  np.testing.assert_array_equal(packed.sample(noise), simulated.sample(noise))
  branches = [layer.around.down is not None for layer in packed.layers.values()]
  assert sum(branches) == 61
