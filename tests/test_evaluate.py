"""Sampling at scale, scores, sizes and the table."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from msfp_jax import diffusion
from msfp_jax import evaluate
from msfp_jax import experiment as experiment_lib
from msfp_jax import layers as layers_lib
from msfp_jax import quantizers
from msfp_jax import spec as spec_lib
from msfp_jax import student as student_lib
from msfp_jax.formats import FPFormat
from msfp_jax.metrics import collect
from msfp_jax.metrics import scorer as scorer_lib

SHAPE = (8, 8, 1)
KEY = jax.random.key(5)


class Toy(nn.Module):
  """Three layers, called as a UNet is."""

  @nn.compact
  def __call__(self, x, t):
    h = nn.Conv(4, (3, 3), name='conv_in')(x)
    time = jnp.stack([t, 1000 - t], axis=-1) / 1000
    h = h + nn.Dense(4, name='temb')(time)[:, None, None]
    return nn.Conv(x.shape[-1], (3, 3), name='conv_out')(nn.silu(h))


@pytest.fixture(scope='module')
def plan():
  config = common.get_config()
  config.sampler.num_steps = 2
  config.sampler.eta = 0.5
  schedule = diffusion.make_schedule(**config.schedule)
  return diffusion.make_plan(schedule, **config.sampler)


@pytest.fixture(scope='module')
def params():
  return Toy().init(jax.random.key(0), jnp.zeros((1, *SHAPE)),
                    jnp.zeros((1,)))['params']


def quantizer(fmt, channels=None, zero_point=None):
  shape = () if channels is None else (1, 1, 1, channels)
  return quantizers.Quantizer(
      FPFormat.parse(fmt), jnp.full(shape, 0.25), zero_point)


def layer(weight, act):
  return spec_lib.LayerSpec('', '', weight, act)


@pytest.fixture(scope='module')
def deployed(params):
  """Two banks of 4 bits, one layer as it was, one of 3 bits."""
  spec = spec_lib.QuantSpec('by hand', {
      'conv_in': layer(quantizer('E2M1', 4),
                       quantizer('UE2M2', zero_point=jnp.float32(-0.25))),
      'temb': layer(None, None),
      'conv_out': layer(quantizer('E1M1', 1), quantizer('E2M1'))})
  kernels = layers_lib.leaves(params, 'kernel')
  weights = {name: kernel[None] for name, kernel in kernels.items()}
  first = kernels['conv_in']
  weights['conv_in'] = jnp.stack([first, -first])
  return student_lib.Deployed(
      Toy(), params, spec, weights, {'conv_in': jnp.asarray([0, 1])})


@pytest.fixture(scope='module')
def images(deployed, plan):
  return evaluate.generate(deployed, plan, 8, 4, SHAPE, KEY)


def test_images_are_uint8_and_differ(images):
  assert images.shape == (8, *SHAPE) and images.dtype == np.uint8
  assert len({image.tobytes() for image in images}) == 8


def test_the_same_key_gives_the_same_bytes(images, deployed, plan):
  again = evaluate.generate(deployed, plan, 8, 4, SHAPE, KEY)
  assert again.tobytes() == images.tobytes()


@pytest.mark.parametrize('count', [1, 4, 5])
def test_a_partial_last_batch_changes_no_image(images, deployed, plan, count):
  some = evaluate.generate(deployed, plan, count, 4, SHAPE, KEY)
  np.testing.assert_array_equal(some, images[:count])


def test_all_models_start_from_the_same_noise(images, deployed, plan):
  """Two models of equal weights, one of them with banks, draw the same."""
  first = deployed.weights['conv_in'][:1]
  single = dataclasses.replace(
      deployed, weights=deployed.weights | {'conv_in': first}, choices={})
  double = dataclasses.replace(
      deployed, weights=deployed.weights | {
          'conv_in': jnp.concatenate([first, first])})
  draw = lambda model: evaluate.generate(model, plan, 4, 4, SHAPE, KEY)
  # Two programs, which may round differently.
  assert np.abs(draw(single).astype(int) - draw(double)).max() <= 1
  assert not np.array_equal(draw(single), images[:4])


def test_nan_is_refused(deployed, plan):
  bad = dataclasses.replace(
      deployed, weights=jax.tree.map(lambda w: w * np.nan, deployed.weights))
  with pytest.raises(ValueError, match='wide: 256 of 256 .* batch 0 are NaN'):
    evaluate.generate(bad, plan, 8, 4, SHAPE, KEY, 'wide')


@pytest.mark.parametrize('count, batch', [(0, 4), (-1, 4), (4, 0)])
def test_no_samples(deployed, plan, count, batch):
  with pytest.raises(ValueError, match=f'num_samples={count}, '
                     f'batch_size={batch}: must be at least 1'):
    evaluate.generate(deployed, plan, count, batch, SHAPE, KEY)


def test_packed_bytes_by_hand(deployed):
  conv_in = 2 * 36 * 4 // 8 + 4 * 4 + 4 * 4 + 4 + 4  # scales, biases, s, z
  temb = 4 * (8 + 4)  # full precision
  conv_out = 14 + 4 + 4 + 4  # 36 x 3 bits are 13.5 bytes; scale, bias, s
  assert evaluate.packed_bytes(deployed) == conv_in + temb + conv_out


def test_full_precision_has_the_bytes_of_its_parameters(params, plan):
  experiment = types.SimpleNamespace(model=Toy(), params=params, plan=plan)
  full = evaluate.untuned(experiment, None)
  assert evaluate.packed_bytes(full) == 4 * sum(
      leaf.size for leaf in jax.tree.leaves(params))
  x = jax.random.normal(KEY, (2, *SHAPE))
  t = jnp.full((2,), 3.0)
  np.testing.assert_array_equal(
      full.eps_fn(x, t, 0), Toy().apply({'params': params}, x, t))


def smooth(count, seed, size=8):
  rng = np.random.default_rng(seed)
  grid = np.linspace(0, np.pi, size)
  a = rng.uniform(0.5, 3, (4, count, 1, 1, 1))
  x = np.sin(a[0] * grid[:, None, None] + a[1]) * np.cos(
      a[2] * grid[:, None] + a[3])
  return np.round((x + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope='module')
def scores():
  """Scores of three sets: the data itself, itself again, and others."""
  scorer = scorer_lib.Scorer(smooth(200, 0), 'random')
  return scorer, [scorer.score(smooth(200, seed)) for seed in (0, 0, 1)]


def test_the_first_call_is_the_reference(scores):
  scorer, (first, same, other) = scores
  assert scorer.metric == 'fd_random'
  assert list(first) == ['fd_random']
  assert list(same) == list(other) == [
      'fd_random', 'fd_random_to_fp', 'psnr_to_fp']
  assert same['psnr_to_fp'] == 100
  assert abs(same['fd_random_to_fp']) < 1e-6
  assert other['psnr_to_fp'] < 30 and other['fd_random_to_fp'] > 1e-3


def test_the_reference_stays_the_first(scores):
  _, (first, same, other) = scores
  assert abs(first['fd_random']) < 1e-6
  assert same['fd_random'] == first['fd_random']
  # The data are the reference's images here.
  assert other['fd_random'] == pytest.approx(other['fd_random_to_fp'])


def test_digits_are_also_classified():
  images = smooth(140, 0, 16)
  scorer = scorer_lib.Scorer(images, 'digits')
  first, second = scorer.score(images), scorer.score(images)
  assert list(first) == ['fd_digits', 'confidence', 'class_balance']
  assert second['label_agreement'] == 1
  assert second.keys() - first.keys() == {
      'fd_digits_to_fp', 'psnr_to_fp', 'label_agreement'}


class Counted:
  """Images of which only so many may be asked for at once."""

  def __init__(self, images):
    self.images, self.shape, self.asked = images, images.shape, []

  def __len__(self):
    return len(self.images)

  def __getitem__(self, rows):
    self.asked.append(rows)
    return self.images[rows]


def test_the_data_are_read_in_chunks(monkeypatch, caplog):
  images = smooth(600, 0)
  whole = scorer_lib.Scorer(images, 'random').score(images[:300])
  monkeypatch.setattr(collect, '_CHUNK_BYTES', 1)  # a network's batch
  counted = Counted(images)
  with caplog.at_level('INFO', 'absl'):
    scorer = scorer_lib.Scorer(counted, 'random')
  assert counted.asked == [slice(i, i + 256) for i in (0, 256, 512)]
  assert 'fd_random 600/600 (100%)' in caplog.text
  assert scorer.score(images[:300]) == pytest.approx(whole)


def test_features_that_do_not_fit_the_data():
  with pytest.raises(ValueError, match="'digits' takes.*use 'random'"):
    scorer_lib.Scorer(smooth(4, 0), 'digits')
  with pytest.raises(ValueError, match="'nope': must be one of"):
    scorer_lib.Scorer(smooth(4, 0), 'nope')


def fake_experiment(num_updates=3):
  config = common.get_config()
  config.finetune.num_updates = num_updates
  return types.SimpleNamespace(config=config)


@pytest.mark.parametrize('num_updates', [0, 3])
def test_tuned_needs_a_finished_training(tmp_path, num_updates):
  (tmp_path / 'checkpoints/2').mkdir(parents=True)
  with pytest.raises(experiment_lib.WorkdirError) as error:
    evaluate.make_row(fake_experiment(num_updates), 'tuned', str(tmp_path))
  assert str(tmp_path) in str(error.value)
  assert 'run train.py' in str(error.value)
  assert 'config.eval.rows' in str(error.value)


def test_a_finished_training_is_found(tmp_path):
  (tmp_path / 'checkpoints/3').mkdir(parents=True)
  evaluate.check_trained(fake_experiment().config, str(tmp_path))


@pytest.mark.parametrize('name, asked', [
    ('int', ('int', 4, 4)), ('msfp:w6a8', ('msfp', 6, 8))])
def test_a_recipe_may_carry_its_bits(monkeypatch, name, asked):
  experiment = fake_experiment()
  experiment.calibrate = lambda *args: args
  monkeypatch.setattr(evaluate, 'untuned', lambda experiment, spec: spec)
  row = evaluate.make_row(experiment, name, '')
  assert row.deployed == asked
  assert (row.name, row.weight_bits, row.act_bits) == (name, *asked[1:])


def test_bits_of_a_row_that_there_are_not():
  with pytest.raises(ValueError, match="'w4a9'.*3 to 8"):
    evaluate.make_row(fake_experiment(), 'msfp:w4a9', '')


def test_the_table_is_aligned_and_empty_where_nothing_was_computed():
  results = {'rows': [
      {'name': 'fp', 'weight_bits': 32, 'fd': 1.23456, 'bytes': 2597316},
      {'name': 'tuned', 'weight_bits': 4, 'fd': 12345.6, 'psnr': 20.0,
       'bytes': 400}]}
  assert evaluate.table(results).splitlines() == [
      '| name  | weight_bits | fd    | bytes     | psnr   |',
      '|-------|-------------|-------|-----------|--------|',
      '| fp    | 32          | 1.235 | 2,597,316 |        |',
      '| tuned | 4           | 12346 | 400       | 20.000 |']
