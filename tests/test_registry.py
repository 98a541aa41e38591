"""Models by name, and what a second family takes."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from msfp_jax import convert
from msfp_jax.convert import load
from msfp_jax.convert import native
from msfp_jax.models import denoiser
from msfp_jax.models import registry
from msfp_jax.models.guided import Guided
from msfp_jax.models.guided import GuidedByText
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.run import teacher

CONFIG = UNetConfig(
    image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1, 2),
    num_res_blocks=1, attn_resolutions=(4,), norm_groups=4, dropout=0.0)
PLAIN_UNET = UNet(CONFIG)
LABELLED = UNet(dataclasses.replace(CONFIG, num_classes=4))
WITH_TEXT = UNet(dataclasses.replace(CONFIG, context_dim=6))


class Plain(nn.Module):
  """A family of its own: no square images, and a vector beside labels."""

  width: int

  @property
  def sample_shape(self):
    return 4, 6, 2

  @property
  def conditions(self):
    return (denoiser.Condition('labels', classes=5),
            denoiser.Condition('pooled', shape=(3,)))

  @nn.nowrap
  def to_dict(self):
    return {'width': self.width}

  @classmethod
  def from_dict(cls, fields):
    return cls(**fields)

  @nn.compact
  def __call__(self, x, t, labels, pooled):
    h = nn.Dense(self.width, name='proj_in')(x)
    h += nn.Embed(5, self.width, name='emb')(labels)[:, None, None]
    h += nn.Dense(self.width, name='pooled')(pooled)[:, None, None]
    return nn.Dense(2, name='proj_out')(jnp.tanh(h) * t[:, None, None, None])


@pytest.fixture
def plain(monkeypatch):
  """Its entry."""
  monkeypatch.setitem(registry.REGISTRY, 'plain', Plain)
  return Plain(7)


def test_what_a_unet_denoises_and_takes():
  assert PLAIN_UNET.sample_shape == (8, 8, 1)
  assert PLAIN_UNET.conditions == ()
  labels, = LABELLED.conditions
  assert (labels.name, labels.classes) == ('labels', 4)
  assert labels.abstract(3) == jax.ShapeDtypeStruct((3,), jnp.int32)
  context, = WITH_TEXT.conditions
  assert (context.name, context.classes) == ('context', None)
  assert context.abstract(3) == jax.ShapeDtypeStruct((3, 1, 6), jnp.float32)
  embedded, = UNet(dataclasses.replace(
      CONFIG, context_dim=6, context_classes=9)).conditions
  assert embedded.classes == 9


def test_a_guided_model_is_not_asked_for_none():
  guided = Guided(LABELLED, 1.5, 3)
  assert guided.sample_shape == (8, 8, 1)
  assert [c.classes for c in guided.conditions] == [3]


# As they stand in packed models and checkpoints.
@pytest.mark.parametrize('model, row', [
    (PLAIN_UNET, {'unet': CONFIG.to_dict()}),
    (Guided(LABELLED, 1.5, 3), {'unet': LABELLED.config.to_dict(),
                                'scale': 1.5, 'null_label': 3}),
    (GuidedByText(WITH_TEXT, 7.5), {'unet': WITH_TEXT.config.to_dict(),
                                    'text_scale': 7.5})],
    ids=['unet', 'guided', 'guided by text'])
def test_rows_of_files_are_as_ever(model, row):
  assert registry.to_dict(model) == row
  assert list(registry.to_dict(model)) == list(row)
  assert registry.from_dict(json.loads(json.dumps(row))) == model


class Changed(UNet):
  """As a UNet it would come back as another model."""


@pytest.mark.parametrize('model', [
    nn.Dense(3), Changed(CONFIG), Guided(Changed(LABELLED.config), 2.0, 3)],
    ids=['foreign', 'subclass', 'guided subclass'])
def test_others_have_no_row(model, tmp_path):
  assert registry.to_dict(model) == {}
  with pytest.raises(ValueError, match='no model that has a name in files'):
    native.save_pretrained(tmp_path / 'm.safetensors', model, {})


@pytest.mark.parametrize('row', [{}, {'nobody': {}}, {'unet': {}, 'plain': {}}])
def test_rows_that_name_no_model_or_two(plain, row):
  known = r"one family.*\['flux', 'plain', 'unet'\]"
  with pytest.raises(ValueError, match=known):
    registry.from_dict(row)


def test_fields_that_a_family_does_not_have():
  with pytest.raises(TypeError, match='depth'):
    registry.from_dict({'unet': {'depth': 3}})
  with pytest.raises(TypeError, match='null_label'):
    registry.from_dict({'unet': CONFIG.to_dict(), 'scale': 2.0})


def test_a_second_family_is_saved_and_loaded(plain, tmp_path):
  abstract = convert.abstract_params(plain)
  assert {name: leaf.shape for name, leaf in native.flatten(
      jax.tree.map(lambda a: np.zeros(a.shape), abstract)).items()} == {
          'proj_in.kernel': (2, 7), 'proj_in.bias': (7,),
          'emb.embedding': (5, 7), 'pooled.kernel': (3, 7),
          'pooled.bias': (7,), 'proj_out.kernel': (7, 2),
          'proj_out.bias': (2,)}
  params = teacher.random_params(abstract, 0)
  path = tmp_path / 'm.safetensors'
  native.save_pretrained(path, plain, params)
  model, loaded = convert.load_pretrained(str(path))
  assert model == plain
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_second_familys_checkpoint_is_one_importer(
    plain, tmp_path, monkeypatch):
  """Of tensors as PyTorch names and lays them out."""
  importer = types.SimpleNamespace(
      MODEL=Plain, detect=lambda tensors: 'x_embedder.weight' in tensors,
      select=lambda tensors, ema: tensors,
      config=lambda tensors, given: tensors['x_embedder.weight'].shape[0],
      rename=lambda tensors, config: ({
          name.replace('x_embedder', 'proj_in'): tensor
          for name, tensor in tensors.items()}, []))
  monkeypatch.setitem(load.FAMILIES, 'plain', importer)
  params = teacher.random_params(convert.abstract_params(plain), 0)
  tensors = {
      name.replace('proj_in', 'x_embedder').replace('kernel', 'weight').replace(
          'embedding', 'weight'):
      np.ascontiguousarray(value.T if 'kernel' in name else value)
      for name, value in native.flatten(params).items()}
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(tensors, path)
  model, loaded = convert.load_pretrained(str(path))
  assert model == plain
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_config_names_the_family(plain):
  assert teacher.new_model({'family': 'plain', 'width': 7}) == plain
  assert teacher.new_model(CONFIG.to_dict()) == PLAIN_UNET
