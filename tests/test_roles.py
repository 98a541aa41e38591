"""Roles of layers, and lists of exceptions, against the models' geometry."""

import collections
import dataclasses
import re

import flux_oracle
import pytest
import tiny

from configs import common
from msfp_jax.models.flux import FluxConfig
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
# FLUX.1: 19 double blocks of 2 streams with adaLN, 4 projections and a
# feed-forward layer of 2 each; 38 single blocks, whose last matrix is 2 layers;
# embedders of time and text of 2 layers.
FLUX_ROLES = {
    'x_embedder': 1, 'context_embedder': 1, 'temb': 4,
    'modulation': 2 * 19 + 38, 'attention': 8 * 19 + 4 * 38,
    'feed_forward': 4 * 19 + 2 * 38, 'norm_out': 1, 'proj_out': 1}


@pytest.mark.slow
@pytest.mark.parametrize('config, expected', [
    (tiny.CIFAR10, CIFAR10_ROLES), (tiny.CELEBA64, CELEBA64_ROLES),
    (tiny.CIN256, CIN256_ROLES)],
    ids=['cifar10', 'celeba64', 'cin256'])
def test_roles_of_the_real_unets(config, expected):
  found = [roles.role_of(name) for name in tiny.layers(config)]
  assert collections.Counter(found) == expected


def test_every_role_is_had_by_some_model():
  assert set(CIN256_ROLES) == set(roles.FAMILIES['unet'].roles)
  assert set(FLUX_ROLES) == set(roles.FAMILIES['flux'].roles)


FLUX = list(flux_oracle.layers(FluxConfig()))


def test_roles_of_flux():
  assert collections.Counter(map(roles.role_of, FLUX)) == FLUX_ROLES


def test_families_share_no_layer():
  """One table could not be changed without a look at the others."""
  for family, names in (('flux', tiny.layers(tiny.CIFAR10)), ('unet', FLUX)):
    other = roles.FAMILIES[family]
    for name in names:
      assert not re.fullmatch(other.activated, name)
      with pytest.raises(ValueError, match='no rule'):
        roles.role_of(name, other.roles)


def test_families_have_the_same_lists_and_agree_on_shared_roles():
  for name, merged in roles.EXCEPTIONS.items():
    for family in roles.FAMILIES.values():
      own = family.exceptions[name]
      assert own.keys() <= family.roles.keys()
      assert own == {role: merged[role] for role in family.roles
                     if role in merged}
  assert all(family.exceptions.keys() == roles.EXCEPTIONS.keys()
             for family in roles.FAMILIES.values())


def test_flux_keeps_what_is_no_product_of_all_tokens_inside_a_block():
  """All outside of blocks, and what has the one vector of time and text."""
  kept = {name for name in FLUX
          if roles.role_of(name) in roles.exceptions_of('ends-8')}
  inside = {name for name in FLUX if '_blocks.' in name}
  assert kept == {*FLUX} - inside | {n for n in inside if 'norm' in n}
  shapes = flux_oracle.layers(FluxConfig())
  weights = lambda names: sum(shapes[n][0] * shapes[n][1] for n in names)
  # 2 x 6 D^2 in a double block, 3 D^2 in a single one.
  assert weights(kept & inside) == (12 * 19 + 3 * 38) * 3072**2


def test_structural_aals_of_flux():
  """Behind SiLU: second layers of embedders, adaLN; behind GELU: the last
  layers of feed-forward networks."""
  found = [name for name in FLUX if roles.follows_activation(name)]
  counts = collections.Counter(map(roles.role_of, found))
  assert counts == {'temb': 2, 'modulation': 76, 'norm_out': 1,
                    'feed_forward': 2 * 19 + 38}
  shapes = flux_oracle.layers(FluxConfig())
  assert all(shapes[n] == (4 * 3072, 3072) for n in found
             if roles.role_of(n) == 'feed_forward')


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
  assert sum(map(roles.follows_activation, names)) == aals
  found = {roles.role_of(name) for name in names
           if roles.follows_activation(name)}
  assert found == {'conv', 'temb_proj', 'conv_out', 'temb'}
  assert not roles.follows_activation('temb.dense.0')


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
