"""Images from a model, in batches."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import diffusion
from msfp_jax.diffusion import conditions
from msfp_jax.metrics import features
from msfp_jax.run import generate

KEY = jax.random.key(5)
SHAPE = (8, 8, 1)
PLAN = diffusion.ddim_plan(diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02), 4,
                           eta=1.0)  # adds noise at every step


@dataclasses.dataclass(frozen=True)
class Model:
  """Predicts a multiple of x, of each step its own, plus the labels."""

  arrays: jax.Array = dataclasses.field(
      default_factory=lambda: jnp.linspace(0.5, 0.9, PLAN.num_steps))

  def with_arrays(self, arrays):
    return Model(arrays)

  def eps_fn_of(self, *labels):
    return lambda x, t, index: self.arrays[index] * x + sum(
        label[:, None, None, None] for label in labels)

  def memory(self, noise, *labels):
    del noise, labels


def generated(count=8, batch=4, model=None, **options):
  drawer = generate.Drawer(model or Model(), PLAN, batch, SHAPE)
  return generate.generate(drawer, count, KEY, **options)


@pytest.fixture(scope='module')
def images():
  return generated()


def test_images_are_uint8_and_differ(images):
  assert images.shape == (8, *SHAPE) and images.dtype == np.uint8
  assert len({image.tobytes() for image in images}) == 8


def test_the_same_key_gives_the_same_bytes(images):
  assert generated().tobytes() == images.tobytes()


@pytest.mark.parametrize('count', [1, 4, 5])
def test_a_partial_last_batch_changes_no_image(images, count):
  np.testing.assert_array_equal(generated(count), images[:count])


@pytest.mark.parametrize('classes', [None, 30])
def test_start_steps_and_labels_have_keys_of_their_own(classes):
  """Of a batch's key: 0, 1, which folds the step's index, and 2."""
  drawn = []
  draw = conditions.classes(classes) if classes else conditions.none

  def decode(x):  # sees samples before they are cut to 8 bits
    drawn.append(np.asarray(x))
    return x

  drawer = generate.Drawer(Model(), PLAN, 2, SHAPE, draw)
  for _ in generate.batches(drawer, (0, 3), KEY, decode=decode):
    pass
  for number, found in zip((0, 3), drawn, strict=True):
    key = jax.random.fold_in(KEY, number)
    normal = lambda key: np.float64(jax.random.normal(key, (2, *SHAPE)))
    x, labels = normal(jax.random.fold_in(key, 0)), 0
    if classes:
      labels = np.float64(jax.random.randint(
          jax.random.fold_in(key, 2), (2,), 0, classes))[:, None, None, None]
    for i, multiple in enumerate(np.float64(Model().arrays)):
      noise = normal(jax.random.fold_in(jax.random.fold_in(key, 1), i))
      x = (PLAN.x_coef[i] * x - PLAN.eps_factor[i] * (multiple * x + labels)
           + PLAN.noise_std[i] * noise)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


def test_samples_are_cut_to_bytes_after_they_are_decoded():
  halves = generated(4, decode=lambda x: jnp.tile(0.5 * jnp.clip(x, -1, 1), 3))
  assert halves.shape == (4, 8, 8, 3)
  assert 60 < halves.min() < 70 and 185 < halves.max() < 195


def test_nan_is_refused():
  bad = Model(jnp.full(PLAN.num_steps, np.nan))
  with pytest.raises(ValueError, match='wide: 256 of 256 .* batch 0 are NaN'):
    generated(model=bad, name='wide')


def test_an_image_that_is_decoded_to_infinity_is_refused():
  with pytest.raises(ValueError, match='256 of 256 .* infinite'):
    generated(decode=lambda x: x / 0.0)


@pytest.mark.parametrize('count, batch, message', [
    (0, 4, 'num_samples=0, batch_size=4: must be at least 1'),
    (-1, 4, 'num_samples=-1, batch_size=4: must be at least 1'),
    (4, 0, 'batch_size=0: must be')])
def test_no_samples(count, batch, message):
  with pytest.raises(ValueError, match=message):
    generated(count, batch)


ON_FOUR_DEVICES = """
import sys
import jax, numpy as np
from msfp_jax.metrics import features
import test_generate
assert jax.device_count() == 4
devices = []
def note(x):
  devices.append((len(x.sharding.device_set), x.sharding.is_fully_replicated))
  return x
images = test_generate.generated(10, 8, decode=note)
assert devices == [(4, False)] * 2
seen = features.get(
    'random', test_generate.SHAPE).outputs(images).features
np.savez(sys.argv[1], images=images, seen=seen)
try:
  test_generate.generated(10, 6)
  sys.exit('a batch of 6 was split over 4 devices')
except ValueError as error:
  assert 'batch_size=6: must be a multiple of 4, the parts' in str(error)
"""


@pytest.mark.slow
def test_batches_are_split_over_all_devices(tmp_path):
  path = tmp_path / 'found.npz'
  tests = pathlib.Path(__file__).parent
  subprocess.run(
      [sys.executable, '-c', ON_FOUR_DEVICES, path], check=True,
      env=os.environ | {
          'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': f'{tests.parent}:{tests}',
          'XLA_FLAGS': '--xla_force_host_platform_device_count=4'})
  images = generated(10, 8)
  with np.load(path) as found:
    # Other programs may round differently.
    assert np.abs(found['images'].astype(int) - images).max() <= 1
    assert (found['images'] != images).mean() < 0.01
    np.testing.assert_allclose(
        found['seen'], features.get('random', SHAPE).outputs(
            found['images']).features, rtol=1e-5, atol=1e-5)


def test_seconds_are_those_of_a_typical_batch_without_compiling(monkeypatch):
  """By a clock that tells 100 seconds for the first batch, then 2, 4, 90."""
  spent = iter([0, 100, 200, 202, 300, 304, 400, 490, 500, 506])
  monkeypatch.setattr(generate.time, 'perf_counter', lambda: next(spent))
  drawer = generate.Drawer(Model(), PLAN, 4, SHAPE)
  drawer(KEY)
  assert drawer.seconds_per_image(KEY) == 4 / 4
  # What is drawn for other ends counts as well.
  drawer(KEY)
  assert drawer.seconds_per_image(KEY) == (4 + 6) / 2 / 4
