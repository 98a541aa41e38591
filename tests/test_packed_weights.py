"""Weights and what stands around a product, there and back by a file."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import marks
import numpy as np
from packed_files import assert_equal
from packed_files import rewrite
from packed_files import row_of
import pytest
import safetensors
import safetensors.numpy
import tiny

from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.numbers import int_format
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import Suppressed

pytestmark = pytest.mark.optimized


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


@pytest.mark.parametrize('name', marks.quick(
    ('one scale', 'a group', 'without leading zeros'), INPUTS))
def test_inputs_and_what_stands_around_come_back(tmp_path, name):
  act = INPUTS[name]
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
