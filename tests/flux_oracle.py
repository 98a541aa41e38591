"""Tiny FLUX transformers: weights by published names, inputs, configurations.

Written apart from `msfp_jax.convert.flux`, which it helps to check: names and
shapes are formulas of the published model, and are renamed backwards, into
those of Black Forest Labs (BFL).
"""

import json
import re

import jax
import numpy as np
import safetensors.numpy
import unet_oracle

from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig

TINY = FluxConfig(
    image_size=8, image_width=12, in_channels=3, out_channels=3, num_layers=2,
    num_single_layers=2, num_heads=2, head_dim=8, text_dim=12, pooled_dim=6,
    axes_dims=(2, 4, 2))
# The other side of every switch; all widths differ.
GUIDED = FluxConfig(
    image_size=6, in_channels=2, out_channels=1, num_layers=1,
    num_single_layers=3, num_heads=3, head_dim=6, text_dim=10, pooled_dim=4,
    guidance_embeds=True, axes_dims=(2, 2, 2))
CONFIGS = {'tiny': TINY, 'guided': GUIDED}


def shapes(config):
  """The state dict of diffusers' FluxTransformer2DModel: {name: shape}."""
  d, head = config.num_heads * config.head_dim, config.head_dim
  linear = {'x_embedder': (d, 4 * config.in_channels),
            'context_embedder': (d, config.text_dim),
            'norm_out.linear': (2 * d, d),
            'proj_out': (4 * config.out_channels, d)}
  embedders = {'timestep': 256, 'text': config.pooled_dim}
  if config.guidance_embeds:
    embedders['guidance'] = 256
  for name, width in embedders.items():
    linear[f'time_text_embed.{name}_embedder.linear_1'] = (d, width)
    linear[f'time_text_embed.{name}_embedder.linear_2'] = (d, d)
  norms = []
  for i in range(config.num_layers):
    block = f'transformer_blocks.{i}.'
    for name in ('norm1', 'norm1_context'):
      linear[f'{block}{name}.linear'] = (6 * d, d)
    for name in ('to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj',
                 'add_k_proj', 'add_v_proj', 'to_add_out'):
      linear[f'{block}attn.{name}'] = (d, d)
    for name in ('ff', 'ff_context'):
      linear[f'{block}{name}.net.0.proj'] = (4 * d, d)
      linear[f'{block}{name}.net.2'] = (d, 4 * d)
    norms += [f'{block}attn.norm_{name}'
              for name in ('q', 'k', 'added_q', 'added_k')]
  for i in range(config.num_single_layers):
    block = f'single_transformer_blocks.{i}.'
    linear[f'{block}norm.linear'] = (3 * d, d)
    for name in ('to_q', 'to_k', 'to_v'):
      linear[f'{block}attn.{name}'] = (d, d)
    linear[f'{block}proj_mlp'] = (4 * d, d)
    linear[f'{block}proj_out'] = (d, 5 * d)
    norms += [f'{block}attn.norm_{name}' for name in 'qk']
  found = {f'{name}.weight': (head,) for name in norms}
  for name, shape in linear.items():
    found |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
  return found


def layers(config):
  """Our layers and their kernels' shapes, by the published ones."""
  found = {}
  for name, shape in shapes(config).items():
    if len(shape) == 1:
      continue
    module, (rows, columns) = name.removesuffix('.weight'), shape
    if module.startswith('single_') and module.endswith('.proj_out'):
      found[f'{module}.attn'] = (rows, rows)
      found[f'{module}.mlp'] = (columns - rows, rows)
    else:
      found[module] = (columns, rows)
  return found


# What norms see of these is so faint that their epsilon, 1e-6, is felt.
_FAINT = re.compile(
    r'(x|context)_embedder\..*|.*attn\.(to|add)_[qk](_proj)?\..*')


def state_of(config, seed=0):
  """Draws weights in diffusers' names, all of them felt in the output."""
  state = unet_oracle.random_state_dict(shapes(config), seed)
  return {name: value * np.float32(2e-3 if _FAINT.fullmatch(name) else 1)
          for name, value in state.items()}


# Modules of BFL that become one of diffusers', inside of a block and outside.
_PLAIN = {
    'img_in': 'x_embedder', 'txt_in': 'context_embedder',
    'time_in.in_layer': 'time_text_embed.timestep_embedder.linear_1',
    'time_in.out_layer': 'time_text_embed.timestep_embedder.linear_2',
    'vector_in.in_layer': 'time_text_embed.text_embedder.linear_1',
    'vector_in.out_layer': 'time_text_embed.text_embedder.linear_2',
    'guidance_in.in_layer': 'time_text_embed.guidance_embedder.linear_1',
    'guidance_in.out_layer': 'time_text_embed.guidance_embedder.linear_2',
    'final_layer.linear': 'proj_out'}
_DOUBLE = {
    'img_mod.lin': 'norm1.linear', 'txt_mod.lin': 'norm1_context.linear',
    'img_attn.proj': 'attn.to_out.0', 'txt_attn.proj': 'attn.to_add_out',
    'img_mlp.0': 'ff.net.0.proj', 'img_mlp.2': 'ff.net.2',
    'txt_mlp.0': 'ff_context.net.0.proj', 'txt_mlp.2': 'ff_context.net.2'}
_DOUBLE_NORMS = {
    'img_attn.norm.query_norm': 'norm_q', 'img_attn.norm.key_norm': 'norm_k',
    'txt_attn.norm.query_norm': 'norm_added_q',
    'txt_attn.norm.key_norm': 'norm_added_k'}


def bfl(state, config):
  """Renames a state dict of diffusers as BFL does, fused and swapped."""
  found = {}

  def move(theirs, *ours):
    for leaf in ('weight', 'bias'):
      found[f'{theirs}.{leaf}'] = np.concatenate(
          [state[f'{name}.{leaf}'] for name in ours])

  for theirs, ours in _PLAIN.items():
    if f'{ours}.weight' in state:
      move(theirs, ours)
  for i in range(config.num_layers):
    theirs, ours = f'double_blocks.{i}', f'transformer_blocks.{i}'
    for name, module in _DOUBLE.items():
      move(f'{theirs}.{name}', f'{ours}.{module}')
    for side, names in (('img', ('to_q', 'to_k', 'to_v')),
                        ('txt', ('add_q_proj', 'add_k_proj', 'add_v_proj'))):
      move(f'{theirs}.{side}_attn.qkv', *[f'{ours}.attn.{n}' for n in names])
    for name, module in _DOUBLE_NORMS.items():
      found[f'{theirs}.{name}.scale'] = state[f'{ours}.attn.{module}.weight']
  for i in range(config.num_single_layers):
    theirs, ours = f'single_blocks.{i}', f'single_transformer_blocks.{i}'
    move(f'{theirs}.modulation.lin', f'{ours}.norm.linear')
    move(f'{theirs}.linear1', *[f'{ours}.attn.to_{n}' for n in 'qkv'],
         f'{ours}.proj_mlp')
    move(f'{theirs}.linear2', f'{ours}.proj_out')
    for name, n in (('query', 'q'), ('key', 'k')):
      found[f'{theirs}.norm.{name}_norm.scale'] = (
          state[f'{ours}.attn.norm_{n}.weight'])
  for leaf in ('weight', 'bias'):
    scale, shift = np.split(state[f'norm_out.linear.{leaf}'], 2)
    found[f'final_layer.adaLN_modulation.1.{leaf}'] = np.concatenate(
        [shift, scale])
  return found


def params_of(state):
  """Our parameters of a state dict of diffusers."""
  found = {}
  for name, value in state.items():
    module, leaf = name.rsplit('.', 1)
    parts = module.split('.')
    # A block is a module of its own; all else has its dots in its name.
    place = ['.'.join(parts[:2]), '.'.join(parts[2:])] if (
        parts[0].endswith('transformer_blocks')) else [module]
    here = found
    for part in place[:-1]:
      here = here.setdefault(part, {})
    if leaf == 'weight':
      leaf, value = ('kernel', value.T) if value.ndim == 2 else ('scale', value)
    if place[0].startswith('single') and place[1] == 'proj_out':
      if leaf == 'kernel':
        rows = value.shape[1]
        here.setdefault('proj_out.attn', {})['kernel'] = value[:rows]
        here['proj_out.mlp'] = {'kernel': value[rows:]}
      else:
        here.setdefault('proj_out.attn', {})['bias'] = value
      continue
    here.setdefault(place[-1], {})[leaf] = value
  return found


def inputs_of(config, seed=1, height=8, width=12):
  """Draws (x NHWC, t, text, pooled[, guidance]) with t over its whole range."""
  rng = np.random.RandomState(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  found = (normal(4, height, width, config.in_channels),
           np.array([0, 0.25, 0.501, 1], np.float32),
           normal(4, 5, config.text_dim), normal(4, config.pooled_dim))
  if config.guidance_embeds:
    found += (np.array([1, 3.5, 0, 7], np.float32),)
  return found


def output_of(model, params, inputs):
  """Runs our model in the highest precision."""
  with jax.default_matmul_precision('highest'):
    return np.asarray(jax.jit(model.apply)({'params': params}, *inputs))


def output(config, state, inputs):
  """`output_of` a state dict of diffusers."""
  return output_of(Flux(config), params_of(state), inputs)


def config_json(config):
  """diffusers' config.json of a configuration, with every key."""
  return {
      '_class_name': 'FluxTransformer2DModel', '_diffusers_version': '0.30.0',
      '_name_or_path': '../checkpoints/flux-schnell/transformer',
      'patch_size': 1, 'in_channels': 4 * config.in_channels,
      'out_channels': 4 * config.out_channels, 'num_layers': config.num_layers,
      'num_single_layers': config.num_single_layers,
      'attention_head_dim': config.head_dim,
      'num_attention_heads': config.num_heads,
      'joint_attention_dim': config.text_dim,
      'pooled_projection_dim': config.pooled_dim,
      'guidance_embeds': config.guidance_embeds,
      'axes_dims_rope': list(config.axes_dims)}


def save_folder(folder, state, config, shards=1):
  """Saves as diffusers does: a file, or several and their index."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config_json(config)))
  name = 'diffusion_pytorch_model'
  if shards == 1:
    safetensors.numpy.save_file(state, folder / f'{name}.safetensors')
    return folder
  places, names = {}, sorted(state)
  for i in range(shards):
    file = f'{name}-{i + 1:05}-of-{shards:05}.safetensors'
    part = {n: state[n] for n in names[i::shards]}
    safetensors.numpy.save_file(part, folder / file)
    places |= dict.fromkeys(part, file)
  (folder / f'{name}.safetensors.index.json').write_text(
      json.dumps({'metadata': {}, 'weight_map': places}))
  return folder


def save_bfl(path, state, config, prefix=''):
  """Saves as BFL does, one file; with a configuration under another name."""
  tensors = {prefix + n: np.ascontiguousarray(v)
             for n, v in bfl(state, config).items()}
  safetensors.numpy.save_file(tensors, path)
  described = path.with_name('transformer.json')
  described.write_text(json.dumps(config_json(config)))
  return path, described
