"""The project's own checkpoint file."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny

from msfp_jax.convert import native
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig


@pytest.fixture
def saved(tmp_path):
  path = tmp_path / 'model.safetensors'
  native.save_pretrained(path, tiny.UNET, tiny.params(tiny.UNET),
                         command='python train.py', seed='3')
  return path


def rewrite(path, change_tensors=lambda tensors: None,
            change_metadata=lambda metadata: None):
  """Changes a file in ways that save_pretrained never would."""
  with safetensors.safe_open(path, 'np') as opened:
    metadata = opened.metadata()
    tensors = {key: opened.get_tensor(key) for key in opened.keys()}
  for key in ('digest', 'header_digest'):  # to which all this is damage
    del metadata[key]
  change_tensors(tensors)
  change_metadata(metadata)
  path.write_bytes(safetensors.numpy.save(tensors, metadata))


def test_there_and_back(saved):
  model, params = native.load_pretrained(str(saved))
  assert model == tiny.UNET
  tiny.assert_trees_equal(params, tiny.params(tiny.UNET))
  assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
             for leaf in jax.tree.leaves(params))


def test_the_file_is_what_other_tools_expect(saved):
  """The file is plain safetensors: dotted names, the model in the header."""
  with safetensors.safe_open(saved, 'np') as opened:
    metadata, keys = opened.metadata(), set(opened.keys())
    kernel = opened.get_tensor('down.0.block.0.conv1.kernel')
  assert UNetConfig(**json.loads(metadata['model'])) == tiny.CONFIG
  assert metadata['command'] == 'python train.py' and metadata['seed'] == '3'
  assert {'conv_in.bias', 'temb.dense.1.kernel', 'norm_out.scale'} < keys
  np.testing.assert_array_equal(
      kernel, tiny.params(tiny.UNET)['down.0.block.0']['conv1']['kernel'])


def test_the_same_model_makes_the_same_file(saved):
  before = saved.read_bytes()
  for _ in range(3):  # safetensors itself shuffles the header
    native.save_pretrained(saved, tiny.UNET, tiny.params(tiny.UNET),
                           seed='3', command='python train.py')
    assert saved.read_bytes() == before


def test_a_model_with_classes(tmp_path):
  config = UNetConfig(
      image_size=8, ch=8, ch_mult=(1,), num_res_blocks=1, norm_groups=2,
      attn_resolutions=(), num_classes=3)
  params = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32),
                        native.abstract_params(UNet(config)))
  native.save_pretrained(tmp_path / 'm', UNet(config), params)
  model, loaded = native.load_pretrained(str(tmp_path / 'm'))
  assert model.config == config
  assert loaded['label_emb']['embedding'].shape == (3, 32)


def test_all_problems_are_listed_at_once(saved):
  def change(tensors):
    del tensors['conv_in.bias']
    tensors['head.kernel'] = np.zeros((2, 3), np.float32)
    tensors['conv_out.bias'] = np.zeros(4, np.float32)
    tensors['norm_out.scale'][1:3] = np.nan, np.inf

  rewrite(saved, change)
  with pytest.raises(ValueError) as error:
    native.load_pretrained(str(saved))
  lines = str(error.value).split('\n')
  assert str(saved) in lines[0]
  assert [line.strip() for line in lines[1:]] == [
      'conv_out.bias is (4,), the model wants (1,)',
      'missing conv_in.bias (8,)',
      'norm_out.scale holds 2 values that are not finite',
      'unexpected head.kernel (2, 3)']


@pytest.mark.parametrize('path', ['no/such.safetensors', 'digits17', '.'])
def test_no_file(path):
  with pytest.raises(FileNotFoundError, match='digits16'):
    native.load_pretrained(path)


def test_another_kind_of_file(tmp_path):
  path = tmp_path / 'model.safetensors'
  for content in (b'', b'PK\x03\x04 not ours', b'\xff' * 1000):
    path.write_bytes(content)
    with pytest.raises(ValueError, match='no safetensors file'):
      native.load_pretrained(str(path))


@pytest.mark.parametrize('keep', [4, 100, 0.5, 0.999])
def test_a_truncated_file(saved, keep):
  content = saved.read_bytes()
  length = keep if keep > 1 else int(keep * len(content))
  saved.write_bytes(content[:length])
  with pytest.raises(ValueError, match='no safetensors file'):
    native.load_pretrained(str(saved))


@pytest.mark.parametrize('metadata', [None, {'format': 'pt'}])
def test_somebody_elses_safetensors(tmp_path, metadata):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(safetensors.numpy.save({'w': np.zeros(3)}, metadata))
  with pytest.raises(ValueError, match='not written by save_pretrained'):
    native.load_pretrained(str(path))


@pytest.mark.parametrize('model', [
    None, 'UNet', '[]', '{"channels": 3}', '{"ch": 10}',
    # Found by changing headers at random (benchmarks/fuzz.py).
    '{"ch": "x"}', '{"in_channels": 1.5}', '{"out_channels": -1}',
    '{"ch": 1e30}', '{"norm_groups": 0}', '{"image_size": "E9M9"}',
    '{"in_channels": 1000000000000000000000000000000}', '{"ch_mult": [[]]}',
    '{"num_res_blocks": null}', '{"time_freq_shift": "x"}'])
def test_a_damaged_configuration(saved, model):
  def change(metadata):
    del metadata['model']
    if model is not None:
      metadata['model'] = model

  rewrite(saved, change_metadata=change)
  with pytest.raises(ValueError, match=str(saved)):
    native.load_pretrained(str(saved))


class DiskFull(OSError):
  pass


def test_a_failed_save_leaves_nothing_behind(saved, monkeypatch):
  """A failed save leaves no half-written file, and the old one as it was."""
  before = saved.read_bytes()
  new = saved.with_name('new.safetensors')
  written = []

  def fail_half_way(array):
    written.append(array)
    if len(written) > 3:
      raise DiskFull
    return array

  def fail_to_rename(*unused):
    raise DiskFull

  for place, name, fail in ((np, 'ascontiguousarray', fail_half_way),
                            (os, 'replace', fail_to_rename)):
    with monkeypatch.context() as patch:
      patch.setattr(place, name, fail)
      for path in (saved, new):
        with pytest.raises(DiskFull):
          native.save_pretrained(path, tiny.UNET, tiny.params(tiny.UNET))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == before


def test_others_may_read_the_file(saved):
  plain = saved.with_name('plain')
  plain.write_bytes(b'')
  assert saved.stat().st_mode == plain.stat().st_mode


def test_the_shipped_checkpoint_loads():
  model, params = native.load_pretrained('digits16')
  assert model.config.image_size == 16
  assert len(jax.tree.leaves(params)) > 50
