"""Packed models as files: everything comes back, nothing else gets in."""

import dataclasses
import functools
import json

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from packed_files import assert_equal
from packed_files import changed
from packed_files import rewrite
from packed_files import row_of
import pytest
import safetensors
import safetensors.numpy
import tiny
import toy
import unet_oracle

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.convert import native
from msfp_jax.models.guided import Guided
from msfp_jax.models.unet import UNet
from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant import roles as roles_lib
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Static

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


@pytest.mark.slow
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
        ['is of version 99', 'reads versions up to 5', 'pack the model again']),
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


class Plain(nn.Module):
  """One layer without bias."""

  @nn.compact
  def __call__(self, x, t):
    return nn.Dense(x.shape[-1], use_bias=False, name='only')(x)


def test_a_layer_with_no_number_for_an_output_channel(tmp_path):
  """Without bias, and with scales of groups: nothing is in the table."""
  params = {'only': {'kernel': np.linspace(-1, 1, 32 * 32, dtype=np.float32
                                           ).reshape(32, 32)}}
  spec = calibrate(Plain(), params, recipe='nvfp4', roles={'any': '.*'})
  packed = packed_lib.pack(Plain(), params, spec, tiny.PLAN)
  packed_file.save(tmp_path / 'plain', packed)
  assert_equal(packed_file.load(tmp_path / 'plain', model=Plain()), packed)


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


def test_what_fails_at_preparing_is_not_the_files_fault(saved, monkeypatch):
  def fail(*_):
    raise ValueError('no memory left')

  monkeypatch.setattr(kernels, 'prepare', fail)
  with pytest.raises(ValueError, match='^no memory left$'):
    packed_file.load(saved)


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
