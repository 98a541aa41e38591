"""What keys of foreign configurations may be: other values are refused."""

import math

import published_configs
import pytest

from msfp_jax.convert import ddim
from msfp_jax.convert import diffusers_unet
from msfp_jax.convert import first_stage_keys
from msfp_jax.convert import key_values
from msfp_jax.convert import ldm

_NO_NUMBERS = ['x', None, [0.1], True, math.nan, math.inf, {}]
# What is none of a kind, whatever JSON and YAML can hold.
WRONG = {
    'whole': [0, -8, 2.0, '4', True, {}, [4, 0], math.nan],
    'whole or none': [0, -8, 2.0, '4', True, {}],
    'by level': [0, -1, 2.0, '4', True, [], [8.0] * 4, [0, 8, 8, 8],
                 [8, True, 8, 8], [[8] * 4], {'0': 8}],
    'list': [4, '4', None, [0, 1, 2, 4], [1.5] * 4, [None], ['1'] * 4, {1: 1}],
    'full list': [[]],
    'texts': ['DownBlock2D', None, [], [None] * 4, [1, 2, 3, 4], {}],
    'number': _NO_NUMBERS + [10**400],
    'from zero': [*_NO_NUMBERS, -1e-9],
    'above zero': ['x', [0.1], True, math.nan, math.inf, 0, -0.5],
    'share': [*_NO_NUMBERS, -0.1, 1.01],
    'text': [3, None, ['linear'], {}],
    'yaml share': ['x', None, True, [1e-4], 'nan', '-1e-4', 1.5],
    'yaml count': ['x', None, True, [1000], 0, '-1', math.inf],
    'flag': ['yes', 1, None, 0.0, [True]],
    'flag or none': ['yes', 1, 0.0, [True]],
    'sides': [0, -8, 32.0, '32', True, [32], [32, 0], [32] * 3, {}],
    'section': ['x', 3, [1]]}
UNET, OUTER = 'model.params.unet_config.params', 'model.params'
# By published configuration and place in it: the kinds of its keys.
KEYS = {
    ('CIFAR10', ''): {
        'whole': 'in_channels out_channels norm_num_groups num_class_embeds',
        'by level': 'layers_per_block attention_head_dim',
        'list': 'block_out_channels', 'full list': 'block_out_channels',
        'texts': 'down_block_types up_block_types', 'share': 'dropout',
        'from zero': 'norm_eps', 'number': 'freq_shift',
        'sides': 'sample_size'},
    ('STABLE_DIFFUSION_1', ''): {
        'by level': 'layers_per_block attention_head_dim cross_attention_dim '
                    'transformer_layers_per_block'},
    ('STABLE_1', UNET): {
        'whole': 'in_channels out_channels model_channels num_classes',
        'whole or none': 'num_heads num_head_channels',
        'by level': 'num_res_blocks context_dim transformer_depth',
        'list': 'attention_resolutions channel_mult',
        'full list': 'channel_mult',
        'share': 'dropout', 'flag': 'use_scale_shift_norm resblock_updown',
        'flag or none': 'use_spatial_transformer', 'sides': 'image_size'},
    ('STABLE_1', OUTER): {
        'sides': 'image_size', 'flag': 'use_ema scale_by_std',
        'above zero': 'scale_factor', 'text': 'parameterization beta_schedule',
        'yaml share': 'linear_start linear_end', 'yaml count': 'timesteps',
        'section': 'first_stage_config'},
    ('ERMONGROUP_CIFAR10', 'model'): {
        'whole': 'in_channels out_ch ch num_res_blocks',
        'list': 'ch_mult attn_resolutions', 'full list': 'ch_mult',
        'share': 'dropout'},
    ('ERMONGROUP_CIFAR10', 'diffusion'): {
        'text': 'beta_schedule', 'yaml share': 'beta_start beta_end',
        'yaml count': 'num_diffusion_timesteps'},
    ('ERMONGROUP_CIFAR10', 'data'): {'sides': 'image_size'},
    ('AutoencoderKL', ''): {
        'whole': 'in_channels out_channels layers_per_block latent_channels '
                 'norm_num_groups num_vq_embeddings vq_embed_dim',
        'list': 'block_out_channels', 'full list': 'block_out_channels',
        'above zero': 'scaling_factor', 'texts': 'down_block_types',
        'flag': 'use_quant_conv'},
    ('KL', 'params'): {'whole': 'n_embed', 'by level': 'embed_dim',
                       'section': 'ddconfig'},
    ('KL', 'params.ddconfig'): {
        'whole': 'z_channels in_channels out_ch ch',
        'by level': 'resolution num_res_blocks', 'flag': 'double_z',
        'list': 'ch_mult attn_resolutions', 'full list': 'ch_mult'}}
CASES = [(name, place, key, kind) for (name, place), kinds in KEYS.items()
         for kind, keys in kinds.items() for key in keys.split()]


def read(name, place, fields):
  """Reads a configuration, with fields at a place in it."""
  content = {'AutoencoderKL': {'_class_name': 'AutoencoderKL'},
             'KL': {'params': {'ddconfig': {}}}}.get(name)
  if content is None:
    content = published_configs.complete(name)
  part = content
  for key in place.split('.') if place else ():
    part = part[key]
  part |= fields
  if name == 'AutoencoderKL':
    return first_stage_keys.check_json(content)
  if name == 'KL':
    return first_stage_keys.check_yaml(content, False)
  family = {'CIFAR10': diffusers_unet, 'STABLE_DIFFUSION_1': diffusers_unet,
            'STABLE_1': ldm, 'ERMONGROUP_CIFAR10': ddim}[name]
  return family.config({}, content)


@pytest.mark.parametrize('name, place, key, kind', CASES)
def test_what_is_not_of_a_keys_kind_is_refused_by_the_key(
    name, place, key, kind):
  for value in WRONG[kind]:
    with pytest.raises(ValueError, match=f'{key}=.*must be ') as error:
      read(name, place, {key: value})
    text = str(error.value)
    assert repr(value) in text
    assert '\n' not in text
    # One reason is given, not also what follows from the value.
    assert text.count(f'{key}=') == 1


@pytest.mark.parametrize('name, place, fields, expected', [
    ('CIFAR10', '', {'dropout': 0}, {'dropout': 0}),
    ('CIFAR10', '', {'dropout': 1.0}, {'dropout': 1.0}),
    ('CIFAR10', '', {'norm_eps': 0}, {'norm_eps': 0}),
    ('CIFAR10', '', {'freq_shift': -0.5}, {'time_freq_shift': -0.5}),
    ('CIFAR10', '', {'layers_per_block': [3, 3, 3, 3]}, {'num_res_blocks': 3}),
    ('CIFAR10', '', {'sample_size': [32, 64]}, {'image_width': 64}),
    ('CIFAR10', '', {'attention_head_dim': 1}, {'head_channels': 1}),
    ('STABLE_1', UNET, {'attention_resolutions': []}, {'attn_resolutions': ()}),
    ('STABLE_1', UNET, {'num_head_channels': None}, {'num_heads': 8}),
    ('STABLE_1', UNET, {'context_dim': [768]}, {'context_dim': 768}),
    ('STABLE_1', UNET, {'num_classes': None}, {'num_classes': None}),
    ('STABLE_1', OUTER, {'linear_start': '1e-4'}, {}),
    ('STABLE_1', OUTER, {'image_size': None}, {'image_size': 32}),
    ('STABLE_1', OUTER, {'first_stage_config': None}, {}),
    ('ERMONGROUP_CIFAR10', 'model', {'attn_resolutions': []}, {
        'attn_resolutions': ()}),
    ('ERMONGROUP_CIFAR10', 'diffusion', {'beta_start': '1e-4'}, {})])
def test_values_at_the_edge_are_read(name, place, fields, expected):
  found = read(name, place, fields)
  assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize('fields, text', [
    # One width, but not of whole heads; and fewer channels than heads.
    ({'attention_head_dim': [3, 6, 12, 12]}, r'attention_head_dim=\[3, 6'),
    ({'attention_head_dim': [640, 1280, 2560, 2560]}, r'head_dim=\[640'),
    ({'freq_shift': 160}, 'freq_shift=160'),
    ({'only_cross_attention': []}, 'only_cross_attention=')])
def test_values_of_their_kind_that_make_no_model(fields, text):
  with pytest.raises(ValueError, match=text):
    read('STABLE_DIFFUSION_1', '', fields)


@pytest.mark.parametrize('kind, what', [
    (key_values.WHOLE, 'a positive whole number'),
    (key_values.number(), 'a number'),
    (key_values.number(0), 'a number from 0'),
    (key_values.number(0, 1), 'a number from 0 to 1'),
    (key_values.or_none(key_values.TEXT), 'text, or null'),
    (key_values.by_level(key_values.WHOLE),
     'a positive whole number, or a list of such'),
    (key_values.listed(key_values.TEXT),
     'a list of 1 or more values, each text'),
    (key_values.listed(key_values.TEXT, 0), 'a list of values, each text')])
def test_a_kind_says_what_it_takes(kind, what):
  assert kind.what == what
