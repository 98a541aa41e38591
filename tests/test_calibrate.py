"""Telling AALs from NALs, and the specs found."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax import diffusion
from msfp_jax.quant import fit
from msfp_jax.quant import recipes
from msfp_jax.quant import roles as roles_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.calibrate import is_aal
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static


@pytest.mark.parametrize('minimum, maximum, expected', [
    (-0.2785, 3.0, True),  # SiLU: its minimum is -0.27846
    (-0.27846, 0.5, True),
    (-0.17, 3.0, True),  # GELU
    (0.0, 3.0, True),  # ReLU
    (-0.29, 3.0, False),
    (-0.2785, 0.28, False),  # as wide below zero as above
    (-0.2785, 0.1, False),
    (-0.001, 0.001, False),
    (0.0, 0.0, False),
    (-3.0, 3.0, False),
])
def test_aals_by_their_extremes(minimum, maximum, expected):
  assert is_aal(minimum, maximum) == expected


def test_silu_itself_is_an_aal():
  """SiLU is an AAL, with float32's rounding, where its minimum is seen."""
  x = np.linspace(-20, 6, 100_001, dtype=np.float32)
  y = np.asarray(jax.nn.silu(x))
  assert y.min() < -0.2784
  assert is_aal(float(y.min()), float(y.max()))
  assert not is_aal(float(x.min()), float(x.max()))


class Clock(nn.Module):
  """A model whose one layer has the input t; it predicts no noise."""

  @nn.compact
  def __call__(self, x, t):
    return 0 * x + nn.Dense(1, name='clock')(t[:, None])[:, None, None]


def test_aals_of_the_unet_are_the_structural_ones():
  found = tiny.activations(tiny.UNET)
  assert list(found) == list(tiny.layers(tiny.CONFIG))
  assert ([is_aal(a.minimum, a.maximum) for a in found.values()]
          == [roles_lib.follows_activation(name) for name in found])
  kinds = [layer.kind for layer in tiny.spec(tiny.UNET).layers.values()]
  assert kinds == ['AAL' if roles_lib.follows_activation(name) else 'NAL'
                   for name in found]


def test_a_spec_has_every_layer_in_order_with_its_role():
  spec = tiny.spec(tiny.UNET)
  assert list(spec.layers) == list(tiny.layers(tiny.CONFIG))
  for name, layer in spec.layers.items():
    assert layer.role == roles_lib.role_of(name)
    shape = tiny.layers(tiny.CONFIG)[name]
    assert layer.weight.scale.shape == (1,) * (len(shape) - 1) + shape[-1:]
    assert layer.act.scale.shape == ()


def test_stated_errors_are_those_of_the_quantizers():
  """The errors that a spec states are found again by brute force."""
  params = tiny.params(tiny.NET)
  for recipe in ('msfp', 'int'):
    for name, layer in tiny.spec(tiny.NET, recipe).layers.items():
      for x, quantizer, stated in (
          (tiny.activations(tiny.NET)[name].values, layer.act, 'act_mse'),
          (np.asarray(params[name]['kernel']), layer.weight, 'weight_mse')):
        mse = np.mean((tiny.fake_quant(x, quantizer) - x)**2)
        assert layer.stats[stated] == pytest.approx(mse, rel=1e-3), name


def test_msfp_is_never_worse_than_signed_and_the_same_on_nals():
  unsigned = 0
  for name, layer in tiny.spec(tiny.UNET).layers.items():
    mse, signed = layer.stats['act_mse'], layer.stats['act_signed_mse']
    assert mse <= signed, name
    if layer.kind == 'NAL':
      assert mse == signed and layer.act.fmt.signed, name
    assert (mse < signed) == (not layer.act.fmt.signed), name
    unsigned += not layer.act.fmt.signed
  # Of SiLU's outputs unsigned formats halve the error and more (method.md).
  assert unsigned > len(tiny.spec(tiny.UNET).layers) / 3


def test_signed_fp_has_no_unsigned_formats_and_msfps_best_signed_error():
  msfp, signed = (tiny.spec(tiny.NET, recipe).layers
                  for recipe in ('msfp', 'signed_fp'))
  for name, layer in signed.items():
    assert layer.act.fmt.signed and layer.weight.fmt.signed
    assert layer.stats['act_mse'] == msfp[name].stats['act_signed_mse']
  assert any(not layer.act.fmt.signed for layer in msfp.values())


def test_int_has_uniform_grids_only():
  for layer in tiny.spec(tiny.NET, 'int').layers.values():
    expected = 'UE1M7' if layer.role == 'out' else 'UE1M3'
    for quantizer in (layer.weight, layer.act):
      assert str(quantizer.fmt) == expected
      assert quantizer.zero_point.shape == quantizer.scale.shape
      assert (np.asarray(quantizer.zero_point) <= 0).all()


def search_tiny(**options):
  options = {'activations': tiny.activations(tiny.NET),
             'roles': tiny.NET_ROLES, 'exceptions': {}} | options
  return calibrate(tiny.NET, tiny.params(tiny.NET), **options)


def widths(spec):
  return {name: (layer.weight.bits, layer.act.bits)
          for name, layer in spec.layers.items()}


@pytest.mark.parametrize('name, eight', [
    ('ends-8', {'conv_in', 'conv_out', 'temb'}),
    ('skip-8', {'conv_in', 'conv_out', 'temb', 'shortcut', 'downsample',
                'upsample'})])
def test_exceptions_reach_the_listed_roles_and_no_other(name, eight):
  """Exceptions reach the listed roles alone, told by the real layers' names."""
  rng = np.random.default_rng(0)
  names = list(tiny.layers(tiny.CONFIG))
  one = tiny.activations(tiny.NET)['body']
  one = dataclasses.replace(one, values=one.values[:64])  # few to search
  params = {n: {'kernel': rng.normal(size=(3, 2)).astype(np.float32)}
            for n in names}
  found = calibrate(tiny.UNET, params, exceptions=name,
                    activations=dict.fromkeys(names, one))
  assert eight < {layer.role for layer in found.layers.values()}
  for n, bits in widths(found).items():
    assert bits == ((8, 8) if roles_lib.role_of(n) in eight else (4, 4)), n


@pytest.mark.slow
def test_weights_and_activations_may_differ_in_bits():
  found = search_tiny(bits=3, act_bits=5, exceptions={'body': 6})
  assert widths(found) == {'temb': (3, 5), 'conv_in': (3, 5), 'body': (6, 6),
                           'conv_out': (3, 5)}


@pytest.mark.parametrize('exceptions', [{}, {'in': 8}])
def test_32_bits_leave_full_precision_whatever_the_exceptions(exceptions):
  act_only = search_tiny(bits=32, act_bits=4, exceptions=exceptions)
  assert {w for w, _ in widths(act_only).values()} == {32}
  assert {a for _, a in widths(act_only).values()} <= {4, 8}
  weights_only = search_tiny(bits=4, act_bits=32, exceptions=exceptions)
  assert {a for _, a in widths(weights_only).values()} == {32}
  assert {w for w, _ in widths(weights_only).values()} <= {4, 8}


def test_an_exception_may_be_full_precision():
  found = widths(search_tiny(exceptions={'in': 32}))
  assert found['conv_in'] == (32, 32)
  assert found['body'] == (4, 4)


def test_calibrate_follows_the_plan_itself():
  """Calibration visits the plan's timesteps, as `collect` does."""
  params = {'clock': {'kernel': jnp.ones((1, 1)), 'bias': jnp.zeros(1)}}
  found = calibrate(
      Clock(), params, batches=[tiny.noise(0)],
      plan=diffusion.ddim_plan(tiny.SCHEDULE, 2), roles={'all': '.*'},
      exceptions={}, act_bits=32)
  layer = found.layers['clock']
  assert (layer.stats['act_min'], layer.stats['act_max']) == (0, 500)
  assert layer.role == 'all'


class Mute(nn.Module):
  """A model that cannot run."""

  @nn.compact
  def __call__(self, x, t):
    raise AssertionError('the model was run')


def blocks(bits):
  return Block(FPFormat(2, bits - 3), group=16)


def test_a_recipe_that_needs_nothing_does_not_run_the_model(monkeypatch):
  """Neither batches nor a plan are asked for, and no class is told."""
  of_data = fit.Dynamic(blocks)
  monkeypatch.setitem(recipes.RECIPES, 'blocks', recipes.Recipe(
      weight=of_data, nal=of_data, aal=of_data))
  params = tiny.params(tiny.NET)
  found = calibrate(Mute(), params, recipe='blocks', bits=4, act_bits=6,
                    roles=tiny.NET_ROLES, exceptions={'out': 8})
  assert found.recipe == 'blocks' and set(found.layers) == set(params) - {
      'norm'}
  for name, layer in found.layers.items():
    eight = name == 'conv_out'
    assert layer.weight == blocks(8 if eight else 4)
    assert layer.act == blocks(8 if eight else 6)
    assert layer.kind == '' and layer.role
    kernel = np.float64(params[name]['kernel'])
    back = np.float64(layer.weight.quantize(
        params[name]['kernel'], axis=-2).dequantize())
    assert layer.stats == {
        'weight_mse': pytest.approx(np.mean((back - kernel)**2))}


@dataclasses.dataclass(frozen=True)
class ByMaximum(fit.Fit):
  """A fit that looks at channel maxima, and keeps all that it was given."""

  given: list = dataclasses.field(default_factory=list, compare=False)
  needs = (fit.CHANNEL_MAXIMA,)

  def __call__(self, seen, bits, axis):
    self.given.append(seen)
    fmt = FPFormat(2, bits - 3)
    largest = np.abs(seen.channel_maxima).max()
    return fit.Fitted(Static(fmt, jnp.float32(largest / fmt.max)), 0.5)


def test_a_fit_gets_what_it_needs_and_no_more(monkeypatch):
  by_maximum = ByMaximum()
  monkeypatch.setitem(recipes.RECIPES, 'maximum', recipes.Recipe(
      weight=fit.Dynamic(blocks), nal=by_maximum, aal=by_maximum))
  found = calibrate(
      Clock(), {'clock': {'kernel': jnp.ones((1, 1)), 'bias': jnp.zeros(1)}},
      recipe='maximum', roles={'all': '.*'}, batches=tiny.noise(0),
      plan=tiny.PLAN)
  seen, = by_maximum.given
  assert seen.channel_maxima == [750]
  assert seen.values is seen.rows is seen.gram is None
  layer = found.layers['clock']
  assert layer.act.scale == 750 / 6
  # Without values there is no other error to compare with.
  assert layer.stats['act_mse'] == 0.5
  assert 'act_signed_mse' not in layer.stats


@pytest.mark.parametrize('own, needs', [
    ('int', {'values'}), ('msfp', {'values', 'extremes'})])
def test_what_recipes_need(own, needs):
  """Extremes tell AALs from NALs: only where these differ."""
  assert set(recipes.get(own).needs) == needs


@pytest.mark.parametrize('options, message', [
    ({'recipe': 'fp5'}, "recipe 'fp5'.*msfp"),
    ({'exceptions': 'some-4'}, "'some-4'.*ends-8.*skip-8"),
    ({'exceptions': {'attention': 8}}, r"\['attention'\].*body"),
    ({'roles': {'in': 'conv_in'}}, 'no rule covers layer'),
    ({'bits': 2}, '2 bits'),
    ({'bits': 16}, '16 bits'),
    ({'activations': None}, 'batches and a plan'),
    ({'activations': {}}, 'temb'),
])
def test_errors(options, message):
  with pytest.raises(ValueError, match=message):
    search_tiny(**options)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
  params = tiny.params(tiny.NET)
  kernel = params['body']['kernel'].at[0, 1, 2, 3].set(bad)
  broken = params | {'body': params['body'] | {'kernel': kernel}}
  with pytest.raises(ValueError, match='layer body: 1 of 324 values are NaN'):
    calibrate(tiny.NET, broken, activations=tiny.activations(tiny.NET),
              roles=tiny.NET_ROLES, exceptions={})
