"""Students of a small net, and what some updates make of them."""

import dataclasses
import functools

import jax
import numpy as np
import tiny

from configs import common
from msfp_jax.tune import finetune
from msfp_jax.tune import losses

GAMMA = tuple(losses.denoising_factors(tiny.SCHEDULE, tiny.PLAN, 'sampler'))


def settings_of(**options):
  """Two banks and all that can be learned, quickly; in batches of 4."""
  usual = finetune.FinetuneSettings(**common.get_config().finetune)
  return dataclasses.replace(usual, **{
      'batch_size': 4, 'num_updates': 200, 'num_banks': 2, 'rank': 4,
      'base_weight': 'full', 'learn_act_ranges': True,
      'learn_weight_scales': True, 'learn_biases': True,
      'learning_rate': 1e-2, 'router_learning_rate': 1e-3,
      'range_learning_rate': 1e-3, 'router_prior': 1.0,
      'weight_decay': 0.0} | options)


# Few, since each compiles for seconds.
PLAIN_LORA = {'num_banks': 1, 'learn_act_ranges': False,
              'learn_weight_scales': False, 'learn_biases': False,
              'gamma': (2.0, 1.0, 1.0, 0.0)}
DEQUANTIZED = {'num_banks': 3, 'base_weight': 'dequantized', 'seed': 9}


class Setup:
  """A student, its optimizer, its first state and its update."""

  def __init__(self, model, seed=4, gamma=GAMMA, recipe='msfp', **options):
    settings = settings_of(**options)
    key = jax.random.key(seed)
    self.params = tiny.params(model)
    self.student = finetune.make_student(
        model, self.params, tiny.spec(model, recipe),
        tiny.SCHEDULE.num_train_steps, settings)
    tx = finetune.optimizer(settings)
    self.start = jax.jit(lambda: finetune.init_state(
        self.student, tx, tiny.PLAN, tiny.IMAGE, key, settings))
    self.update = finetune.make_step(
        self.student, tiny.PLAN, np.array(gamma), tx, key)
    self.predict = jax.jit(self.student.predict)

  def run(self, updates, state=None):
    """Runs some updates; returns the state and their scalars."""
    state = self.start() if state is None else state
    scalars = []
    for _ in range(updates):
      state, seen = self.update(state)
      scalars.append(jax.device_get(seen))
    return state, scalars


@functools.cache
def net(**options):
  return Setup(tiny.NET, **options)


@functools.cache
def trained(**options):
  """Trains for 6 updates; returns what is trained, on the host."""
  return jax.device_get(net(**options).run(6)[0].trainable)
