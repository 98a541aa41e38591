import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle

from msfp_jax.models.blocks import conv3x3
from msfp_jax.models.timestep import timestep_embedding
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

CIFAR10 = UNetConfig()
CELEBA64 = UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4))
# The least that still has every part; compiles in a second.
SMALLEST = UNetConfig(
    image_size=8, ch=8, ch_mult=(1, 1), num_res_blocks=1,
    attn_resolutions=(), norm_groups=2)

# Written out from the original models: (in, out) of every residual block, by
# level; the level with attention; width of the middle.
CIFAR10_BLOCKS = {
    'down': [[(128, 128), (128, 128)], [(128, 256), (256, 256)],
             [(256, 256), (256, 256)], [(256, 256), (256, 256)]],
    'up': [[(384, 128), (256, 128), (256, 128)],
           [(512, 256), (512, 256), (384, 256)],
           [(512, 256), (512, 256), (512, 256)],
           [(512, 256), (512, 256), (512, 256)]],
    'attn': 1, 'mid': 256}
CELEBA64_BLOCKS = {
    'down': CIFAR10_BLOCKS['down'] + [[(256, 512), (512, 512)]],
    'up': CIFAR10_BLOCKS['up'][:3] + [
        [(768, 256), (512, 256), (512, 256)],
        [(1024, 512), (1024, 512), (768, 512)]],
    'attn': 2, 'mid': 512}


def expected_layers(blocks):
  """Lists the original's layers, {name: weight shape}, and its norms."""
  layers = {'temb.dense.0': (512, 128), 'temb.dense.1': (512, 512),
            'conv_in': (128, 3, 3, 3), 'conv_out': (3, 128, 3, 3)}
  norms = {'norm_out': 128}

  def block(name, c_in, c_out):
    layers[f'{name}.conv1'] = (c_out, c_in, 3, 3)
    layers[f'{name}.temb_proj'] = (c_out, 512)
    layers[f'{name}.conv2'] = (c_out, c_out, 3, 3)
    norms[f'{name}.norm1'] = c_in
    norms[f'{name}.norm2'] = c_out
    if c_in != c_out:
      layers[f'{name}.nin_shortcut'] = (c_out, c_in, 1, 1)

  def attn(name, c):
    norms[f'{name}.norm'] = c
    for part in ('q', 'k', 'v', 'proj_out'):
      layers[f'{name}.{part}'] = (c, c, 1, 1)

  for side in ('down', 'up'):
    for i, level in enumerate(blocks[side]):
      for j, (c_in, c_out) in enumerate(level):
        block(f'{side}.{i}.block.{j}', c_in, c_out)
        if i == blocks['attn']:
          attn(f'{side}.{i}.attn.{j}', c_out)
      last = len(blocks[side]) - 1
      if side == 'down' and i < last:
        layers[f'down.{i}.downsample.conv'] = (c_out, c_out, 3, 3)
      if side == 'up' and i > 0:
        layers[f'up.{i}.upsample.conv'] = (c_out, c_out, 3, 3)
  for n in (1, 2):
    block(f'mid.block_{n}', blocks['mid'], blocks['mid'])
  attn('mid.attn_1', blocks['mid'])
  return layers, norms


def random_state_dict(config):
  return unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=0)


@pytest.mark.parametrize('config, blocks, layers, tensors, total', [
    (CIFAR10, CIFAR10_BLOCKS, 113, 328, 35_746_307),
    (CELEBA64, CELEBA64_BLOCKS, 134, 390, 78_700_803),
], ids=['cifar10', 'celeba64'])
def test_parameters_are_the_original_models(
    config, blocks, layers, tensors, total):
  expected_weights, norms = expected_layers(blocks)
  expected = {}
  for name, shape in expected_weights.items():
    expected |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
  for name, channels in norms.items():
    expected |= {f'{name}.weight': (channels,), f'{name}.bias': (channels,)}

  shapes = unet_oracle.state_dict_shapes(config)

  assert shapes == expected
  assert sum(len(shape) > 1 for shape in shapes.values()) == layers
  assert len(shapes) == tensors
  assert sum(map(math.prod, shapes.values())) == total


def test_names_are_not_split_at_their_dots():
  # A layer's path in Flax joined with dots is its name; interception and
  # conversion both count on it.
  params = unet_oracle.abstract_params(unet_oracle.TINY)
  assert set(params['down.0.block.0']['conv1']) == {'kernel', 'bias'}
  assert set(params['down.0.downsample.conv']) == {'kernel', 'bias'}


@pytest.mark.parametrize('name', ['unet_tiny', 'unet_tiny_relative'])
def test_output_equals_golden(name):
  config, state, inputs, expected = unet_oracle.load_golden(name)
  assert inputs[0].shape[1] != inputs[0].shape[2]
  inputs = (inputs[0].astype(np.float32), *inputs[1:])
  actual = unet_oracle.apply(config, state, *inputs)
  assert actual.dtype == np.float32
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize('change', [
    {'norm_eps': 1e-5}, {'downsample_padding': (1, 1)},
    {'time_order': 'cos_sin'}, {'time_freq_shift': 0}, {'num_heads': 2}],
    ids=lambda change: next(iter(change)))
def test_golden_comparison_sees_every_switch(change):
  config, state, inputs, expected = unet_oracle.load_golden('unet_tiny')
  config = dataclasses.replace(config, **change)
  actual = unet_oracle.apply(config, state, *inputs)
  assert unet_oracle.rel_l2(actual, expected) > 5e-6


@pytest.mark.slow
def test_full_size_output_equals_golden():
  with np.load(unet_oracle.GOLDEN / 'unet_cifar10.npz') as file:
    config = UNetConfig(**json.loads(str(file['config'])))
    expected = file['out']
  assert config == CIFAR10
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=2)
  inputs = unet_oracle.random_inputs(config, 16, 24, seed=2)
  actual = unet_oracle.apply(config, state, *inputs)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


@pytest.mark.parametrize('order', ['sin_cos', 'cos_sin'])
@pytest.mark.parametrize('freq_shift', [0, 1])
@pytest.mark.parametrize('dim', [8, 33, 128])
def test_timestep_embedding_equals_formula(order, freq_shift, dim):
  t = np.array([0, 1, 3, 500, 999, 0.125, 0.7, 333.4, 998.9])
  half = dim // 2
  angles = np.stack([t * 10000.0 ** (-k / (half - freq_shift))
                     for k in range(half)], axis=1)
  halves = {'sin': np.sin(angles), 'cos': np.cos(angles)}
  expected = np.concatenate(
      [halves[part] for part in order.split('_')], axis=1)

  actual = np.asarray(timestep_embedding(jnp.asarray(t), dim, order,
                                         freq_shift))

  assert actual.shape == (len(t), dim)
  assert actual.dtype == np.float32
  # Roundings to float32: of t, the frequency and the angle, and of the result.
  bound = np.tile(angles, (1, 2)) * 1.5 * 2 ** -23 + 2e-7
  assert (np.abs(actual[:, :2 * half] - expected) <= bound).all()
  assert not actual[:, 2 * half:].any()


def test_timesteps_may_be_int_or_float():
  t = jnp.array([0, 3, 999])
  np.testing.assert_array_equal(
      timestep_embedding(t, 16), timestep_embedding(t.astype(jnp.float32), 16))


def numpy_conv3x3(x, kernel, bias, stride, padding):
  """Convolves `[B, H, W, C]` in float64, tap by tap."""
  x = np.pad(x.astype(np.float64), ((0, 0), padding, padding, (0, 0)))
  height, width = ((side - 3) // stride + 1 for side in x.shape[1:3])
  out = np.float64(bias)
  for i in range(3):
    for j in range(3):
      tap = x[:, i:i + stride * height:stride, j:j + stride * width:stride]
      out = out + tap[:, :height, :width] @ np.float64(kernel[i, j])
  return out


@pytest.mark.parametrize('padding', [(0, 1), (1, 1)])
@pytest.mark.parametrize('height, width', [(4, 6), (5, 7)])
def test_strided_conv_pads_as_told(padding, height, width):
  rng = np.random.default_rng(0)
  x, kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in
                     ((2, height, width, 3), (3, 3, 3, 4), (4,)))
  with jax.default_matmul_precision('highest'):
    actual = conv3x3(4, 'conv', 2, padding).apply(
        {'params': {'kernel': kernel, 'bias': bias}}, x)
  expected = numpy_conv3x3(x, kernel, bias, 2, padding)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('padding', [(0, 1), (1, 1)])
def test_unet_downsamples_with_its_padding(padding):
  config = dataclasses.replace(SMALLEST, downsample_padding=padding)
  params = unet_oracle.from_state_dict(config, random_state_dict(config))
  x, t, _ = unet_oracle.random_inputs(config, 8, 12, seed=0)

  def captured(module, method):
    return module.name in ('down.0.block.0', 'down.0.downsample.conv')

  run = jax.jit(functools.partial(
      UNet(config).apply, capture_intermediates=captured))
  with jax.default_matmul_precision('highest'):
    seen = run({'params': params}, x, t)[1]['intermediates']

  before, after = (seen[name]['__call__'][0] for name in
                   ('down.0.block.0', 'down.0.downsample.conv'))
  layer = params['down.0.downsample.conv']
  np.testing.assert_allclose(
      after, numpy_conv3x3(np.asarray(before), layer['kernel'], layer['bias'],
                           2, padding), atol=1e-5)


def test_scale_shift_doubles_the_time_projection():
  shapes = unet_oracle.state_dict_shapes(UNetConfig(
      time_injection='scale_shift'))
  assert shapes['mid.block_1.temb_proj.weight'] == (512, 512)
  assert shapes['down.0.block.0.temb_proj.weight'] == (256, 512)
  plain = unet_oracle.state_dict_shapes(CIFAR10)
  assert {name for name in plain if plain[name] != shapes[name]} == {
      name for name in plain if 'temb_proj' in name}


def test_resblock_resampling_replaces_the_convs_by_blocks():
  plain = unet_oracle.state_dict_shapes(CIFAR10)
  shapes = unet_oracle.state_dict_shapes(UNetConfig(resample='resblock'))
  gone = {name.rsplit('.', 2)[0] for name in plain.keys() - shapes.keys()}
  assert gone == {f'down.{i}.downsample' for i in (0, 1, 2)} | {
      f'up.{i}.upsample' for i in (1, 2, 3)}
  new = shapes.keys() - plain.keys()
  assert {name.rsplit('.', 2)[0] for name in new} == gone
  assert {name.split('.', 3)[3] for name in new} == {
      f'{part}.{leaf}' for part in
      ('norm1', 'conv1', 'temb_proj', 'norm2', 'conv2')
      for leaf in ('weight', 'bias')}


@pytest.mark.slow
def test_heads_change_the_output_and_no_parameter():
  configs = (SMALLEST, dataclasses.replace(SMALLEST, num_heads=2),
             dataclasses.replace(SMALLEST, head_channels=4))
  state = random_state_dict(SMALLEST)
  inputs = unet_oracle.random_inputs(SMALLEST, 8, 12, seed=0)
  one, two, width = (unet_oracle.apply(config, state, *inputs)
                     for config in configs)
  assert unet_oracle.rel_l2(two, one) > 1e-3
  np.testing.assert_array_equal(two, width)  # 8 channels in heads of 4


@pytest.mark.slow
def test_labels_change_the_output():
  config = dataclasses.replace(SMALLEST, num_classes=5)
  state = random_state_dict(config)
  x, t, labels = unet_oracle.random_inputs(config, 8, 12, seed=0)
  one, other = (unet_oracle.apply(config, state, x, t, chosen)
                for chosen in (labels, (labels + 1) % 5))
  assert unet_oracle.rel_l2(one, other) > 1e-3


@pytest.mark.slow
def test_dropout_acts_in_training_only():
  state = random_state_dict(SMALLEST)
  params = {'params': unet_oracle.from_state_dict(SMALLEST, state)}
  x, t, _ = unet_oracle.random_inputs(SMALLEST, 8, 12, seed=0)
  plain = unet_oracle.apply(SMALLEST, state, x, t)
  train = jax.jit(functools.partial(UNet(SMALLEST).apply, train=True))
  first, second, again = (
      train(params, x, t, rngs={'dropout': jax.random.key(seed)})
      for seed in (0, 1, 0))
  assert unet_oracle.rel_l2(first, plain) > 1e-2
  assert unet_oracle.rel_l2(first, second) > 1e-2
  np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize('fields, message', [
    ({'image_size': 36}, r'image side 36.*4 levels.*multiples of 8.*32 or 40'),
    ({'image_size': 4}, r'image side 4.*8 or 16'),
    ({'ch': 48, 'norm_groups': 32}, 'ch=48 x ch_mult=1.*norm_groups=32'),
    ({'ch': 16, 'ch_mult': (2, 4)}, 'ch=16 x ch_mult=1.*norm_groups=32'),
    ({'resample': 'pool'}, "resample='pool'.*'conv', 'resblock'"),
    ({'time_injection': 'mul'}, "time_injection='mul'.*'scale_shift'"),
    ({'time_order': 'sin'}, "time_order='sin'.*'cos_sin'"),
    ({'num_heads': 2, 'head_channels': 64}, 'num_heads=2.*head_channels=64'),
    ({'num_heads': 3}, '256 channels: not a multiple of num_heads=3'),
    ({'head_channels': 96}, '256 channels.*of head_channels=96'),
])
def test_config_rejects_contradictions(fields, message):
  with pytest.raises(ValueError, match=message):
    UNetConfig(**fields)


@pytest.mark.parametrize('height, width', [(20, 32), (32, 36), (0, 32)])
def test_unet_rejects_sizes_it_cannot_halve(height, width):
  with pytest.raises(ValueError, match='take multiples of 8'):
    jax.eval_shape(UNet(CIFAR10).init, jax.random.key(0),
                   jnp.zeros((1, height, width, 3)), jnp.zeros(1))


@pytest.mark.parametrize('config', [
    CIFAR10, CELEBA64, unet_oracle.TINY_RELATIVE])
def test_config_survives_json(config):
  loaded = UNetConfig(**json.loads(json.dumps(config.to_dict())))
  assert loaded == config
  assert hash(loaded) == hash(config)
