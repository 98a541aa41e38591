"""Published models are told by their shapes, at their real size."""

import dataclasses

import families
import foreign
import numpy as np
import published_configs
import pytest
import unet_oracle

from msfp_jax.convert import ddim
from msfp_jax.convert import diffusers_unet
from msfp_jax.convert import first_stage
from msfp_jax.convert import ldm
from msfp_jax.convert import load
from msfp_jax.convert import training
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.autoencoder import Autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig
from msfp_jax.models.unet import UNetConfig


def lazy(state):
  return {n: LazyTensor.of(v) for n, v in state.items()}


def zeros(config):
  """Makes a state dict of full size that takes no memory."""
  return {name: np.broadcast_to(np.float32(0), shape) for name, shape
          in unet_oracle.state_dict_shapes(config).items()}


def prefixed(state):
  return {f'model.diffusion_model.{n}': v for n, v in state.items()}


# Name: config, family, tensors and parameters of the published models.
REAL = {
    'cifar10': (UNetConfig(), ddim, lambda s, c: s, 328, 35_746_307),
    'celeba64': (UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4)), ddim,
                 lambda s, c: s, 390, 78_700_803),
    'bedrooms': (UNetConfig(
        image_size=64, ch=224, ch_mult=(1, 2, 3, 4),
        attn_resolutions=(64 // 2, 64 // 4, 64 // 8), head_channels=32,
        **families.LDM), ldm, lambda s, c: prefixed(foreign.ldm(s, c)),
                 368, 274_056_163),
    'churches': (UNetConfig(
        image_size=32, in_channels=4, out_channels=4, ch=192,
        ch_mult=(1, 2, 2, 4, 4), attn_resolutions=(32, 16, 8, 4), num_heads=8,
        resample='resblock', time_injection='scale_shift', **families.LDM),
                 ldm, lambda s, c: prefixed(foreign.ldm(s, c)),
                 520, 294_966_916),
    'cin256-v2': (UNetConfig(
        image_size=64, ch=192, ch_mult=(1, 2, 3, 5),
        attn_resolutions=(32, 16, 8), num_heads=1, context_dim=512,
        context_classes=1001, **families.LDM), ldm,
                  lambda s, c: foreign.ldm_checkpoint(s, c)['state_dict'],
                  689, 400_920_579 + 1001 * 512),
    'cin256': (UNetConfig(
        image_size=32, in_channels=4, out_channels=4, ch=256, ch_mult=(1, 2, 4),
        attn_resolutions=(32, 16, 8), head_channels=32, context_dim=512,
        context_classes=1000, **families.LDM), ldm,
               lambda s, c: foreign.ldm_checkpoint(s, c)['state_dict'],
               627, 394_984_196 + 1000 * 512),
    'sd1': (UNetConfig(
        image_size=64, in_channels=4, out_channels=4, ch=320,
        ch_mult=(1, 2, 4, 4), attn_resolutions=(64, 32, 16), num_heads=8,
        context_dim=768, **families.LDM), ldm,
            lambda s, c: prefixed(foreign.ldm(s, c)), 686, 859_520_964),
    'sd1, diffusers': (UNetConfig(
        image_size=64, in_channels=4, out_channels=4, ch=320,
        ch_mult=(1, 2, 4, 4), attn_resolutions=(64, 32, 16), num_heads=8,
        context_dim=768, **families.LDM), diffusers_unet, foreign.diffusers,
                       686, 859_520_964),
    'sd2': (UNetConfig(
        image_size=64, in_channels=4, out_channels=4, ch=320,
        ch_mult=(1, 2, 4, 4), attn_resolutions=(64, 32, 16), head_channels=64,
        context_dim=1024, **families.LDM), diffusers_unet, foreign.diffusers,
            686, 865_910_724),
    'ddpm-cifar10-32': (UNetConfig(dropout=0.0), diffusers_unet,
                        foreign.diffusers, 328, 35_746_307),
}


# One is a quick test, the others are slow ones.
QUICK = ('cifar10',)


@pytest.mark.parametrize('config, family, rename, tensors, parameters', [
    pytest.param(*case, id=name,
                 marks=() if name in QUICK else pytest.mark.slow)
    for name, case in REAL.items()])
def test_the_real_models_are_told_by_their_shapes(
    config, family, rename, tensors, parameters):
  found = rename(zeros(config), config)
  weights = {n: v for n, v in found.items() if n != 'betas'}
  assert len(weights) == tensors
  assert sum(v.size for v in weights.values()) == parameters
  selected = family.select(lazy(found), True)
  assert family.config(selected, None) == config
  named, leftover = family.rename(selected, config)
  assert not leftover
  assert {n: t.shape for n, t in named.items()}.keys() == (
      unet_oracle.state_dict_shapes(config).keys())


DESCRIBED = {
    'CIFAR10': (diffusers_unet, 'ddpm-cifar10-32'),
    'STABLE_DIFFUSION_1': (diffusers_unet, 'sd1, diffusers'),
    'STABLE_DIFFUSION_2': (diffusers_unet, 'sd2'),
    'BEDROOMS': (ldm, 'bedrooms'), 'CHURCHES': (ldm, 'churches'),
    'IMAGENET': (ldm, 'cin256-v2'),
    'STABLE_1': (ldm, 'sd1'), 'STABLE_2': (ldm, 'sd2'),
    'ERMONGROUP_CIFAR10': (ddim, 'cifar10'),
    'ERMONGROUP_CELEBA': (ddim, 'celeba64')}


@pytest.mark.parametrize('name', DESCRIBED)
def test_the_real_configurations_tell_the_real_models(name):
  """All that shapes tell is stated there, so that no tensors are needed."""
  family, model = DESCRIBED[name]
  # The classes' embedder is in the checkpoint alone.
  expected = dataclasses.replace(REAL[model][0], context_classes=None)
  assert family.config({}, published_configs.complete(name)) == expected


# As published: tensors and parameters of first stages.
REAL_STAGES = {
    'vq-f4': (AutoencoderConfig('vq', ch_mult=(1, 2, 4), z_channels=3,
                                embed_dim=3, codebook_size=8192),
              205, 55_322_782),
    'vq-f8': (AutoencoderConfig('vq', ch_mult=(1, 2, 2, 4), attn_levels=(3,),
                                codebook_size=16384), 299, 67_717_295),
    'kl-f8': (AutoencoderConfig(scale=0.18215), 248, 83_653_863),
    'flux': (AutoencoderConfig(z_channels=16, embed_dim=16, quant_conv=False,
                               scale=0.3611, shift=0.1159), 244, 83_819_683),
}


@pytest.mark.parametrize('config, tensors, parameters', REAL_STAGES.values(),
                         ids=REAL_STAGES)
def test_the_real_first_stages_are_told_by_their_shapes(
    config, tensors, parameters):
  abstract = load.abstract_autoencoder(Autoencoder(config))
  shapes = unet_oracle.shapes_of(abstract)
  assert len(shapes) == tensors
  assert sum(np.prod(s, dtype=int) for s in shapes.values()) == parameters
  state = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
  for rename in (foreign.compvis_first_stage, foreign.diffusers_first_stage):
    found = lazy(rename(state, config))
    assert first_stage.config(first_stage.select(found)) == config
    assert first_stage.rename(found, config)[0].keys() == shapes.keys()


@pytest.mark.parametrize('change', [
    {'ch_mult': (1, 2, 4), 'z_channels': 3, 'embed_dim': 3},  # KL-f4
    {'z_channels': 16, 'embed_dim': 16}, {'quant_conv': False},
    {'in_channels': 1}, {'attn_levels': (3,)}, {'embed_dim': 8}])
def test_a_first_stage_of_other_shapes_has_no_published_scale(change):
  config = AutoencoderConfig(**change)
  shapes = unet_oracle.shapes_of(load.abstract_autoencoder(Autoencoder(config)))
  state = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
  found = first_stage.select(lazy(foreign.compvis_first_stage(state, config)))
  with pytest.raises(ValueError, match='nothing tells the scale'):
    first_stage.config(found)
  assert first_stage.config(found, scale=1.0) == config


@pytest.mark.slow
def test_stable_diffusion_2_without_a_configuration_warns(caplog):
  config, family, rename, *_ = REAL['sd2']
  with caplog.at_level('WARNING'):
    tensors = lazy(rename(zeros(config), config))
    training.origin('diffusers', 'sd2.safetensors', None, tensors,
                    family.config(tensors, None))
  assert 'predicts the noise' in caplog.text
