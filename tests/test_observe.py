"""What calibration keeps of the inputs of a model's layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax import diffusion
from msfp_jax.quant import observe
from msfp_jax.quant.observe import collect

KEY = jax.random.key(5)
ONE_STEP = diffusion.ddim_plan(tiny.SCHEDULE, 1)


class Clock(nn.Module):
  """A model whose one layer has the input t; it predicts no noise."""

  @nn.compact
  def __call__(self, x, t):
    return 0 * x + nn.Dense(1, name='clock')(t[:, None])[:, None, None]


class Pixels(nn.Module):
  """A model whose layers see the image, once doubled; it predicts no noise."""

  @nn.compact
  def __call__(self, x, t):
    return (nn.Dense(1, name='one')(x) + nn.Conv(1, (1, 1), name='two')(2 * x))


def run(model, batches, plan=tiny.PLAN, samples=1000):
  shapes = jax.eval_shape(model.init, KEY, batches[0], batches[0][:, 0, 0, 0])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes['params'])
  return collect(model, zeros, plan, batches, samples_per_layer=samples,
                 key=KEY)


def test_every_timestep_gives_equally_many():
  found = run(Clock(), [tiny.noise(0), tiny.noise(1)])
  assert list(found) == ['clock']
  values, counts = np.unique(found['clock'].values, return_counts=True)
  np.testing.assert_array_equal(values, [0, 250, 500, 750])
  assert len(set(counts)) == 1
  assert (found['clock'].minimum, found['clock'].maximum) == (0, 750)


@pytest.mark.parametrize('batches', [1, 3])
def test_samples_do_not_grow_with_the_batches(batches):
  found = run(Clock(), [tiny.noise(i) for i in range(batches)], samples=100)
  values = found['clock'].values
  assert values.dtype == np.float32
  # Up to one more for every step of every batch.
  assert 100 <= len(values) < 100 + tiny.PLAN.num_steps * batches


def test_samples_are_drawn_evenly_from_all_pixels_and_batches():
  batches = [jnp.arange(256.0).reshape(4, 8, 8, 1) + 256 * i for i in (0, 1)]
  found = run(Pixels(), batches, ONE_STEP, samples=512 * 40)
  values, counts = np.unique(found['one'].values, return_counts=True)
  np.testing.assert_array_equal(values, np.arange(512))
  assert counts[:256].sum() == counts[256:].sum() == 256 * 40
  # Binomial around 40, sd 6.3.
  assert 8 < counts.min() and counts.max() < 80
  assert 5.0 < counts.std() < 7.5


def test_extremes_are_over_all_values_of_all_steps():
  """Extremes are those at all steps; x is x_T sqrt(abar_t / abar_T) at t."""
  noise = np.array(tiny.noise(0))
  noise[1, 2, 3, 0], noise[2, 0, 0, 0] = 1000, -500
  found = run(Pixels(), [tiny.noise(1), jnp.asarray(noise)], samples=8)
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  growth = np.sqrt(bar[0] / bar[750])
  assert found['one'].maximum == pytest.approx(1000 * growth, rel=1e-4)
  assert found['one'].minimum == pytest.approx(-500 * growth, rel=1e-4)
  assert found['two'].maximum == pytest.approx(2000 * growth, rel=1e-4)
  assert np.abs(found['one'].values).max() < 500  # not in the sample


def test_the_same_key_gives_the_same_sample():
  one, two = (run(Pixels(), [tiny.noise(0)], ONE_STEP, 50) for _ in range(2))
  np.testing.assert_array_equal(one['one'].values, two['one'].values)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused(bad):
  noise = tiny.noise(0).at[1, 2, 3, 0].set(bad)
  with pytest.raises(ValueError, match='layer one got inputs.*NaN or inf'):
    run(Pixels(), [tiny.noise(1), noise], ONE_STEP, samples=8)


def test_no_batches_are_refused():
  with pytest.raises(ValueError, match='batches is empty'):
    collect(Clock(), {}, tiny.PLAN, iter([]), key=KEY)


@pytest.mark.parametrize('needs', [
    ('values',), ('rows',), ('channel_maxima',), ('gram',), ('extremes',), (),
    ('gram', 'rows')])
def test_only_what_is_asked_for_is_kept(needs):
  """Extremes cost nothing and are always there."""
  found = collect(
      Pixels(), {name: {'kernel': jnp.zeros(shape), 'bias': jnp.zeros(1)}
                 for name, shape in (('one', (1, 1)), ('two', (1, 1, 1, 1)))},
      ONE_STEP, [tiny.noise(0)], samples_per_layer=8, key=KEY, needs=needs)
  for seen in found.values():
    kept = {need for need in ('values', 'rows', 'channel_maxima', 'gram')
            if getattr(seen, need) is not None}
    assert kept == set(needs) - {'extremes'}
    assert seen.minimum < 0 < seen.maximum


def test_needs_that_nothing_gathers_are_refused():
  with pytest.raises(ValueError, match="'median'.*'extremes'.*'gram'"):
    collect(Pixels(), {}, ONE_STEP, [tiny.noise(0)], key=KEY,
            needs=('values', 'median'))


def test_no_two_layers_or_steps_share_positions():
  """All inputs are multiples of the noise, whose values tell the places."""
  plan = diffusion.ddim_plan(tiny.SCHEDULE, 2)
  noise = jnp.arange(1.0, 257).reshape(4, 8, 8, 1)
  found = run(Pixels(), [noise], plan, samples=80)
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[plan.timesteps]
  sampled = []
  for name, factor in (('one', 1), ('two', 2)):
    # [S, count]; eps is 0, and x at t is x_T sqrt(abar_t / abar_T).
    values = found[name].values.reshape(2, -1) / factor
    places = values / np.sqrt(bar / bar[0])[:, None]
    np.testing.assert_allclose(places, places.round(), rtol=1e-3)
    sampled += list(places.round())
  for i, one in enumerate(sampled):
    for two in sampled[:i]:
      assert (one == two).mean() < 0.1  # by chance 1 of 256


class Layers(nn.Module):
  """A convolution and a dense layer on the image; it predicts no noise."""

  options: dict

  @nn.compact
  def __call__(self, x, t):
    y = nn.Conv(2, (3, 2), name='conv', **self.options)(x)
    y = y.sum() + nn.Dense(2, name='dense')(x).sum()
    return 0 * x + y


class Wide(nn.Module):
  """One convolution of the image, of 64 channels; it predicts no noise."""

  @nn.compact
  def __call__(self, x, t):
    return 0 * x + nn.Conv(1, (3, 3), name='conv')(x)


# Options of nn.Conv, and (before, after) of both axes for NumPy.
CONVOLUTIONS = {
    'strides, padding on one side': (
        {'strides': (2, 1), 'padding': ((1, 0), (0, 2))}, ((1, 0), (0, 2))),
    'same': ({}, ((1, 1), (0, 1))),
    'dilated': ({'kernel_dilation': (1, 3), 'padding': 'VALID'},
                ((0, 0), (0, 0))),
}


def windows_by_hand(x, options, padding):
  """The inputs of every output `[N, 3 * 2 * C]`, in loops."""
  strides = options.get('strides', (1, 1))
  dilation = options.get('kernel_dilation', (1, 1))
  x = np.pad(x, ((0, 0), *padding, (0, 0)))
  reach = [(k - 1) * d + 1 for k, d in zip((3, 2), dilation, strict=True)]
  found = []
  for image in x:
    for i in range(0, x.shape[1] - reach[0] + 1, strides[0]):
      for j in range(0, x.shape[2] - reach[1] + 1, strides[1]):
        found.append([
            image[i + a * dilation[0], j + b * dilation[1], c]
            for a in range(3) for b in range(2) for c in range(x.shape[3])])
  return np.array(found)


@pytest.mark.parametrize('options, padding', CONVOLUTIONS.values(),
                         ids=CONVOLUTIONS)
def test_rows_maxima_and_gram_by_numpy(options, padding):
  """Over two steps and two batches; all places have room in the matrix."""
  plan = diffusion.ddim_plan(tiny.SCHEDULE, 2)
  rng = np.random.default_rng(0)
  batches = [jnp.asarray(rng.normal(size=(2, 6, 5, 3)) * (1, 20, 0.1),
                         jnp.float32) for _ in range(2)]
  model = Layers(options)
  params = jax.tree.map(
      lambda s: jnp.zeros(s.shape), jax.eval_shape(
          model.init, KEY, batches[0], jnp.zeros(2))['params'])
  found = collect(model, params, plan, batches, samples_per_layer=400, key=KEY,
                  needs=('rows', 'channel_maxima', 'gram'))
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[plan.timesteps]
  inputs = [np.float64(batch) * factor for batch in batches
            for factor in np.sqrt(bar / bar[0])]
  vectors = np.concatenate([x.reshape(-1, 3) for x in inputs])
  seen_by = {'dense': [x.reshape(-1, 3) for x in inputs],
             'conv': [windows_by_hand(x, options, padding) for x in inputs]}
  for name, windows in seen_by.items():
    seen = found[name]
    np.testing.assert_allclose(
        seen.channel_maxima, np.abs(vectors).max(0), rtol=1e-5)
    expected = np.mean([w.T @ w / len(w) for w in windows], axis=0)
    assert seen.gram.dtype == np.float64
    np.testing.assert_allclose(
        seen.gram, expected, rtol=1e-4, atol=1e-4 * expected.max())
    # 400 values are 34 vectors of 3 from every step of every batch.
    assert seen.rows.shape == (4 * 34, 3)
    apart = np.abs(seen.rows[:, None] - vectors).max(-1).min(-1)
    assert apart.max() < 1e-4 * np.abs(vectors).max()
    assert len(np.unique(seen.rows, axis=0)) > 60


def test_a_gram_matrix_of_many_places_is_sampled_without_bias(monkeypatch):
  """64 of 256 places: the mean of many steps comes near that of all."""
  monkeypatch.setattr(observe, '_GRAM_PLACES', 64)
  plan = diffusion.ddim_plan(tiny.SCHEDULE, 50)
  found = collect(Layers({}), {
      'conv': {'kernel': jnp.zeros((3, 2, 1, 2)), 'bias': jnp.zeros(2)},
      'dense': {'kernel': jnp.zeros((1, 2)), 'bias': jnp.zeros(2)},
  }, plan, [tiny.noise(0)], key=KEY, needs=('gram',))
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[plan.timesteps]
  x = np.float64(tiny.noise(0))
  expected = (x**2).mean() * (bar / bar[0]).mean()
  # The standard error of 50 x 64 squares of normal values is 2.5 %, and those
  # of late steps count for more.
  assert found['dense'].gram[0, 0] == pytest.approx(expected, rel=0.2)
  assert found['dense'].gram[0, 0] != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('options, padding', CONVOLUTIONS.values(),
                         ids=CONVOLUTIONS)
def test_a_sampled_place_is_one_of_the_windows(monkeypatch, options, padding):
  """Of one place the Gram matrix is the outer product of its window."""
  monkeypatch.setattr(observe, '_GRAM_PLACES', 1)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 5, 2)),
                  jnp.float32)
  windows = windows_by_hand(np.float64(x), options, padding)
  gather = jax.jit(lambda key: observe._gather(
      nn.Conv(2, (3, 2), **options), x, 0 * x, jnp.zeros(1, int), key,
      ('gram',)))
  drawn = set()
  for seed in range(6):
    gram = np.asarray(gather(jax.random.key(seed))['gram'])
    apart = [np.abs(np.outer(w, w) - gram).max() for w in windows]
    assert min(apart) < 1e-5
    drawn.add(int(np.argmin(apart)) // (len(windows) // 3))
  assert len(drawn) > 1  # images


def test_memory_of_a_gram_matrix_is_that_of_its_sample():
  """All windows of 3x3 would be nine inputs, of which there are 32 MB."""
  x, model = jax.ShapeDtypeStruct((8, 128, 128, 64), 'float32'), Wide()
  params = jax.eval_shape(model.init, KEY, x, jnp.zeros(8))['params']
  run = jax.jit(lambda params, x: observe.watch(
      model, ONE_STEP, 8, ('gram',), params, (x,), KEY))
  used = run.lower(params, x).compile().memory_analysis().temp_size_in_bytes
  size = 4 * 8 * 128 * 128 * 64
  inner = 9 * 64
  sample = 4 * (1024 * inner + inner**2)
  # No part is larger than the input; by the count of what has to be there.
  assert used < 2 * sample < size
