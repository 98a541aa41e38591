"""Models, LoRAs drawn for them, and what these must add to the weights."""

import functools

import families
import flux_oracle
import foreign
import jax
import lora_files
import numpy as np
import unet_oracle

import msfp_jax as msfp
from msfp_jax.models.flux import Flux
from msfp_jax.models.unet import UNet


@functools.cache
def flux(name='tiny'):
  """(model, state dict in diffusers' names, what makes our parameters of it).
  """
  config = flux_oracle.CONFIGS[name]
  return Flux(config), flux_oracle.state_of(config), flux_oracle.params_of


@functools.cache
def unet(name='sd1'):
  """The same of a UNet."""
  config = families.CONFIGS[name]
  state = families.state_of(config)
  theirs = foreign.diffusers(state, config)
  # Modules in the order of ours: a rename alone.
  names = dict(zip(theirs, state, strict=True))
  return UNet(config), theirs, lambda changed: unet_oracle.from_state_dict(
      config, {names[name]: value.reshape(state[names[name]].shape)
               for name, value in changed.items()})


def lora_of(state, **options):
  return lora_files.draw(
      {name: value.shape for name, value in state.items()
       if value.ndim > 1 and 'class_embedding' not in name}, **options)


def assert_adds(case, path, lora, scale, strength=1.0):
  """What is read and merged is W + strength scale up down, in NumPy."""
  model, state, params_of = case
  read = msfp.load_lora(path, model)
  actual = msfp.merge_loras(params_of(state), [(read, strength)])
  expected = params_of(lora_files.added(state, lora, strength * scale))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6,
                                 atol=1e-6), actual, expected)
  return read
