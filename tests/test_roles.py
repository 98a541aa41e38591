"""Roles of layers, and lists of exceptions, against the models' geometry."""

import collections
import dataclasses

import pytest
import tiny

from configs import common
from msfp_jax.quant import roles

REAL = pytest.mark.parametrize(
    'config', [tiny.CIFAR10, tiny.CELEBA64], ids=['cifar10', 'celeba64'])

# {role: count} of the layers of the real models, from their papers: residual
# blocks of 2 convs and a temb_proj, attention of 4 projections.
CIFAR10_ROLES = {
    'conv_in': 1, 'conv_out': 1, 'temb': 2, 'temb_proj': 22, 'conv': 44,
    'shortcut': 13, 'downsample': 3, 'upsample': 3, 'attention': 24}
CELEBA64_ROLES = {
    'conv_in': 1, 'conv_out': 1, 'temb': 2, 'temb_proj': 27, 'conv': 54,
    'shortcut': 17, 'downsample': 4, 'upsample': 4, 'attention': 24}
# cin256-v2: 22 residual blocks; 16 spatial transformers, each of 2 attentions
# with 4 projections, 2 projections around them and a feed-forward of 2.
CIN256_ROLES = {
    'conv_in': 1, 'conv_out': 1, 'temb': 2, 'temb_proj': 22, 'conv': 44,
    'shortcut': 15, 'downsample': 3, 'upsample': 3, 'attention': 160,
    'feed_forward': 32}


@pytest.mark.parametrize('config, expected', [
    (tiny.CIFAR10, CIFAR10_ROLES), (tiny.CELEBA64, CELEBA64_ROLES),
    pytest.param(tiny.CIN256, CIN256_ROLES, marks=pytest.mark.slow)],
    ids=['cifar10', 'celeba64', 'cin256'])
def test_roles_of_the_real_unets(config, expected):
  found = [roles.role_of(name) for name in tiny.layers(config)]
  assert collections.Counter(found) == expected


def test_every_role_is_had_by_some_model():
  assert set(CIN256_ROLES) == set(roles.ROLES)


@pytest.mark.slow
@REAL
def test_roles_cover_resampling_blocks(config):
  config = dataclasses.replace(config, resample='resblock')
  found = {name: roles.role_of(name) for name in tiny.layers(config)}
  assert found['down.0.downsample.conv1'] == 'conv'
  assert found['up.1.upsample.temb_proj'] == 'temb_proj'
  assert not {'downsample', 'upsample'} & set(found.values())


@pytest.mark.parametrize('name', [
    'temb.dense.0.extra', 'down.0.block.0.conv3', 'xconv_in', 'conv_in.x', ''])
def test_a_layer_without_role_is_refused_by_name(name):
  with pytest.raises(ValueError, match=f'no rule covers layer {name!r}'):
    roles.role_of(name)


def test_own_roles_replace_the_unets():
  own = {'first': r'a', 'rest': r'.*'}
  assert roles.role_of('a', own) == 'first'
  assert roles.role_of('conv_in', own) == 'rest'
  with pytest.raises(ValueError, match='conv_in'):
    roles.role_of('conv_in', {'first': 'a'})


@pytest.mark.parametrize('config, aals, layers', [
    (tiny.CIFAR10, 68, 113), (tiny.CELEBA64, 83, 134)],
    ids=['cifar10', 'celeba64'])
def test_structural_aals_of_the_real_unets(config, aals, layers):
  names = list(tiny.layers(config))
  assert len(names) == layers
  assert sum(map(roles.follows_silu, names)) == aals
  found = {roles.role_of(name) for name in names if roles.follows_silu(name)}
  assert found == {'conv', 'temb_proj', 'conv_out', 'temb'}
  assert not roles.follows_silu('temb.dense.0')


def with_exceptions(config, listed):
  """The layers that a list of exceptions keeps at other bits, by the bits."""
  bits = roles.exceptions_of(listed)
  found = collections.defaultdict(set)
  for name in tiny.layers(config):
    if (role := roles.role_of(name)) in bits:
      found[bits[role]].add(name)
  return dict(found)


@REAL
def test_the_lists_of_exceptions_by_the_layers_shapes(config):
  """The ends at 8 bits; the longer list has all that leads around blocks.

  Ends are what touches images (3 channels), and what the timestep enters by.
  Around blocks lead 1x1 convolutions that change the number of channels, which
  attention's do not, and the convolutions of resampling, whose names say so.
  """
  shapes = tiny.layers(config)
  ends = {name for name, shape in shapes.items()
          if 3 in (shape[-2], shape[-1]) or name.startswith('temb.')}
  assert len(ends) == 4
  around = {name for name, shape in shapes.items()
            if len(shape) == 4 and shape[:2] == (1, 1)
            and shape[-2] != shape[-1]}
  around |= {name for name in shapes if 'sample.conv' in name}
  short, long = sorted(roles.EXCEPTIONS, key=lambda name: len(
      roles.EXCEPTIONS[name]))
  assert with_exceptions(config, short) == {8: ends}
  assert with_exceptions(config, long) == {8: ends | around}


def test_a_former_name_is_its_list():
  """Commands of before the renaming still work; 8-bit layers were in it."""
  assert roles.exceptions_of('all-4') == roles.exceptions_of('ends-8')
  config = common.apply_variant(common.get_config(), 'skip-8,all-4', {})
  assert config.quant.exceptions == 'ends-8'
