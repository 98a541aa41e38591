"""What recipes share of one experiment."""

import dataclasses
import types

import numpy as np
import pytest

from configs import common
from msfp_jax.quant import recipes
from msfp_jax.quant.fit import EXTREMES
from msfp_jax.quant.fit import ROWS
from msfp_jax.quant.fit import VALUES
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.tune import finetune


@pytest.fixture
def looked(monkeypatch):
  """An experiment, and what the sampler ran for so far."""
  asked = []

  def collect(*unused, needs, **others):
    asked.append(set(needs))
    return {'layer': object()}

  monkeypatch.setattr(experiment_lib, 'collect', collect)
  config = common.get_config()
  settings = [kind(**config[part]) for kind, part in (
      (experiment_lib.CalibrationSettings, 'calibrate'),
      (experiment_lib.QuantSettings, 'quant'),
      (finetune.FinetuneSettings, 'finetune'))]
  model = types.SimpleNamespace(sample_shape=(2, 2, 1))
  plan = types.SimpleNamespace(num_steps=3)
  return experiment_lib.Experiment(
      model, {}, None, plan, (2, 2, 1), np.zeros((1, 2, 2, 1), np.uint8), 0,
      *settings), asked


def test_recipes_share_one_run_of_the_sampler(looked):
  """That of variants too, also where the first needs less than the others."""
  experiment, asked = looked
  names = ('int', 'msfp', 'nvfp4', 'hadamard')
  assert set(recipes.get('hadamard').needs) > {ROWS}
  experiment = experiment.looking_ahead(names)
  assert not asked
  other = experiment.variant(
      dataclasses.replace(experiment.quant, exceptions='skip-8'),
      experiment.finetune)
  seen = [one.seen(recipes.get(name).needs) for one in (experiment, other)
          for name in names]
  assert asked == [{EXTREMES, VALUES, ROWS}]
  assert all(one is seen[0] for one in seen)


def test_without_looking_ahead_only_what_is_needed_is_seen(looked):
  experiment, asked = looked
  experiment.seen(recipes.get('msfp').needs)
  assert asked == [{EXTREMES, VALUES}]


def test_an_unknown_recipe_is_named(looked):
  with pytest.raises(ValueError, match="'nope'.*msfp"):
    looked[0].looking_ahead(['msfp', 'nope'])
