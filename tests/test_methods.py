"""Rows of a table: names, models, bits.

tests/experiment/ makes all of them of a finished run.
"""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import diffusion
from msfp_jax.base import errors
from msfp_jax.quant import recipes
from msfp_jax.quant import spec as spec_lib
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import methods


class Net(nn.Module):
  """A convolution and a dense layer, called as a UNet is."""

  @nn.compact
  def __call__(self, x, t):
    time = nn.Dense(1, name='temb')(t[:, None] / 1000)[:, None, None]
    return nn.Conv(1, (3, 3), name='conv_in')(x + time)


X, T = jax.random.normal(jax.random.key(5), (2, 8, 8, 1)), jnp.full((2,), 3.0)


class Fake:
  """What rows take of an experiment; `asked` is what was calibrated."""

  model = Net()
  params = Net().init(jax.random.key(0), X, T)['params']
  plan = diffusion.ddim_plan(diffusion.make_schedule(
      'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02), 2)
  quant = experiment_lib.QuantSettings('msfp', 4, 4, 'ends-8')
  finetune = types.SimpleNamespace(num_updates=3)

  def __init__(self):
    self.asked = []

  def calibrate(self, *asked):
    self.asked.append(asked)
    return spec_lib.QuantSpec(asked[0], dict.fromkeys(
        ('temb', 'conv_in'), spec_lib.LayerSpec('', '')))


def test_full_precision_is_the_model_and_has_its_bytes():
  row = methods.make_row(Fake(), 'fp', '')
  assert (row.name, row.weight_bits, row.act_bits) == ('fp', 32, 32)
  assert row.deployed.stored_bytes == 4 * (1 + 1 + 9 + 1)
  np.testing.assert_array_equal(
      row.deployed.eps_fn(X, T, 0),
      Net().apply({'params': Fake.params}, X, T))


@pytest.mark.parametrize('name, asked', [
    ('int', ('int', 4, 4)), ('msfp:w6a8', ('msfp', 6, 8)),
    ('msfp+gptq:w4a8', ('msfp+gptq', 4, 8))])
def test_a_recipe_may_carry_its_bits(name, asked):
  experiment = Fake()
  row = methods.make_row(experiment, name, '')
  assert experiment.asked == [asked]
  assert (row.name, row.weight_bits, row.act_bits) == (name, *asked[1:])
  assert row.spec.recipe == asked[0]


@pytest.mark.parametrize('name', ['tuned', 'packed'])
def test_rows_that_a_workdir_lacks(tmp_path, name):
  """Whether a row is made or only asked for."""
  with pytest.raises(errors.WorkdirError, match='train.py'):
    methods.make_row(Fake(), name, str(tmp_path))
  with pytest.raises(errors.WorkdirError, match='train.py'):
    methods.check_rows(('fp', name), str(tmp_path), 3)


@pytest.mark.parametrize('names, message', [
    (('fp', 'nope'), "'nope'.*'tuned'.*signed_fp"),
    (('msfp:w4a9',), "'w4a9'.*3 to 8"),
    (('fp:w4a4',), "'fp:w4a4'"),
    (('msfp+gptqq:w4a4',), r"'msfp\+gptqq:w4a4'.*gptq"),
    (('int', 'msfp', 'int'), r"\['int'\] more than once")])
def test_rows_that_there_are_not(names, message):
  with pytest.raises(ValueError, match=message):
    methods.check_rows(names, '', 3)


def test_rows_that_there_are():
  methods.check_rows(('fp', 'int', 'signed_fp', 'msfp', 'msfp:w6a6',
                      'msfp+gptq', 'nvfp4+gptq:w4a8'), '', 0)


def test_all_stands_for_every_recipe_once():
  every = tuple(recipes.RECIPES)
  assert methods.expand(('fp', 'all', 'packed')) == ('fp', *every, 'packed')
  assert methods.expand(('fp,msfp',)) == ('fp', 'msfp')
  assert methods.expand('fp, msfp:w6a6,') == ('fp', 'msfp:w6a6')
  assert methods.expand('fp,all,packed') == ('fp', *every, 'packed')
  found = methods.expand(('msfp', 'fp', 'all'))
  assert found[:2] == ('msfp', 'fp') and len(found) == len(every) + 1
  assert sorted(found) == sorted(('fp', *every))
  assert methods.expand(('all:w6a8',)) == tuple(
      f'{name}:w6a8' for name in every)
  assert methods.expand(('fp', 'tall', 'alle')) == ('fp', 'tall', 'alle')
  methods.check_rows(methods.expand(('all', 'all:w6a8')), '', 0)


def test_the_recipes_among_rows():
  assert methods.recipes_of(
      ('fp', 'tuned', 'int', 'packed', 'msfp:w6a6')) == ['int', 'msfp']
