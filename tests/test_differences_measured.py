"""What is measured of models that quantize differences between steps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from recursion import assert_sqnr
from recursion import by_hand
from recursion import ByHand
from recursion import KEY
from recursion import MODEL
from recursion import nearest
from recursion import PARAMS
from recursion import PLAN
from recursion import simulated
from recursion import X

from msfp_jax.packed import model as packed_lib
from msfp_jax.report import gap
from msfp_jax.run import bits
from msfp_jax.run import sensitivity

pytestmark = pytest.mark.gpu


@pytest.mark.slow
def test_gaps_are_of_a_student_that_remembers():
  """Along the teacher's trajectory, whose x the recursion sees."""
  model, expected = simulated(), []
  teacher = lambda x, i: np.float64(MODEL.apply(
      {'params': PARAMS}, jnp.float32(x), jnp.full(3, PLAN.timesteps[i])))
  student = ByHand(model)
  seen = []
  by_hand(lambda x, i: seen.append(student(x, i)) or teacher(x, i),
          lambda i, x, eps: expected.append(np.mean((seen[-1] - eps)**2)))
  found = gap.along_trajectory(
      lambda x, t, index: MODEL.apply({'params': PARAMS}, x, t),
      model.eps_fn_of(), PLAN, X, KEY, model.memory(X))
  np.testing.assert_allclose(found.eps, expected, rtol=2e-3)


def test_the_first_step_counts_twice():
  plain = dataclasses.replace(simulated(), differences=False)
  shapes = {name: (1, 3, 3, size) for name, size in (('first', 4), ('last', 6))}
  assert bits.per_activation(simulated(), shapes) == pytest.approx(
      bits.per_activation(plain, shapes) * 6 / 5)


@pytest.mark.slow
def test_sqnr_is_by_the_step_before():
  """Whose input in full precision is known; at the first one, nothing is."""
  def rounded(inputs):
    known = [nearest(inputs[0]), *inputs[:-1]]
    return np.stack([before + nearest(h - before)
                     for before, h in zip(known, inputs, strict=True)])

  assert_sqnr(simulated(), rounded)


@pytest.mark.slow
def test_what_parts_cost_is_what_models_with_these_alone_show():
  """All of it, weights alone by a model of these; inputs beside exact ones."""
  model = simulated()
  found = sensitivity.Sensitivity(MODEL, PARAMS, PLAN, X, key=KEY).of(model)
  images = lambda model: np.uint8(np.clip(np.round(
      (np.asarray(model.sample(X, key=KEY), np.float64) + 1) * 127.5), 0, 255))
  full = packed_lib.full_precision(MODEL, PARAMS, PLAN)

  def cost(layers, differences):
    apart = np.float64(images(dataclasses.replace(
        model, layers=layers, differences=differences))) - images(full)
    mean = np.mean(apart**2, axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / mean)))

  assert found['quantized'] == pytest.approx(
      cost(model.layers, True), abs=0.02)
  weights = {name: layer.replace(input=full.layers[name].input)
             for name, layer in model.layers.items()}
  assert found['groups']['weights']['alone'] == pytest.approx(
      cost(weights, False), abs=0.02)
  first = model.layers | {'last': full.layers['last']}
  assert found['layers']['first']['alone'] == pytest.approx(
      float(np.mean(_psnr_of(first, model, full, images))), abs=0.02)


def _psnr_of(layers, model, full, images):
  ours = dataclasses.replace(model, layers=layers, params=PARAMS)
  apart = np.float64(images(ours)) - images(full)
  return 10 * np.log10(255**2 / np.mean(apart**2, axis=(1, 2, 3)))
