"""Files with something odd in them are read, or told what they are."""

import collections
import dataclasses
import json
import pickle
import struct

import checkpoints
import families
import foreign
import numpy as np
import pytest
import torch_writer
import yaml

from msfp_jax import convert
from msfp_jax.convert import contents
from msfp_jax.convert import load
from msfp_jax.convert import native
from msfp_jax.convert import source
from msfp_jax.convert import torch_file
from msfp_jax.convert.tensors import LazyTensor

BOM = b'\xef\xbb\xbf'
TENSOR = np.arange(6, dtype=np.float32).reshape(2, 3)


class Call:
  """Pickled as the call of a name."""

  def __init__(self, name, *args):
    self.name, self.args = name, args

  def __reduce__(self):
    return self.name, self.args


def with_calls(make, *names):
  """Content of `torch_writer`: make(call), call(name, *args) being a Call."""
  return lambda made: make(lambda name, *args: Call(made[name], *args))


# What torch writes for tensors of other forms: (name, arguments, what is said).
SHAPE, UTILS = (2, 3), 'torch._utils.'
FORMS = {
    'sparse': (UTILS + '_rebuild_sparse_tensor', (
        'torch.sparse_coo', (TENSOR, TENSOR, SHAPE, True)), 'to_dense'),
    'sparse rows': (UTILS + '_rebuild_sparse_tensor', (
        'torch.sparse_csr', (TENSOR, TENSOR, TENSOR, SHAPE)), 'to_dense'),
    'quantized': (UTILS + '_rebuild_qtensor', (
        TENSOR, 0, SHAPE, (3, 1), (), False, {}), 'dequantize'),
    'of no values': (UTILS + '_rebuild_meta_tensor_no_storage', (
        'torch.float32', SHAPE, (3, 1), False), 'meta device'),
    'of a class': (UTILS + '_rebuild_wrapper_subclass', (
        'a.B', 'torch.float32', SHAPE, (3, 1), 0), 'plain tensor'),
    'of another type': (UTILS + '_rebuild_tensor_v3', (
        None, 0, SHAPE, (3, 1), False, {}, 'float8'), 'type .*float8.*float16'),
    'nested': (UTILS + '_rebuild_nested_tensor', (TENSOR, TENSOR), 'nested'),
    'of a device': (UTILS + '_rebuild_device_tensor_from_numpy', (
        TENSOR, 'float32', 'xla:0', False), 'cpu'),
    'expanded': (UTILS + '_rebuild_tensor_v2', None, 'contiguous'),
    'turned': (UTILS + '_rebuild_tensor_v2', None, 'resolve_conj'),
}


def odd_of(form):
  """Content with a tensor of a form, and the names that it needs."""
  name, args, said = FORMS[form]
  if form == 'expanded':
    return np.broadcast_to(np.float32([1, 2, 3]), SHAPE), [], said
  if form == 'turned':
    # As of a conjugated complex tensor's imaginary part.
    return lambda call: call(name, torch_writer._Base(TENSOR), 0, SHAPE, (3, 1),
                             False, {}, {'neg': True}), [name], said
  return lambda call: call(name, *args), [name], said


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('save', torch_writer.SAVERS.values(),
                         ids=torch_writer.SAVERS)
def test_tensors_of_other_forms_are_left_alone_and_named(tmp_path, save, form):
  """Beside a model they do no harm; in it they are refused by name."""
  path, state = tmp_path / 'm.pth', {'w': TENSOR}
  odd, names, said = odd_of(form)
  make = odd if callable(odd) else lambda call: odd
  save(path, with_calls(lambda call: {'odd': make(call), **state}, *names),
       extra=[name for name in names if not name.endswith('_v2')])
  tensors = source.open_source(path).tensors
  np.testing.assert_array_equal(tensors['w'].read(), TENSOR)
  assert tensors['odd'].shape in (SHAPE, ())
  with pytest.raises(ValueError, match=said):
    tensors['odd'].read()


@pytest.mark.parametrize('kind', ['QInt8Storage', 'UntypedStorage'])
def test_storages_of_other_types_do_not_hide_what_follows(tmp_path, kind):
  """In one stream their bytes have to be counted."""
  odd = np.arange(5, dtype=np.uint8)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(torch_writer._STORAGES, 'uint8', kind)
    torch_writer.save_legacy(tmp_path / 'f', {'odd': odd, 'w': TENSOR})
  np.testing.assert_array_equal(
      torch_file.load(tmp_path / 'f')['w'].read(), TENSOR)


def test_a_tensor_with_attributes_is_a_tensor(tmp_path):
  """torch keeps the class of one that someone gave attributes."""
  wrapper, plain = 'torch._tensor._rebuild_from_type_v2', UTILS + (
      '_rebuild_tensor_v2')
  kinds = ('torch.nn.parameter.Parameter', 'a.Rotated')

  def content(made):
    return {kind: Call(made[wrapper], made[plain], made[kind], (
        torch_writer._Base(TENSOR), 0, SHAPE, (3, 1), False, {}),
                       {'tag': 'x'}) for kind in kinds}

  torch_writer.save_zip(tmp_path / 'f', content, extra=[wrapper, *kinds])
  loaded = torch_file.load(tmp_path / 'f')
  np.testing.assert_array_equal(loaded[kinds[0]].read(), TENSOR)
  with pytest.raises(ValueError, match='is a a.Rotated: save its values'):
    loaded[kinds[1]].read()


@pytest.mark.slow
def test_a_model_that_needs_an_odd_tensor_names_it(tmp_path):
  state = dict(checkpoints.state_of('ddim'))
  bias, weight = 'mid.block_1.conv1.bias', 'conv_out.weight'
  name = UTILS + '_rebuild_sparse_tensor'
  wide = np.broadcast_to(np.float32(1), state[weight].shape)
  make = with_calls(lambda call: state | {weight: wide, bias: call(
      name, 'torch.sparse_coo', (TENSOR, TENSOR, state[bias].shape))})
  torch_writer.save_zip(tmp_path / 'm.pth', make, extra=[name])
  with pytest.raises(ValueError) as error:
    convert.load_pretrained(str(tmp_path / 'm.pth'))
  assert f'{bias} is sparse: save it with .to_dense()' in str(error.value)
  assert f'{weight} is an expanded view' in str(error.value)
  assert 'missing' not in str(error.value)
  # Also where nothing but its shape is asked for, which is not known.
  name = UTILS + '_rebuild_nested_tensor'
  torch_writer.save_zip(tmp_path / 'm.pth', with_calls(
      lambda call: state | {'conv_in.weight': call(name, TENSOR)}, name),
                        extra=[name])
  with pytest.raises(ValueError, match='conv_in.weight is nested: save'):
    convert.load_pretrained(str(tmp_path / 'm.pth'))


def safetensors_with(path, tensors, odd):
  """Writes a file with one more tensor, of a type that NumPy does not have."""
  native.write_safetensors(path, tensors, {})
  content = path.read_bytes()
  length, = struct.unpack('<Q', content[:8])
  header = json.loads(content[8:8 + length])
  end = len(content) - 8 - length
  header[odd] = {'dtype': 'F8_E4M3', 'shape': [4],
                 'data_offsets': [end, end + 4]}
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text
                   + content[8 + length:] + bytes(4))


def test_a_type_of_safetensors_that_nobody_needs(tmp_path):
  path, config = tmp_path / 'm.safetensors', families.CONFIGS['ldm_beds']
  checkpoints.write_yaml(path, config)
  tensors = foreign.ldm_checkpoint(
      checkpoints.state_of('ldm_beds'), config)['state_dict']
  safetensors_with(path, tensors, 'cond_stage_model.transformer.weight')
  assert convert.load_pretrained(str(path))[0].config == config
  odd = 'model.diffusion_model.out.2.bias'
  del tensors[odd]
  safetensors_with(path, tensors, odd)
  with pytest.raises(ValueError, match='conv_out.bias has type F8_E4M3: '):
    convert.load_pretrained(str(path))


def test_whoever_reads_a_refused_tensor_is_told_file_and_name(tmp_path):
  """Readers that look at shapes alone, as of classifiers, come so far."""
  safetensors_with(tmp_path / 'm.safetensors', {'a': np.ones(4)}, 'odd')
  call = with_calls(lambda call: {'a': TENSOR, 'odd': call(
      UTILS + '_rebuild_sparse_tensor', 'torch.sparse_coo',
      (TENSOR, TENSOR, SHAPE))}, UTILS + '_rebuild_sparse_tensor')
  torch_writer.save_zip(tmp_path / 'm.pt', call,
                        extra=[UTILS + '_rebuild_sparse_tensor'])
  for file, why in (('m.safetensors', 'has type'), ('m.pt', 'is sparse')):
    tensors = source.open_source(tmp_path / file).tensors
    with pytest.raises(ValueError, match=rf'{tmp_path}/{file}: odd {why}'):
      tensors['odd'].read()


@pytest.mark.parametrize('value', [np.float32(1), np.zeros((0, 3, 3, 3)),
                                   np.ones(3)], ids=['scalar', 'empty', 'flat'])
@pytest.mark.parametrize('name', ['conv_in.weight', 'conv_out.weight'])
def test_a_weight_without_axes_is_named(tmp_path, name, value):
  """Where the shapes tell the configuration, in each family's names."""
  state = dict(checkpoints.state_of('ddim')) | {
      name: np.asarray(value, np.float32)}
  torch_writer.save_zip(tmp_path / 'm.pth', state)
  with pytest.raises(ValueError, match=rf'(?s)m.pth.*\s{name}'):
    convert.load_pretrained(str(tmp_path / 'm.pth'))


@pytest.mark.parametrize('family, rename', [
    ('ldm', foreign.ldm), ('diffusers', foreign.diffusers),
    ('ddim', lambda state, config: state)])
@pytest.mark.parametrize('odd', [(), (0, 0, 3, 3), (4,)])
def test_whatever_tells_the_configuration_is_named(family, rename, odd):
  """Each weight in turn, that is no weight: looked at and named, or not."""
  config = families.CONFIGS['ldm_class']
  if family != 'ldm':
    config = dataclasses.replace(config, context_classes=None)
  tensors = {name: LazyTensor.of(value) for name, value in rename(
      families.state_of(config), config).items()}
  named = set()
  for name in tensors:
    changed = tensors | {name: LazyTensor.of(np.zeros(odd, np.float32))}
    try:
      load.FAMILIES[family].config(changed, None)
    except ValueError as error:
      named |= {name} if str(error).startswith(f'{name} ') else set()
  assert named


def whole_model(made):
  model = made['mine.nets.UNet']()
  model._parameters = {'w': 1}
  return model


@pytest.mark.parametrize('content', [
    whole_model, lambda made: {'model': whole_model(made), 'epoch': 3},
    lambda made: {'state_dict': whole_model(made), 'opt': {'state': TENSOR}}])
def test_a_whole_model_is_told(tmp_path, content):
  torch_writer.save_zip(
      tmp_path / 'm.pt', content, extra=['mine.nets.UNet'])
  with pytest.raises(ValueError, match='m.pt.*whole objects, made by mine.nets.'
                                       r'UNet.*torch.save\(model.state_dict'):
    convert.load_pretrained(str(tmp_path / 'm.pt'))


class Plain:
  """An array that pickle writes by itself."""

  def __init__(self, array):
    self.array = array

  def __reduce__(self):
    return self.array.__reduce__()


def test_dicts_of_numpy_arrays_are_told(tmp_path):
  arrays = {'conv_in': {'weight': Plain(TENSOR)}, 'bias': Plain(TENSOR)}
  torch_writer.save_zip(tmp_path / 'm.pt', arrays)
  (tmp_path / 'n.pt').write_bytes(pickle.dumps(arrays, 2))
  np.savez(tmp_path / 'o.npz', a=TENSOR, b=TENSOR)
  for name in ('m.pt', 'n.pt', 'o.npz'):
    with pytest.raises(ValueError, match=rf'{name}.*2 NumPy arrays, such as .*'
                                         'safetensors.numpy.save_file'):
      convert.load_pretrained(str(tmp_path / name))


def test_what_is_told_of_content_is_bounded():
  """Shared parts of a pickle can stand for any number of entries."""
  tree = contents.Opaque('a.B')
  for _ in range(60):
    tree = {'x' * 9_000: tree, ('y' * 9_000,) * 30: tree}
  assert len(contents.told([tree] * 100_000)) < 1000
  assert contents.told(collections.OrderedDict(a=[1, 'b', None])) == ''


def test_configurations_may_begin_with_a_byte_order_mark(tmp_path):
  """As editors of Windows write it, in every kind of configuration."""
  def mark(path):
    path.write_bytes(BOM + path.read_bytes())

  config, state = families.CONFIGS['unet2d'], checkpoints.state_of('unet2d')
  checkpoints.SAVE['diffusers_shards'](tmp_path / 'f', state, config)
  (tmp_path / 'f' / 'scheduler_config.json').write_text(json.dumps({
      '_class_name': 'DDIMScheduler', 'beta_start': 0.001}))
  for path in (tmp_path / 'f').glob('*.json'):
    mark(path)
  assert convert.load_pretrained(str(tmp_path / 'f'))[0].config == config
  assert convert.load_origin(str(tmp_path / 'f')).schedule[
      'beta_start'] == 0.001
  path = tmp_path / 'given.yaml'
  path.write_text(yaml.safe_dump({'a': 1}))
  mark(path)
  assert source.read_config(path) == {'a': 1}
