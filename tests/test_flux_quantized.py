"""A FLUX transformer from its parameters to a 4-bit file that samples."""

import dataclasses

import flux_oracle
import jax
import numpy as np
import packed_files
import pytest

import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.models.flux import Flux
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import observe
from msfp_jax.quant import roles
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import is_aal

CONFIG = dataclasses.replace(
    flux_oracle.GUIDED, num_single_layers=1, in_channels=1)
# Two steps of flow matching, from noise (1) to data (0).
PLAN = diffusion.SamplerPlan(
    np.array([1.0, 0.5]), np.ones(2), np.full(2, 0.5), np.zeros(2))


def inputs_of(config, seed=0):
  """A batch to calibrate on and to sample from: noise and conditions."""
  noise, _, *conditions = flux_oracle.inputs_of(
      config, seed, height=4, width=6)
  return noise, *conditions


@pytest.fixture(scope='module')
def model():
  return Flux(CONFIG)


@pytest.fixture(scope='module')
def params():
  return flux_oracle.params_of(flux_oracle.state_of(CONFIG))


def kept(path, model, params, spec):
  """Packs, saves and loads: (what was packed, what was loaded)."""
  packed = msfp.pack(model, params, spec, PLAN)
  msfp.save(path, packed)
  loaded = msfp.load(path)
  assert loaded.model == model
  return packed, loaded


@pytest.mark.slow
def test_without_data_to_a_file(model, params, tmp_path):
  """Which layers have 8 bits, and all of it comes back."""
  spec = msfp.calibrate(model, params, recipe='nvfp4')
  assert spec.layers.keys() == flux_oracle.layers(CONFIG).keys()
  for name, layer in spec.layers.items():
    eight = roles.role_of(name) in roles.EXCEPTIONS['ends-8']
    assert layer.weight.bits == layer.act.bits == (8 if eight else 4), name
  packed, loaded = kept(tmp_path / 'a.safetensors', model, params, spec)
  packed_files.assert_equal(loaded, packed)


@pytest.mark.long
@pytest.mark.parametrize('recipe', ['msfp', 'svdquant'])
def test_a_file_samples_what_the_simulation_does(
    model, params, tmp_path, recipe):
  """And AALs are those of the structure: what follows SiLU or GELU."""
  spec = msfp.calibrate(
      model, params, recipe=recipe, batches=[inputs_of(CONFIG)], plan=PLAN)
  assert {name: layer.kind == spec_lib.AAL
          for name, layer in spec.layers.items()} == {
              name: roles.follows_activation(name) for name in spec.layers}
  _, loaded = kept(tmp_path / 'a.safetensors', model, params, spec)
  inputs = inputs_of(CONFIG, 1)
  found = loaded.sample(*inputs)
  np.testing.assert_array_equal(
      found, packed_lib.simulate(model, params, spec, PLAN).sample(*inputs))
  exact = packed_lib.full_precision(model, params, PLAN).sample(*inputs)
  error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  assert 1e-3 < error < 0.3


@pytest.mark.slow
def test_aals_are_seen_in_the_inputs(model, params):
  """By their values: SiLU's and GELU's ends below, and no other's."""
  seen = observe.collect(model, params, PLAN, [inputs_of(CONFIG)],
                         key=jax.random.key(0))
  assert {name: is_aal(part.minimum, part.maximum)
          for name, part in seen.items()} == {
              name: roles.follows_activation(name) for name in seen}
  gelu = [part.minimum for name, part in seen.items()
          if roles.role_of(name) == 'feed_forward' and
          roles.follows_activation(name)]
  assert len(gelu) == 3 and -0.1705 < min(gelu) < -0.16
