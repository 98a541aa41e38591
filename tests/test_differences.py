"""Temporal differences: samples and files against the recursion by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import by_hand
from recursion import ByHand
from recursion import KEY
from recursion import MODEL
from recursion import PARAMS
from recursion import RECIPE
from recursion import simulated
from recursion import X
import students
import tiny

import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.tune import student as student_lib

pytestmark = pytest.mark.gpu


def test_samples_are_those_of_the_recursion():
  model = simulated()
  np.testing.assert_allclose(
      model.sample(X, key=KEY), by_hand(ByHand(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', [
    pytest.param(RECIPE, marks=pytest.mark.slow),
    pytest.param('quartz+differences', marks=pytest.mark.long),
    pytest.param('svdquant+differences', marks=pytest.mark.long),
    pytest.param('nvfp4+differences', marks=pytest.mark.long)])
def test_errors_of_inputs_all_but_vanish(name):
  """With branches and block formats too: what is left is the weights' error."""
  deployed = functools.partial(
      packed_lib.simulate, tiny.UNET, tiny.params(tiny.UNET),
      plan=diffusion.ddim_plan(tiny.SCHEDULE, 20))
  make = functools.partial(
      calibrate, tiny.UNET, tiny.params(tiny.UNET), batches=[tiny.noise(1)],
      plan=tiny.PLAN, exceptions='ends-8', key=KEY)
  plain = name.removesuffix('+differences')
  noise = tiny.noise(2)
  spec = make(recipe=plain)
  sample = lambda spec: np.asarray(deployed(spec=spec).sample(noise))
  # The same weights, whatever the inputs.
  full = dataclasses.replace(spec, layers={
      layer: dataclasses.replace(found, act=spec_lib.LayerSpec('', '').act)
      for layer, found in spec.layers.items()})
  target = sample(full)
  error = lambda spec: np.sqrt(np.mean((sample(spec) - target)**2))
  other = dataclasses.replace(spec, differences=True, layers={
      layer: dataclasses.replace(found, act=ours.act) for (layer, found), ours
      in zip(spec.layers.items(), make(recipe=name).layers.values(),
             strict=True)})
  assert error(other) < error(spec) / 2


@pytest.mark.slow
def test_packed_models_and_their_files_remember(tmp_path):
  """Bit for bit what the simulation samples; an older reader refuses them."""
  spec = calibrate(tiny.NET, tiny.params(tiny.NET), recipe=RECIPE,
                   roles=tiny.NET_ROLES)
  model = packed_lib.simulate(
      tiny.NET, tiny.params(tiny.NET), spec, tiny.PLAN)
  noise = tiny.noise(3)
  expected = model.sample(noise)
  path = tmp_path / 'model.safetensors'
  packed_file.save(path, model.packed())
  loaded = packed_file.load(path, tiny.NET)
  assert loaded.differences
  np.testing.assert_array_equal(loaded.sample(noise), expected)
  assert b'msfp-jax/packed/3' in path.read_bytes()
  plain = dataclasses.replace(model, differences=False)
  packed_file.save(path, plain.packed())
  assert not packed_file.load(path, tiny.NET).differences
  assert b'msfp-jax/packed/2' in path.read_bytes()
  assert np.abs(plain.sample(noise) - expected).max() > 1e-3


def test_one_prediction_alone_is_refused():
  with pytest.raises(ValueError, match=r'take eps_fn_of\(\) and memory\(\)'):
    simulated().eps_fn(X, X[:, 0, 0, 0], 0)
  spec = calibrate(tiny.NET, tiny.params(tiny.NET), recipe=RECIPE,
                   roles=tiny.NET_ROLES)
  with pytest.raises(ValueError, match='take msfp.pack'):
    msfp.QuantizedModel(tiny.NET, spec)
  student, nothing = student_lib.untrained(MODEL, PARAMS, spec)
  with pytest.raises(ValueError, match='predict_next'):
    student.predict(nothing, X, jnp.float32(0))
  assert dataclasses.replace(simulated(), differences=False).memory(X) is None


def test_several_banks_are_refused():
  """A sum over steps is of one set of weights."""
  with pytest.raises(ValueError, match='one set of weights: set num_banks=1'):
    students.Setup(tiny.NET, recipe=RECIPE)
  model = simulated()
  twice = jax.tree.map(lambda part: jnp.concatenate([part] * 2), model.layers[
      'first'].weight)
  with pytest.raises(ValueError, match=r"\['first'\] have several sets"):
    dataclasses.replace(model, layers=model.layers | {
        'first': model.layers['first'].replace(weight=twice)})


def test_plans_of_several_steps_take_the_first_twice_as_well():
  """A memory that counts; where a step leads and what it leaves is one."""
  plan = diffusion.plms_plan(tiny.SCHEDULE, 6)
  eps_fn = lambda x, t, index: jnp.tanh(x) * (1 + t[0] / 1000)
  counting = lambda x, t, index, count: (eps_fn(x, t, index), count + 1)
  visit = lambda x, eps, step: (x, step['index'])
  expected, seen = diffusion.trajectory(eps_fn, plan, X, None, visit)
  found, ours = diffusion.trajectory(
      counting, plan, X, None, visit, jnp.zeros((), jnp.int32))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6),
               ours, seen)
  counts = diffusion.trajectory(
      lambda x, t, index, count: (0 * x + count, count + 1), plan, X, None,
      lambda x, eps, step: eps.max(), jnp.zeros(()))[1]
  np.testing.assert_array_equal(counts, range(1, plan.num_steps + 1))
