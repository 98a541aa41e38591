"""Every key of diffusers' classes does here what it does there, or is refused.

For each key of a class's `__init__` there are other values than its default. A
model with random weights is made by diffusers, saved, and loaded by us from
the same files. Of each value it is said which must happen: an error names the
key (`No`), or both compute the same. A key that a later version of diffusers
adds fails these tests, so that somebody thinks of it.
"""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle

from msfp_jax import convert
from msfp_jax.convert import first_stage_keys
from msfp_jax.convert import unet_keys

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore:__array__ impl:DeprecationWarning')]

INVENTED = 'dreamt_of'
# What is said where one of these keys has a value that is not ours.
_SAID = {'down_block_types': 'block type|levels|resampling',
         'up_block_types': 'block type|levels|resampling',
         'downsample_type': 'resampling', 'upsample_type': 'resampling'}


@dataclasses.dataclass(frozen=True)
class No:
  """A value that our models do not compute: refused by its key's name.

  All others must be loaded.
  """

  value: object


_SHARED = {
    'sample_size': [16, [8, 16]], 'in_channels': [5], 'out_channels': [2],
    'center_input_sample': [No(True)], 'flip_sin_to_cos': [False],
    'freq_shift': [1],
    'block_out_channels': [[16, 16], No([8, 12])], 'layers_per_block': [2],
    'downsample_padding': [0, No(2)], 'mid_block_scale_factor': [No(2)],
    'dropout': [0.1], 'act_fn': ['swish', No('gelu')], 'norm_num_groups': [2],
    'norm_eps': [1e-2], 'time_embedding_type': [No('fourier')],
    'time_embedding_dim': [32, No(64)], 'num_class_embeds': [5]}
# Values of one key, or of several where one alone makes no model.
UNETS = {
    'UNet2DModel': (dict(
        sample_size=8, block_out_channels=[8, 16], layers_per_block=1,
        norm_num_groups=4, attention_head_dim=2,
        down_block_types=['AttnDownBlock2D', 'DownBlock2D'],
        up_block_types=['UpBlock2D', 'AttnUpBlock2D']), _SHARED | {
            'mid_block_type': [No(None), 'UNetMidBlock2D'],
            'attention_head_dim': [4, None],
            # Its attention has no norm then, where attn_norm_num_groups is
            # None.
            'resnet_time_scale_shift': [No('scale_shift'), No('ada_group')],
            'class_embed_type': [No('timestep'), No('identity')],
            'down_block_types': [
                No(['DownBlock2D'] * 2), No(['SkipDownBlock2D'] * 2),
                {'down_block_types': ['DownBlock2D', 'AttnDownBlock2D'],
                 'up_block_types': ['AttnUpBlock2D', 'UpBlock2D']},
                {'down_block_types': ['ResnetDownsampleBlock2D', 'DownBlock2D'],
                 'up_block_types': ['ResnetUpsampleBlock2D', 'UpBlock2D']}],
            'up_block_types': [No(['UpBlock2D'] * 2)],
            'downsample_type': [No('resnet'), {
                'downsample_type': 'resnet', 'upsample_type': 'resnet',
                'up_block_types': ['AttnUpBlock2D'] * 2,
                'down_block_types': ['AttnDownBlock2D'] * 2}],
            'upsample_type': ['resnet'], 'add_attention': [No(False)],
            'attn_norm_num_groups': [No(2), 4, {
                'attn_norm_num_groups': 4,
                'resnet_time_scale_shift': 'scale_shift'}],
            'num_train_timesteps': [7, No({
                'num_train_timesteps': 1000,
                'time_embedding_type': 'learned'})]}),
    'UNet2DConditionModel': (dict(
        sample_size=8, block_out_channels=[8, 16], layers_per_block=1,
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=6,
        down_block_types=['CrossAttnDownBlock2D', 'DownBlock2D'],
        up_block_types=['UpBlock2D', 'CrossAttnUpBlock2D']), _SHARED | {
            'down_block_types': [
                No(['SimpleCrossAttnDownBlock2D', 'DownBlock2D']),
                No(['AttnDownBlock2D', 'DownBlock2D']),
                {'down_block_types': ['DownBlock2D'] * 2,
                 'up_block_types': ['UpBlock2D'] * 2}],
            'up_block_types': [No(['UpBlock2D'] * 2)],
            'attention_head_dim': [4, [1, 2], No([2, 8]), No(None)],
            'mid_block_type': [No(None), No('UNetMidBlock2D'),
                               No('UNetMidBlock2DSimpleCrossAttn')],
            'resnet_time_scale_shift': ['scale_shift', No('ada_group')],
            'only_cross_attention': [No(True), No([False, True])],
            'cross_attention_dim': [4, [6, 6], No([6, 4])],
            'transformer_layers_per_block': [2, No([1, 2])],
            'reverse_transformer_layers_per_block': [No([2, 1])],
            'encoder_hid_dim': [No(3)],
            'encoder_hid_dim_type': [No({'encoder_hid_dim_type': 'text_proj',
                                         'encoder_hid_dim': 3})],
            'num_attention_heads': [No(2)], 'dual_cross_attention': [No(True)],
            'use_linear_projection': [True],
            'class_embed_type': [No('timestep'), No('identity'), No({
                'class_embed_type': 'projection',
                'projection_class_embeddings_input_dim': 3})],
            'addition_embed_type': [No('text'), No({
                'addition_embed_type': 'text_time',
                'addition_time_embed_dim': 4,
                'projection_class_embeddings_input_dim': 8})],
            'addition_time_embed_dim': [4], 'upcast_attention': [True],
            'resnet_skip_time_act': [No(True)],
            'resnet_out_scale_factor': [No(2.0)],
            'time_embedding_act_fn': [No('silu')],
            'timestep_post_act': [No('silu')], 'time_cond_proj_dim': [No(8)],
            'conv_in_kernel': [No(5)], 'conv_out_kernel': [No(1)],
            'projection_class_embeddings_input_dim': [3],
            'attention_type': [No('gated')],
            'class_embeddings_concat': [No(True)],
            'mid_block_only_cross_attention': [True],
            'cross_attention_norm': ['layer_norm'],
            'addition_embed_type_num_heads': [2]}),
}

_STAGE = dict(
    block_out_channels=[8, 16], norm_num_groups=4, scaling_factor=0.5,
    sample_size=8, down_block_types=['DownEncoderBlock2D'] * 2,
    up_block_types=['UpDecoderBlock2D'] * 2)
_STAGES_SHARED = {
    'in_channels': [1], 'out_channels': [2], 'layers_per_block': [2],
    'block_out_channels': [[8, 8], No([8, 12])],
    'act_fn': ['swish', No('gelu')],
    'latent_channels': [5], 'norm_num_groups': [2], 'sample_size': [16],
    'scaling_factor': [0.25], 'force_upcast': [True, False],
    'mid_block_add_attention': [No(False)],
    'down_block_types': [No(['AttnDownEncoderBlock2D', 'DownEncoderBlock2D']), {
        'down_block_types': ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D'],
        'up_block_types': ['AttnUpDecoderBlock2D', 'UpDecoderBlock2D']}],
    'up_block_types': [No(['UpDecoderBlock2D', 'AttnUpDecoderBlock2D'])]}
STAGES = {
    'AutoencoderKL': (_STAGE, _STAGES_SHARED | {
        'shift_factor': [0.3], 'latents_mean': [No([0.1] * 4)],
        'latents_std': [No([2.0] * 4)],
        'use_quant_conv': [No(False), {'use_quant_conv': False,
                                   'use_post_quant_conv': False}],
        'use_post_quant_conv': [No(False)]}),
    'VQModel': (_STAGE | {'num_vq_embeddings': 9}, _STAGES_SHARED | {
        'num_vq_embeddings': [5], 'vq_embed_dim': [2],
        'norm_type': [No('spatial')], 'lookup_from_codebook': [No(True)]}),
}


def cases(table):
  """(class, {fields}, loads) of every value, and of a key that nobody has."""
  found = []
  for kind, (_, values) in table.items():
    for key, others in (values | {INVENTED: [No(1)]}).items():
      for i, value in enumerate(others):
        loads = not isinstance(value, No)
        fields = value if loads else value.value
        found.append(pytest.param(
            kind, fields if isinstance(fields, dict) else {key: fields}, loads,
            id=f'{kind}-{key}-{i}'))
  return found


def fields_of(table, kind):
  """The config.json of a small model: all keys of the class, as it saves."""
  import diffusers
  stated = inspect.signature(getattr(diffusers, kind).__init__).parameters
  defaults = {key: parameter.default for key, parameter in stated.items()
              if key != 'self'}
  return json.loads(json.dumps(defaults | table[kind][0])) | {
      '_class_name': kind}


def random_model(kind, fields, seed=0):
  """Builds diffusers' model with random weights; None where it cannot."""
  import diffusers
  import torch
  kind = getattr(diffusers, kind)
  known = inspect.signature(kind.__init__).parameters
  try:
    model = kind(**{k: v for k, v in fields.items() if k in known})
  except (ValueError, TypeError, AttributeError, KeyError,
          ZeroDivisionError):
    return None
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for tensor in model.parameters():
      tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
  return model.eval()


def written(folder, kind, fields, model):
  """Saves a model, or in its place a tensor that is nobody's."""
  import safetensors.torch
  import torch
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(fields))
  tensors = model.state_dict() if model else {'none': torch.zeros(1)}
  safetensors.torch.save_file(
      {n: t.contiguous().clone() for n, t in tensors.items()},
      folder / 'diffusion_pytorch_model.safetensors')
  return str(folder)


def loaded(load, folder, kind, fields, base, loads):
  """Loads what diffusers saves; None where it is to be refused by name."""
  model = random_model(kind, fields)
  # What diffusers cannot build either is refused before tensors are looked at.
  path = written(folder, kind, fields, model or random_model(kind, base))
  if loads:
    assert model is not None
    return *load(path), model
  names = [_SAID.get(k, k) for k in fields if fields[k] != base.get(k)]
  with pytest.raises(ValueError, match='|'.join(names)):
    load(path)
  return None


@pytest.mark.parametrize('table, known', [
    (UNETS, unet_keys.KEYS), (STAGES, first_stage_keys.KEYS)],
                         ids=['unets', 'first stages'])
def test_every_key_is_known_and_tried(table, known):
  for kind, (_, values) in table.items():
    keys = fields_of(table, kind).keys()
    assert keys <= known
    assert keys == values.keys() | {'_class_name'}, kind


@pytest.mark.parametrize('kind, change, loads', cases(UNETS))
def test_a_unets_key_does_what_it_does_there(tmp_path, kind, change, loads):
  import torch
  base = fields_of(UNETS, kind)
  found = loaded(convert.load_pretrained, tmp_path / 'f', kind,
                 base | change, base, loads)
  if found is None:
    return
  ours, params, theirs = found
  rng = np.random.default_rng(0)
  # Of one size, whatever the model's is: that is compared below.
  x = rng.standard_normal((2, 8, 8, ours.config.in_channels)).astype(np.float32)
  t = np.array([3, 500])
  given = {}
  if ours.config.by_class:
    given['labels'] = np.array([0, 4])
  if ours.config.by_context:
    given['context'] = rng.standard_normal(
        (2, 3, ours.config.context_dim)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), **{
            {'labels': 'class_labels', 'context': 'encoder_hidden_states'}[
                name]: torch.from_numpy(value) for name, value in given.items()
        }).sample.permute(0, 2, 3, 1).numpy()
  with jax.default_matmul_precision('highest'):
    # Not compiled as a whole: all these models share most operations.
    actual = ours.apply({'params': params}, x, t, **given)
  assert unet_oracle.rel_l2(np.asarray(actual), expected) < 1e-5
  # What changes no output may only be the side, or what training does.
  stated = base.keys() & change.keys() & {'sample_size', 'dropout'}
  if 'sample_size' in stated:
    sides = change['sample_size']
    assert ours.sample_shape[:2] == (
        tuple(sides) if isinstance(sides, list) else (sides, sides))
  if 'dropout' in stated:
    assert ours.config.dropout == change['dropout']


@pytest.mark.parametrize('kind, change, loads', cases(STAGES))
def test_a_first_stages_key_does_what_it_does_there(
    tmp_path, kind, change, loads):
  import torch
  base = fields_of(STAGES, kind)
  fields = base | change
  found = loaded(convert.load_first_stage, tmp_path / 'f', kind, fields, base,
                 loads)
  if found is None:
    return
  ours, params, theirs = found
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 8, 8, fields['in_channels']))
  latents = rng.standard_normal((2, 4, 4, ours.config.embed_dim))
  scale, shift = fields['scaling_factor'], fields.get('shift_factor') or 0.0
  nchw = lambda a: torch.from_numpy(a.astype(np.float32)).permute(0, 3, 1, 2)
  with torch.no_grad():
    encoded = theirs.encode(nchw(images))
    encoded = (encoded.latents if kind == 'VQModel'
               else encoded.latent_dist.mean)
    decoded = theirs.decode(nchw(latents / scale + shift)).sample
  expected = ((encoded - shift) * scale, decoded)
  with jax.default_matmul_precision('highest'):
    for x, method, wanted in zip(
        (images, latents), ('encode', 'decode'), expected, strict=True):
      actual = ours.apply(
          {'params': params}, jnp.asarray(x, jnp.float32), method=method)
      assert unet_oracle.rel_l2(
          np.asarray(actual), wanted.permute(0, 2, 3, 1).numpy()) < 1e-5
