"""Packed models as files: everything comes back, nothing else gets in."""

import dataclasses
import functools
import json
import pathlib

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny
import toy
import unet_oracle

from msfp_jax import diffusion
from msfp_jax.convert import native
from msfp_jax.models.guided import Guided
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant import roles as roles_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.numbers import int_format
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import Suppressed

BODY = 'down.0.block.0.conv1'


@functools.cache
def of_unet():
  """Packs the small UNet, every layer in 4 bits."""
  params = tiny.params(tiny.UNET)
  return packed_lib.pack(
      tiny.UNET, params, tiny.by_hand(params), tiny.PLAN)


@functools.cache
def of_toy():
  """Packs the toy: two banks, 3 bits, a layer in full precision."""
  return toy.deployed().packed()


@pytest.fixture
def saved(tmp_path):
  path = tmp_path / 'packed.safetensors'
  packed_file.save(path, of_unet(), command='python train.py')
  return path


def assert_equal(actual, expected):
  """Checks that two packed models are equal in everything."""
  for field in ('arrays', 'choices'):
    tiny.assert_trees_equal(getattr(actual, field), getattr(expected, field))
  assert actual.model == expected.model
  own = lambda model: [name for name, layer in model.layers.items()
                       if layer.weight is not None]
  assert own(actual) == own(expected)
  for field in ('timesteps', 'x_coef', 'eps_factor', 'noise_std'):
    np.testing.assert_array_equal(
        getattr(actual.plan, field), getattr(expected.plan, field))
  tiny.assert_trees_equal(
      vars(actual.plan.multistep) if actual.plan.multistep else {},
      vars(expected.plan.multistep) if expected.plan.multistep else {})


def test_there_and_back(saved):
  assert_equal(packed_file.load(saved), of_unet())


def test_banks_other_bits_and_full_precision_come_back(tmp_path):
  packed_file.save(tmp_path / 'toy', of_toy())
  loaded = packed_file.load(tmp_path / 'toy', model=toy.Toy())
  assert_equal(loaded, of_toy())
  assert {name: layer.weight and str(layer.weight.fmt)
          for name, layer in loaded.layers.items()} == {
              'conv_in': 'E2M1', 'temb': None, 'conv_out': 'E1M1'}
  assert loaded.layers['conv_in'].num_banks == 2
  predict = jax.jit(lambda arrays: loaded.with_arrays(arrays).eps_fn(
      jnp.ones((2, *toy.SHAPE)), jnp.full(2, 500.0), 1))
  np.testing.assert_array_equal(
      predict(loaded.arrays), predict(of_toy().arrays))


def test_8_bits_come_back(tmp_path):
  params = tiny.params(tiny.UNET)
  spec = tiny.by_hand(params)
  wide = spec.layers[BODY]
  spec.layers[BODY] = dataclasses.replace(
      wide, weight=wide.weight.replace(fmt=FPFormat.parse('E3M4')),
      act=wide.act.replace(fmt=FPFormat.parse('UE4M4')))
  model = packed_lib.pack(tiny.UNET, params, spec, tiny.PLAN)
  packed_file.save(tmp_path / 'model', model)
  loaded = packed_file.load(tmp_path / 'model')
  assert_equal(loaded, model)
  assert loaded.layers[BODY].weight.data.shape[-2] == 8  # a byte each


def test_a_guided_model_and_a_multistep_sampler_come_back(tmp_path):
  config = dataclasses.replace(
      tiny.CONFIG, num_classes=4)
  unet = UNet(config)
  params = unet_oracle.from_state_dict(config, unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=0))
  plan = diffusion.make_plan(tiny.SCHEDULE, 'dpm_solver', num_steps=4)
  assert plan.multistep is not None
  model = packed_lib.pack(
      Guided(unet, 1.5, 3), params, tiny.by_hand(params), plan)
  packed_file.save(tmp_path / 'model', model)
  assert_equal(packed_file.load(tmp_path / 'model'), model)


def test_equal_models_are_equal_files(saved, tmp_path):
  packed_file.save(tmp_path / 'again', packed_file.load(saved),
                   command='python train.py')
  assert (tmp_path / 'again').read_bytes() == saved.read_bytes()


def test_the_file_is_what_other_tools_expect(saved):
  """Codes by the published table, two a byte; no other copy of the weights."""
  weight = of_unet().layers[BODY].weight
  with safetensors.safe_open(saved, 'np') as opened:
    metadata = opened.metadata()
    codes = opened.get_tensor(f'{BODY}.codes')
    names = set(opened.keys())
  assert metadata['format'] == 'msfp-jax/packed/2'
  assert metadata['command'] == 'python train.py'
  assert names == {f'{name}.codes' for name in of_unet().layers} | {'channels'}
  assert codes.dtype == np.uint8 and codes.shape == (1, 3, 3, 4, 8)
  table = np.array([0, .5, 1, 1.5, 2, 3, 4, 6])  # E2M1, OCP MX
  table = np.concatenate([table, -table])
  values = np.concatenate([table[codes & 15], table[codes >> 4]], axis=-2)
  params = tiny.params(tiny.UNET)['down.0.block.0']['conv1']
  scale = np.abs(params['kernel']).max((0, 1, 2)) / 6
  np.testing.assert_allclose(np.ravel(weight.scale), scale, rtol=1e-6)
  assert np.abs(values[0] * scale - params['kernel']).max() <= scale.max()
  row, = [row for row in json.loads(metadata['layers']) if row[0] == BODY]
  assert row[1:4] == ['E2M1', 8, 'sb']


def of_shapes(config):
  """Makes a model of zeros, with two banks in all layers of 4 bits."""
  shapes = native.abstract_params(UNet(config))
  wide = roles_lib.EXCEPTIONS['skip-8']
  layers = {}
  for name, (*window, length, outputs) in tiny.layers(config).items():
    eight = roles_lib.role_of(name) in wide
    rows, banks = (length, 1) if eight else (-(-length // 2), 2)
    weight = QTensor(
        np.zeros((banks, *window, rows, outputs), np.uint8),
        np.ones((1,) * (len(window) + 1) + (outputs,), np.float32),
        fmt=FPFormat.parse('E3M4' if eight else 'E2M1'), length=length,
        axis=-2, layout=layout_lib.BYTES if eight else layout_lib.NIBBLES)
    layers[name] = QLayer(
        weight, Static(FPFormat.parse('UE4M4' if eight else 'UE2M2'),
                       np.float32(0.25395936), np.float32(-0.27839136)),
        np.zeros(outputs, np.float32))
  params = traverse_util.unflatten_dict({
      path: np.zeros(leaf.shape, np.float32)
      for path, leaf in traverse_util.flatten_dict(shapes).items()
      if '.'.join(path[:-1]) not in layers})
  plan = diffusion.ddim_plan(tiny.SCHEDULE, 20)
  choices = {name: np.arange(20) % 2 for name, layer in layers.items()
             if layer.num_banks == 2}
  return packed_lib.PackedModel(UNet(config), params, layers, choices, plan)


@pytest.mark.parametrize('config, limit', [
    (native.load_pretrained('digits16')[0].config, 4.3),
    (tiny.CIFAR10, 4.1)], ids=['digits', 'cifar10'])
def test_bits_of_a_weight_and_bank(tmp_path, config, limit):
  """The bits of a file, everything counted: header, scales, normalizations."""
  path = tmp_path / 'model'
  packed_file.save(path, of_shapes(config), command=(
      'python train.py --config=configs/digits.py:demo --workdir=runs/demo'))
  weights = sum(np.prod(shape) for shape in tiny.layers(config).values())
  assert 4 < 8 * path.stat().st_size / (2 * weights) <= limit


def rewrite(path, change_tensors=lambda tensors: None,
            change_header=lambda header: None):
  """Changes a file in ways that save never would."""
  with safetensors.safe_open(path, 'np') as opened:
    header = opened.metadata()
    tensors = {key: opened.get_tensor(key) for key in opened.keys()}
  version, command = header.pop('format'), header.pop('command', '')
  header = {key: json.loads(value) for key, value in header.items()}
  header['format'] = version
  change_tensors(tensors)
  change_header(header)
  path.write_bytes(safetensors.numpy.save(tensors, {'command': command} | {
      key: value if key == 'format' else json.dumps(value)
      for key, value in header.items()}))


def row_of(header, name):
  return next(row for row in header['layers'] if row[0] == name)


def changed(key, value):
  return lambda tensors: tensors.update({key: value})


CHANGES = {
    'codes that are missing': (
        lambda tensors: tensors.pop(f'{BODY}.codes'), None,
        [f'missing {BODY}.codes']),
    'codes of another shape': (
        changed(f'{BODY}.codes', np.zeros((1, 3, 3, 5, 8), np.uint8)), None,
        [f'{BODY}.codes is uint8 (1, 3, 3, 5, 8), expected']),
    'codes of another type': (
        changed(f'{BODY}.codes', np.zeros((1, 3, 3, 4, 8), np.float32)), None,
        [f'{BODY}.codes is float32']),
    'codes without banks': (
        changed(f'{BODY}.codes', np.zeros((4, 8), np.uint8)), None,
        [f'{BODY}.codes is uint8 (4, 8)']),
    'no banks': (
        changed(f'{BODY}.codes', np.zeros((0, 3, 3, 4, 8), np.uint8)), None,
        [f'{BODY}.codes is empty']),
    'a window that the model lacks': (
        changed(f'{BODY}.codes', np.zeros((1, 5, 5, 4, 8), np.uint8)), None,
        [f'{BODY} is (5, 5, 8, 8), the model wants (3, 3, 8, 8)']),
    'two problems at once': (
        lambda tensors: (tensors.pop(f'{BODY}.codes'),
                         tensors.pop('conv_in.codes')), None,
        [f'missing {BODY}.codes', 'missing conv_in.codes']),
    'channels that are too few': (
        lambda tensors: tensors.update(channels=tensors['channels'][1:]), None,
        ['channels is float32']),
    'channels that are not finite': (
        lambda tensors: tensors.update(channels=tensors['channels'] * np.nan),
        None, ['channels holds values that are not finite']),
    'scales below 0': (
        lambda tensors: tensors.update(channels=-abs(tensors['channels'])),
        None, [f'layer {BODY}: scale holds values below 0']),
    'tensors of nothing': (
        changed('extra', np.zeros(3, np.float32)), None,
        ['unexpected extra (3,)']),
    'a layer missing from the header': (
        None, lambda header: header['layers'].remove(row_of(header, BODY)),
        [f'missing layer {BODY}', f'unexpected {BODY}.codes']),
    'a layer that the model lacks': (
        None, lambda header: row_of(header, BODY).__setitem__(0, 'other'),
        [f'missing layer {BODY}', 'layer other, which the model lacks']),
    'a layer without bias': (
        None, lambda header: row_of(header, BODY).__setitem__(3, 's'),
        ['channels is float32']),
    'a layer without scale': (
        None, lambda header: row_of(header, BODY).__setitem__(3, 'zb'),
        [f'missing {BODY}.scale']),
    'a parameter that is missing': (
        None, lambda header: header['vectors'].pop('norm_out/scale'),
        ['missing norm_out/scale (8,)']),
    'an input without scale': (
        None, lambda header: row_of(header, BODY)[4].__setitem__(1, 0.0),
        ['describes no packed model', 'scale and zero point']),
    'an unknown format': (
        None, lambda header: row_of(header, BODY).__setitem__(1, 'E9M9'),
        ['describes no packed model', 'E9M9']),
    'another model': (
        None, lambda header: header['model']['unet'].update(ch=16),
        [f'{BODY} is (3, 3, 8, 8), the model wants (3, 3, 16, 16)']),
    'a model of another version': (
        None, lambda header: header['model']['unet'].update(depth=16),
        ['describes no packed model', 'depth']),
    'no model': (
        None, lambda header: header.update(model={}), ['load(path, model=']),
    'no plan': (
        None, lambda header: header.pop('plan'),
        ['describes no packed model', 'plan']),
    'an odd plan': (
        None, lambda header: header['plan']['x_coef'].pop(),
        ['unequal lengths']),
    'sizes below 0': (
        None, lambda header: header['vectors'].update({'norm_out/scale': -9}),
        ['norm_out/scale']),
    'sizes beyond all memory': (
        None, lambda header: header['vectors'].update(
            {'norm_out/scale': 10**15}), ['channels is float32']),
    'a list for a header': (
        None, lambda header: header.update(layers=3),
        ['describes no packed model']),
    'another version': (
        None, lambda header: header.update(format='msfp-jax/packed/99'),
        ['is of version 99', 'reads version 2', 'pack the model again']),
    'another kind of file': (
        None, lambda header: header.update(format='msfp-jax/model/1'),
        ["'msfp-jax/model/1', expected 'msfp-jax/packed/2'"]),
}


@pytest.mark.parametrize('tensors, header, parts', CHANGES.values(),
                         ids=CHANGES)
def test_what_does_not_fit_is_named(saved, tensors, header, parts):
  rewrite(saved, *(change or (lambda _: None) for change in (tensors, header)))
  with pytest.raises(ValueError) as error:
    packed_file.load(saved)
  for part in [str(saved), *parts]:
    assert part in str(error.value), error.value


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_a_truncated_file(saved, size):
  saved.write_bytes(saved.read_bytes()[:size])
  with pytest.raises(ValueError, match='is no safetensors file'):
    packed_file.load(saved)


def test_no_file(tmp_path):
  with pytest.raises(FileNotFoundError, match='no packed model at .*nowhere'):
    packed_file.load(tmp_path / 'nowhere')


@pytest.mark.parametrize('table, part', [
    (np.full((1, 2), 2, np.uint8), 'bank 2 of layer conv_in, which has 2'),
    (np.zeros((1, 3), np.uint8), r'choices is uint8 \(1, 3\)'),
    (np.zeros((1, 2), np.int32), 'choices is int32')])
def test_banks_that_do_not_exist(tmp_path, table, part):
  packed_file.save(tmp_path / 'toy', of_toy())
  rewrite(tmp_path / 'toy', changed('choices', table))
  with pytest.raises(ValueError, match=part):
    packed_file.load(tmp_path / 'toy', model=toy.Toy())


def test_a_model_of_ones_own_must_be_passed(tmp_path):
  packed_file.save(tmp_path / 'toy', of_toy())
  with pytest.raises(ValueError, match=r'load\(path, model='):
    packed_file.load(tmp_path / 'toy')


def test_an_unknown_implementation(saved):
  with pytest.raises(ValueError, match="'cuda': must be one of"):
    packed_file.load(saved, implementation='cuda')


def test_a_format_that_the_kernels_lack(tmp_path):
  """A kernel asked for by name says why not; nothing else runs in silence."""
  packed_file.save(tmp_path / 'toy', of_toy())
  loaded = packed_file.load(
      tmp_path / 'toy', model=toy.Toy(), implementation='mosaic_tpu')
  with pytest.raises(ValueError, match=(
      "layer conv_out: implementation 'mosaic_tpu': .*E1M1")):
    jax.eval_shape(
        lambda x: loaded.eps_fn(x, jnp.zeros(1), 0), jnp.ones((1, *toy.SHAPE)))


def with_layout(model, layout):
  layer = model.layers[BODY]
  return dataclasses.replace(model, layers=model.layers | {
      BODY: layer.replace(weight=layer.weight.replace(layout=layout))})


class Hopper(layout_lib.Layout):
  """A chip's own layout."""


@pytest.mark.parametrize('change, part', [
    (lambda model: with_layout(model, Hopper()),
     f'layer {BODY} is stored as hopper'),
    (lambda model: packed_lib.simulate(
        tiny.UNET, tiny.params(tiny.UNET),
        tiny.by_hand(tiny.params(tiny.UNET)), tiny.PLAN),
     'is not packed: save what pack returned'),
    (lambda model: dataclasses.replace(
        model, params={'a/b': np.zeros(2, np.float32)}), "'a/b'"),
    (lambda model: dataclasses.replace(
        model, params={'channels': np.zeros(2, np.float32)}), "'channels'"),
    (lambda model: dataclasses.replace(
        model, choices={BODY: np.array([0, 256])}), '257 banks')])
def test_what_cannot_be_saved_writes_nothing(tmp_path, change, part):
  with pytest.raises(ValueError, match=part):
    packed_file.save(tmp_path / 'model', change(of_unet()))
  assert not list(tmp_path.iterdir())


def layer_of(weight, act=None, around=None):
  return spec_lib.LayerSpec('', '', weight, act or Full(), around)


def signed(bits):
  return FPFormat(2, bits - 3)


def of_weights(quantizer_of, around_of=lambda shape: None, **options):
  """Packs the toy with one kind of weights: {kernel's shape: quantizer}.

  An odd number of inputs and of codes, and windows of 3 and of 1.
  """
  rng = np.random.default_rng(0)
  model = Odd()
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(
      (1, 4, 4, 5)), jnp.zeros(1))['params']
  params = jax.tree.map(
      lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
  spec = spec_lib.QuantSpec('mine', {
      name: layer_of(quantizer_of(params[name]['kernel']),
                     around=around_of(params[name]['kernel'].shape), **options)
      for name in ('conv', 'dense')})
  return packed_lib.pack(model, params, spec, tiny.PLAN)


class Odd(nn.Module):

  @nn.compact
  def __call__(self, x, t):
    x = nn.Conv(7, (3, 3), name='conv')(x)
    return nn.Dense(5, name='dense')(nn.silu(x))


def per_channel(fmt):
  """Makes kernel -> a static quantizer with a scale for every output."""
  def make(kernel):
    axes = tuple(range(kernel.ndim - 1))
    low, high = (f(np.asarray(kernel), axes, keepdims=True)
                 for f in (np.min, np.max))
    if fmt.signed:
      return Static(fmt, jnp.asarray(np.maximum(high, -low) / fmt.max))
    return Static(fmt, jnp.asarray((high - low) / fmt.max), jnp.asarray(low))
  return make


# Weights -> bits of their scales and zero points, of both layers together:
# 9 x 5 x 7 and 7 x 5 elements; groups of 2 of 5 and 7 inputs are 3 and 4.
GROUPS = 9 * 3 * 7 + 4 * 5
WEIGHTS = {
    **{f'signed, {bits} bits': (bits, per_channel(signed(bits)), 32 * 12)
       for bits in range(3, 9)},
    **{f'INT, {bits} bits': (bits, per_channel(int_format(bits)), 64 * 12)
       for bits in (3, 4, 6, 8)},
    **{f'blocks, {bits} bits': (
        bits, lambda _, bits=bits: Block(signed(bits), group=2), 32 * GROUPS)
       for bits in (3, 4, 6, 8)},
    'NVFP4': (4, lambda _: Block(signed(4), group=2, scale_type='e4m3',
                                 two_level=True), 8 * GROUPS + 2 * 32),
    'MXFP6': (6, lambda _: Block(signed(6), group=2, scale_type='e8m0'),
              8 * GROUPS),
    'groups under bfloat16': (
        4, lambda _: Block(signed(4), group=2, scale_type='bf16'),
        16 * GROUPS),
    'groups and zero points in bfloat16': (
        5, lambda _: Block(int_format(5), group=2, scale_type='bf16'),
        2 * 16 * GROUPS),
    'blocks with zero points': (
        5, lambda _: Block(int_format(5), group=2), 64 * GROUPS),
    'one scale': (5, lambda _: Static(signed(5), jnp.float32(0.3)), 2 * 32),
    'a scale for every tensor': (
        7, lambda _: Block(signed(7), shared='tensor'), 2 * 32),
    'a scale for every tap and output': (
        5, lambda _: Block(signed(5), shared='token'), 32 * (9 * 7 + 5)),
    # FLAGs of 3 bits, in groups of 2 as well.
    'without leading zeros': (4, lambda _: Suppressed(
        Block(FPFormat.parse('E1M6'), shared='channel'), group=2),
        3 * GROUPS + 32 * 12),
}


@pytest.mark.parametrize('bits, weight, scales', WEIGHTS.values(), ids=WEIGHTS)
def test_weights_come_back_bit_for_bit_in_the_bytes_stated(
    tmp_path, bits, weight, scales):
  """Codes, scales and biases; bytes by hand, and by the file's tensors."""
  model = of_weights(weight)
  path = tmp_path / 'model'
  packed_file.save(path, model)
  loaded = packed_file.load(path, model=Odd())
  assert_equal(loaded, model)
  for name, layer in model.layers.items():
    ours, theirs = loaded.layers[name].weight, layer.weight
    np.testing.assert_array_equal(ours.codes(), theirs.codes())
    np.testing.assert_array_equal(
        ours.bank(0).dequantize(), theirs.bank(0).dequantize())
  sizes = [9 * 5 * 7, 7 * 5]
  by_hand = sum(size * bits for size in sizes) + scales + 32 * 12
  assert model.stored_bytes == loaded.stored_bytes == -(-by_hand // 8)
  with safetensors.safe_open(path, 'np') as opened:
    tensors = {key: opened.get_tensor(key) for key in opened.keys()}
  # Each layer's stream of codes ends with a byte of its own; nibbles pad an
  # odd number of inputs instead.
  padding = sum(-(-size * bits // 8) * 8 - size * bits for size in sizes)
  if bits == 4:
    padding = 4 * (9 * 7 + 5)
  padding += sum(-3 * layer.weight.shift.size % 8 for layer in
                 model.layers.values() if layer.weight.shift is not None)
  assert 8 * sum(t.nbytes for t in tensors.values()) == by_hand + padding


@pytest.mark.parametrize('weight', [
    Block(signed(4), shared='channel'), Block(int_format(6), shared='token'),
    Block(signed(4), group=2, scale_type='e4m3', two_level=True)])
def test_channels_of_zeros_come_back(tmp_path, weight):
  """Their scale is 0, and so are they."""
  model, params = One(), {'dense': {
      'kernel': jnp.ones((4, 3)).at[:, 1].set(0), 'bias': jnp.zeros(3)}}
  spec = spec_lib.QuantSpec('mine', {'dense': layer_of(weight)})
  packed = packed_lib.pack(model, params, spec, tiny.PLAN)
  packed_file.save(tmp_path / 'model', packed)
  loaded = packed_file.load(tmp_path / 'model', model=model)
  assert_equal(loaded, packed)
  values = loaded.layers['dense'].weight.dequantize()[0]
  np.testing.assert_array_equal(values[:, 1], 0)
  np.testing.assert_allclose(values[:, [0, 2]], 1, rtol=2**-4)


class One(nn.Module):

  @nn.compact
  def __call__(self, x, t):
    return nn.Dense(3, name='dense')(x)


PART_CHANGES = {
    'scales below 0': ('conv.scale', -1, 'conv: scale holds values below 0'),
    'scales that are NaN': (
        'conv.scale', np.nan, 'conv: scale holds values that are not finite'),
    'zero points that are infinite': (
        'conv.zero_point', np.inf,
        'conv: zero_point holds values that are not finite')}


@pytest.mark.parametrize('tensor, factor, part', PART_CHANGES.values(),
                         ids=PART_CHANGES)
def test_scales_of_groups_are_looked_at(tmp_path, tensor, factor, part):
  path = tmp_path / 'model'
  packed_file.save(path, of_weights(lambda _: Block(int_format(5), group=2)))
  rewrite(path, lambda tensors: tensors.update(
      {tensor: np.float32(tensors[tensor] * factor)}))
  with pytest.raises(ValueError, match=part):
    packed_file.load(path, model=Odd())


def test_shifts_take_three_bits_each(tmp_path):
  """A tensor of leading zeros shifted out, one shift for 2 inputs."""
  model = of_weights(lambda _: Block(signed(4), group=2))
  layer = model.layers['dense']
  shift = np.uint8(np.random.default_rng(0).integers(0, 5, (1, 4, 5)))
  weight = layer.weight.replace(
      shift=shift, shift_group=2, wide=FPFormat.parse('E2M5'))
  model = dataclasses.replace(model, layers=model.layers | {
      'dense': layer.replace(weight=weight)})
  before = of_weights(lambda _: Block(signed(4), group=2)).stored_bytes
  assert model.stored_bytes - before == -(-3 * 20 // 8)
  packed_file.save(tmp_path / 'model', model)
  loaded = packed_file.load(tmp_path / 'model', model=Odd())
  assert_equal(loaded, model)
  np.testing.assert_array_equal(loaded.layers['dense'].weight.shift, shift)
  with safetensors.safe_open(tmp_path / 'model', 'np') as opened:
    assert opened.get_tensor('dense.shift').shape == (8,)  # 60 bits


SHIFT_CHANGES = {
    'FLAGs that 8 bits do not hold': (
        lambda tensors: tensors.update(
            {'dense.shift': np.full(8, 0b01101101, np.uint8)}), None,
        'dense: shift holds 6, by which E1M2 leaves E1M6'),
    'FLAGs that are too few': (
        lambda tensors: tensors.update({'dense.shift': np.zeros(7, np.uint8)}),
        None, r'dense.shift is uint8 \(7,\), expected'),
    'FLAGs that are missing': (
        lambda tensors: tensors.pop('dense.shift'), None,
        'dense: shift is missing'),
    'groups of another size': (
        None, lambda header: row_of(header, 'dense')[5].update(shift_group=3),
        r'dense: shift_group 3: must be a power of two'),
    'no wider format': (
        None, lambda header: row_of(header, 'dense')[5].pop('wide'),
        'dense: shift of E1M2 to None'),
    'a wider format without a sign': (
        None, lambda header: row_of(header, 'dense')[5].update(wide='UE1M7'),
        'dense: shift of E1M2 to UE1M7'),
}


@pytest.mark.parametrize('tensors, header, part', SHIFT_CHANGES.values(),
                         ids=SHIFT_CHANGES)
def test_flags_out_of_range_are_named(tmp_path, tensors, header, part):
  path = tmp_path / 'model'
  packed_file.save(path, of_weights(lambda _: Suppressed(
      Block(FPFormat.parse('E1M6'), shared='channel'), group=2)))
  rewrite(path, *(change or (lambda _: None) for change in (tensors, header)))
  with pytest.raises(ValueError, match=part):
    packed_file.load(path, model=Odd())


def around_of(shape):
  rng = np.random.default_rng(len(shape))
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  *window, inputs, outputs = shape
  return Around(jnp.exp(draw(inputs)), jnp.bfloat16(draw(*window, inputs, 2)),
                jnp.bfloat16(draw(2, outputs)), rotation=1)


INPUTS = {
    'one scale': Static(FPFormat.parse('UE2M2'), jnp.float32(0.3),
                        jnp.float32(-0.3)),
    'by step': Static(FPFormat.parse('UE2M2'), jnp.asarray([0.1, 0.3, 0.5, 1]),
                      jnp.asarray([-1, -2, -3, -4.0]), by_step=True),
    'a group': Block(FPFormat.parse('E2M1'), group=4, scale_type='e4m3',
                     two_level=True),
    'a token': Block(int_format(5), shared='token'),
    'an image': Block(FPFormat.parse('E2M1'), shared='image'),
    'without leading zeros': Suppressed(Block(int_format(8), shared='token')),
    'none': Full(),
}


@pytest.mark.parametrize('act', INPUTS.values(), ids=INPUTS)
def test_inputs_and_what_stands_around_come_back(tmp_path, act):
  model = of_weights(per_channel(signed(4)), around_of, act=act)
  packed_file.save(tmp_path / 'model', model)
  loaded = packed_file.load(tmp_path / 'model', model=Odd())
  assert_equal(loaded, model)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 5)),
                  jnp.float32)
  np.testing.assert_array_equal(loaded.sample(x), model.sample(x))


AROUND_CHANGES = {
    'a branch of two ranks': (
        lambda t: t.update({'conv.up': t['conv.up'][:1]}), None,
        'conv.down of rank 2, conv.up of 1'),
    'half a branch': (
        lambda t: t.pop('conv.up'), None, 'missing conv.up'),
    'factors of other channels': (
        lambda t: t.update({'conv.smooth': np.ones(4, np.float32)}), None,
        r'conv.smooth is float32 \(4,\)'),
    'factors that are NaN': (
        lambda t: t.update({'conv.smooth': np.full(5, np.nan, np.float32)}),
        None, 'conv.smooth holds values that are not finite'),
    'a factor of 0': (
        lambda t: t.update({'conv.smooth': np.zeros(5, np.float32)}), None,
        'conv.smooth holds values that are not positive'),
    'a branch that is infinite': (
        lambda t: t.update({'conv.up': np.full(
            (2, 7), np.inf, jnp.bfloat16).view(np.uint8)}), None,
        'conv.up holds values that are not finite'),
    'a rotation that does not divide': (
        None, lambda h: row_of(h, 'conv')[5].update(rotation=2),
        'conv.rotation of 2 channels'),
    'another type': (
        None, lambda h: row_of(h, 'conv')[5]['types'].update(up='float64'),
        "conv.up of type 'float64'"),
    'groups of another size': (
        None, lambda h: row_of(h, 'dense')[5].update(group=3),
        'dense.scale'),
    'codes of another shape': (
        None, lambda h: row_of(h, 'dense')[5]['shape'].__setitem__(-1, 6),
        'dense.codes'),
}


@pytest.mark.parametrize('tensors, header, part', AROUND_CHANGES.values(),
                         ids=AROUND_CHANGES)
def test_what_does_not_fit_around_is_named(tmp_path, tensors, header, part):
  path = tmp_path / 'model'
  packed_file.save(path, of_weights(
      lambda _: Block(signed(6), group=2), lambda shape: around_of(
          shape).replace(rotation=0)))
  rewrite(path, *(change or (lambda _: None) for change in (tensors, header)))
  with pytest.raises(ValueError, match=part):
    packed_file.load(path, model=Odd())


# Files that version 1 wrote, as of commit efd5608, and what it computed.
GOLDEN = pathlib.Path(__file__).parent / 'golden'
SMALL = UNetConfig(
    image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1,),
    num_res_blocks=0, attn_resolutions=(), norm_groups=4, dropout=0.0)


@functools.cache
def version_1():
  with np.load(GOLDEN / 'version_1.npz') as arrays:
    return dict(arrays)


def assert_weight(layer, expected):
  """The same levels, by the codes; NumPy's values of the published table."""
  weight = layer.weight
  values = weight.fmt.values()[np.asarray(weight.codes())] * weight.scale
  if weight.zero_point is not None:
    values = values + weight.zero_point
  np.testing.assert_allclose(
      values, np.broadcast_to(expected, values.shape), rtol=1e-6, atol=1e-7)


def test_a_file_of_version_1_samples_as_its_simulation_did():
  """E2M1, INT in 8 bits, and a layer in full precision."""
  packed = packed_file.load(GOLDEN / 'packed_1.safetensors')
  assert packed.model == UNet(SMALL)
  assert packed.layers['conv_out'].weight is None
  for name in ('mid.block_1.conv1', 'temb.dense.0'):
    assert_weight(packed.layers[name], version_1()[f'weight {name}'])
  expected = version_1()['samples']
  np.testing.assert_allclose(
      packed.sample(tiny.noise(0, batch=2)), expected, rtol=1e-5,
      atol=1e-5 * np.abs(expected).max())


def test_banks_and_3_bits_of_version_1():
  """A byte for two codes of 3 bits, as files had them then."""
  packed = packed_file.load(
      GOLDEN / 'packed_1_banks.safetensors', model=toy.Toy())
  for name in ('conv_in', 'conv_out'):
    assert_weight(packed.layers[name], version_1()[f'banks weight {name}'])
  np.testing.assert_array_equal(packed.choices['conv_in'], [0, 1])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *toy.SHAPE)),
                  jnp.float32)
  np.testing.assert_allclose(
      packed.sample(x, key=jax.random.key(1)), version_1()['banks samples'],
      rtol=1e-5, atol=1e-5)


def test_a_file_of_version_1_saved_again_is_of_version_2(tmp_path):
  packed = packed_file.load(
      GOLDEN / 'packed_1_banks.safetensors', model=toy.Toy())
  packed_file.save(tmp_path / 'again', packed)
  with safetensors.safe_open(tmp_path / 'again', 'np') as opened:
    assert opened.metadata()['format'] == 'msfp-jax/packed/2'
    assert opened.get_tensor('conv_out.codes').shape == (14,)  # 36 x 3 bits
  assert_equal(packed_file.load(tmp_path / 'again', model=toy.Toy()), packed)


def test_a_spec_of_version_1_packs_to_what_version_1_packed():
  """Codes, scales and all; and it simulates as it did."""
  params = unet_oracle.from_state_dict(SMALL, unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(SMALL), seed=0))
  spec = spec_lib.QuantSpec.load(GOLDEN / 'spec_1.json')
  plan = diffusion.ddim_plan(tiny.SCHEDULE, 2)
  packed = packed_lib.pack(UNet(SMALL), params, spec, plan)
  written = packed_file.load(GOLDEN / 'packed_1.safetensors')
  for name, layer in written.layers.items():
    tiny.assert_trees_equal(packed.layers[name], layer)
  expected = version_1()['samples']
  np.testing.assert_allclose(
      packed_lib.simulate(UNet(SMALL), params, spec, plan).sample(
          tiny.noise(0, batch=2)), expected, rtol=1e-5,
      atol=1e-5 * np.abs(expected).max())
