"""What is measured of models whose inputs have a scale each step."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from recursion import assert_sqnr
from recursion import KEY
from recursion import MODEL
from recursion import PARAMS
from recursion import PLAN
from recursion import X

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.metrics import similarity
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import block_formats
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static
from msfp_jax.run import bits
from msfp_jax.run import sensitivity

pytestmark = pytest.mark.gpu

SCALES = np.float32([0.6, 0.2, 0.5, 0.3, 0.7])  # of the levels below
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of E2M1


def simulated():
  """By hand: neighbouring steps have scales that differ much."""
  weight = block_formats.int_group(4)
  quantizer = Static(FPFormat.parse('E2M1'), jnp.asarray(SCALES), by_step=True)
  return packed_lib.simulate(MODEL, PARAMS, spec_lib.QuantSpec('by hand', {
      name: spec_lib.LayerSpec('', '', weight, quantizer)
      for name in ('first', 'last')}), PLAN)


def nearest(x, step):
  """x to the levels of a step, in float64."""
  levels = np.float64(SCALES[step]) * np.concatenate([-LEVELS, LEVELS])
  return levels[np.abs(x[..., None] - levels).argmin(-1)]


def test_sqnr_is_by_the_scales_of_each_step():
  assert_sqnr(simulated(), lambda inputs: np.stack([
      nearest(h, step) for step, h in enumerate(inputs)]))


@pytest.mark.slow
def test_what_parts_cost_is_what_models_of_a_scale_each_show():
  """Steps, a layer and inputs alone, by models that know of one step each."""
  model = simulated()
  full = packed_lib.full_precision(MODEL, PARAMS, PLAN)
  found = sensitivity.Sensitivity(MODEL, PARAMS, PLAN, X, key=KEY).of(model)

  def images(at):
    models = [dataclasses.replace(model, params=PARAMS, layers=at(step))
              for step in range(PLAN.num_steps)]
    return np.asarray(data.to_uint8(diffusion.sample(
        lambda x, t, index: sum(
            jnp.where(index == step, of.eps_fn(x, t, step), 0)
            for step, of in enumerate(models)), PLAN, X, KEY)))

  at = {name: [layer.replace(input=layer.input.at(step))
               for step in range(PLAN.num_steps)]
        for name, layer in model.layers.items()}
  every = lambda step: {name: of[step] for name, of in at.items()}
  none = images(lambda step: full.layers)
  cost = lambda of: pytest.approx(
      float(np.mean(similarity.psnr(images(of), none))), abs=0.02)
  assert found['quantized'] == cost(every)
  assert found['layers']['last']['alone'] == cost(
      lambda step: full.layers | {'last': at['last'][step]})
  assert found['groups']['inputs']['alone'] == cost(
      lambda step: {name: full.layers[name].replace(input=of[step].input)
                    for name, of in at.items()})
  for i, alone in enumerate(found['steps'].values()):
    assert alone['alone'] == cost(
        lambda step, i=i: every(step) if step == i else full.layers)


def test_a_step_has_one_scale():
  """Of 32 bits, for the 36 and 54 numbers of an image."""
  shapes = {name: (1, 3, 3, size) for name, size in (('first', 4), ('last', 6))}
  assert bits.per_activation(simulated(), shapes) == pytest.approx(
      4 + 2 * 32 / (36 + 54))
