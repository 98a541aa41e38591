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
import toy

from msfp_jax import diffusion
from msfp_jax.diffusion import conditions
from msfp_jax.metrics import features
from msfp_jax.run import generate

KEY = jax.random.key(5)


@pytest.fixture(scope='module')
def plan():
  return toy.plan()


@pytest.fixture(scope='module')
def deployed():
  return toy.deployed()


@pytest.fixture(scope='module')
def images(deployed, plan):
  return generate.generate(deployed, plan, 8, 4, toy.SHAPE, KEY)


def test_images_are_uint8_and_differ(images):
  assert images.shape == (8, *toy.SHAPE) and images.dtype == np.uint8
  assert len({image.tobytes() for image in images}) == 8


def test_the_same_key_gives_the_same_bytes(images, deployed, plan):
  again = generate.generate(deployed, plan, 8, 4, toy.SHAPE, KEY)
  assert again.tobytes() == images.tobytes()


@pytest.mark.parametrize('count', [1, 4, 5])
def test_a_partial_last_batch_changes_no_image(images, deployed, plan, count):
  some = generate.generate(deployed, plan, count, 4, toy.SHAPE, KEY)
  np.testing.assert_array_equal(some, images[:count])


def test_all_models_start_from_the_same_noise(images, deployed, plan):
  """Two models of equal weights, one of them with banks, draw the same."""
  first = deployed.weights['conv_in'][:1]
  single = dataclasses.replace(
      deployed, weights=deployed.weights | {'conv_in': first}, choices={})
  double = dataclasses.replace(
      deployed, weights=deployed.weights | {
          'conv_in': jnp.concatenate([first, first])})
  draw = lambda model: generate.generate(model, plan, 4, 4, toy.SHAPE, KEY)
  # Two programs, which may round differently.
  assert np.abs(draw(single).astype(int) - draw(double)).max() <= 1
  assert not np.array_equal(draw(single), images[:4])


def test_nan_is_refused(deployed, plan):
  bad = dataclasses.replace(
      deployed, weights=jax.tree.map(lambda w: w * np.nan, deployed.weights))
  with pytest.raises(ValueError, match='wide: 256 of 256 .* batch 0 are NaN'):
    generate.generate(bad, plan, 8, 4, toy.SHAPE, KEY, 'wide')


class Half:
  """Predicts x / 2, plus the labels."""

  arrays = ()

  def with_arrays(self, arrays):
    del arrays
    return self

  def eps_fn(self, x, t, index, *labels):
    del t, index
    return 0.5 * x + sum(label[:, None, None, None] for label in labels)


@pytest.mark.parametrize('classes', [None, 30])
def test_start_steps_and_labels_have_keys_of_their_own(classes):
  """Of a batch's key: 0, 1, which folds the step's index, and 2."""
  schedule = diffusion.make_schedule(
      'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
  plan = diffusion.ddim_plan(schedule, 4, eta=1.0)
  drawn = []
  draw = conditions.classes(classes) if classes else conditions.none

  def decode(x):  # sees samples before they are cut to 8 bits
    drawn.append(np.asarray(x))
    return x

  for _ in generate.batches(Half(), plan, (0, 3), 2, toy.SHAPE, KEY,
                            draw_condition=draw, decode=decode):
    pass
  for number, found in zip((0, 3), drawn, strict=True):
    key = jax.random.fold_in(KEY, number)
    normal = lambda key: np.float64(jax.random.normal(key, (2, *toy.SHAPE)))
    x, labels = normal(jax.random.fold_in(key, 0)), 0
    if classes:
      labels = np.float64(jax.random.randint(
          jax.random.fold_in(key, 2), (2,), 0, classes))[:, None, None, None]
    for i in range(plan.num_steps):
      x = (plan.x_coef[i] * x - plan.eps_factor[i] * (0.5 * x + labels)
           + plan.noise_std[i] * normal(jax.random.fold_in(
               jax.random.fold_in(key, 1), i)))
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('count, batch', [(0, 4), (-1, 4), (4, 0)])
def test_no_samples(deployed, plan, count, batch):
  with pytest.raises(ValueError, match=f'num_samples={count}, '
                     f'batch_size={batch}: must be at least 1'):
    generate.generate(deployed, plan, count, batch, toy.SHAPE, KEY)


ON_FOUR_DEVICES = """
import sys
import jax, numpy as np, toy
from msfp_jax.run import generate
from msfp_jax.metrics import features
assert jax.device_count() == 4
key = jax.random.key(5)
devices = []
def note(x):
  devices.append((len(x.sharding.device_set), x.sharding.is_fully_replicated))
  return x
draw = lambda size: generate.generate(
    toy.deployed(), toy.plan(), 10, size, toy.SHAPE, key, decode=note)
images = draw(8)
assert devices == [(4, False)] * 2
seen = features.get('random', toy.SHAPE).outputs(images).features
np.savez(sys.argv[1], images=images, seen=seen)
try:
  draw(6)
  sys.exit('a batch of 6 was split over 4 devices')
except ValueError as error:
  assert 'batch_size=6: must be a multiple of the 4 devices' in str(error)
"""


@pytest.mark.slow
def test_batches_are_split_over_all_devices(tmp_path, deployed, plan):
  path = tmp_path / 'found.npz'
  tests = pathlib.Path(__file__).parent
  subprocess.run(
      [sys.executable, '-c', ON_FOUR_DEVICES, path], check=True,
      env=os.environ | {
          'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': f'{tests.parent}:{tests}',
          'XLA_FLAGS': '--xla_force_host_platform_device_count=4'})
  images = generate.generate(deployed, plan, 10, 8, toy.SHAPE, KEY)
  with np.load(path) as found:
    # Other programs may round differently.
    assert np.abs(found['images'].astype(int) - images).max() <= 1
    assert (found['images'] != images).mean() < 0.01
    np.testing.assert_allclose(
        found['seen'], features.get('random', toy.SHAPE).outputs(
            found['images']).features, rtol=1e-5, atol=1e-5)
