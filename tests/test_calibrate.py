"""Collecting activations, telling AALs from NALs, and the specs found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax import diffusion
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.calibrate import collect
from msfp_jax.quant.calibrate import is_aal

KEY = jax.random.key(5)
ONE_STEP = diffusion.ddim_plan(tiny.SCHEDULE, 1)


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


class Pixels(nn.Module):
  """A model whose layers see the image, once doubled; it predicts no noise."""

  @nn.compact
  def __call__(self, x, t):
    return (nn.Dense(1, name='one')(x) + nn.Conv(1, (1, 1), name='two')(2 * x))


def run(model, batches, plan=tiny.PLAN, samples=1000):
  shapes = jax.eval_shape(model.init, KEY, batches[0], batches[0][:, 0, 0, 0])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes['params'])
  return collect(model, zeros, plan, batches, samples_per_layer=samples,
                 key=KEY)


def test_every_timestep_gives_equally_many():
  found = run(Clock(), [tiny.noise(0), tiny.noise(1)])
  assert list(found) == ['clock']
  values, counts = np.unique(found['clock'].values, return_counts=True)
  np.testing.assert_array_equal(values, [0, 250, 500, 750])
  assert len(set(counts)) == 1
  assert (found['clock'].minimum, found['clock'].maximum) == (0, 750)


@pytest.mark.parametrize('batches', [1, 3])
def test_samples_do_not_grow_with_the_batches(batches):
  found = run(Clock(), [tiny.noise(i) for i in range(batches)], samples=100)
  values = found['clock'].values
  assert values.dtype == np.float32
  # Up to one more for every step of every batch.
  assert 100 <= len(values) < 100 + tiny.PLAN.num_steps * batches


def test_samples_are_drawn_evenly_from_all_pixels_and_batches():
  batches = [jnp.arange(256.0).reshape(4, 8, 8, 1) + 256 * i for i in (0, 1)]
  found = run(Pixels(), batches, ONE_STEP, samples=512 * 40)
  values, counts = np.unique(found['one'].values, return_counts=True)
  np.testing.assert_array_equal(values, np.arange(512))
  assert counts[:256].sum() == counts[256:].sum() == 256 * 40
  # Binomial around 40, sd 6.3.
  assert 8 < counts.min() and counts.max() < 80
  assert 5.0 < counts.std() < 7.5


def test_extremes_are_over_all_values_of_all_steps():
  """Extremes are those at all steps; x is x_T sqrt(abar_t / abar_T) at t."""
  noise = np.array(tiny.noise(0))
  noise[1, 2, 3, 0], noise[2, 0, 0, 0] = 1000, -500
  found = run(Pixels(), [tiny.noise(1), jnp.asarray(noise)], samples=8)
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  growth = np.sqrt(bar[0] / bar[750])
  assert found['one'].maximum == pytest.approx(1000 * growth, rel=1e-4)
  assert found['one'].minimum == pytest.approx(-500 * growth, rel=1e-4)
  assert found['two'].maximum == pytest.approx(2000 * growth, rel=1e-4)
  assert np.abs(found['one'].values).max() < 500  # not in the sample


def test_the_same_key_gives_the_same_sample():
  one, two = (run(Pixels(), [tiny.noise(0)], ONE_STEP, 50) for _ in range(2))
  np.testing.assert_array_equal(one['one'].values, two['one'].values)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused(bad):
  noise = tiny.noise(0).at[1, 2, 3, 0].set(bad)
  with pytest.raises(ValueError, match='layer one got inputs.*NaN or inf'):
    run(Pixels(), [tiny.noise(1), noise], ONE_STEP, samples=8)


def test_no_batches_are_refused():
  with pytest.raises(ValueError, match='batches is empty'):
    collect(Clock(), {}, tiny.PLAN, iter([]), key=KEY)


@pytest.mark.slow
def test_aals_of_the_unet_are_the_structural_ones():
  found = tiny.activations(tiny.UNET)
  assert list(found) == list(tiny.layers(tiny.CONFIG))
  assert ([is_aal(a.minimum, a.maximum) for a in found.values()]
          == [spec_lib.follows_silu(name) for name in found])
  kinds = [layer.kind for layer in tiny.spec(tiny.UNET).layers.values()]
  assert kinds == ['AAL' if spec_lib.follows_silu(name) else 'NAL'
                   for name in found]


def test_a_spec_has_every_layer_in_order_with_its_role():
  spec = tiny.spec(tiny.UNET)
  assert list(spec.layers) == list(tiny.layers(tiny.CONFIG))
  for name, layer in spec.layers.items():
    assert layer.role == spec_lib.role_of(name)
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
  return {name: tuple(q and q.bits for q in (layer.weight, layer.act))
          for name, layer in spec.layers.items()}


@pytest.mark.parametrize('name, eight', [
    ('all-4', {'conv_in', 'conv_out', 'temb'}),
    ('skip-8', {'conv_in', 'conv_out', 'temb', 'shortcut', 'downsample',
                'upsample'})])
def test_exceptions_reach_the_listed_roles_and_no_other(name, eight):
  """Exceptions reach the listed roles alone, told by the real layers' names."""
  rng = np.random.default_rng(0)
  names = list(tiny.layers(tiny.CONFIG))
  one = tiny.activations(tiny.NET)['body']
  params = {n: {'kernel': rng.normal(size=(3, 2)).astype(np.float32)}
            for n in names}
  found = calibrate(tiny.UNET, params, exceptions=name,
                    activations=dict.fromkeys(names, one))
  assert eight < {layer.role for layer in found.layers.values()}
  for n, bits in widths(found).items():
    assert bits == ((8, 8) if spec_lib.role_of(n) in eight else (4, 4)), n


@pytest.mark.slow
def test_weights_and_activations_may_differ_in_bits():
  found = search_tiny(bits=3, act_bits=5, exceptions={'body': 6})
  assert widths(found) == {'temb': (3, 5), 'conv_in': (3, 5), 'body': (6, 6),
                           'conv_out': (3, 5)}


@pytest.mark.parametrize('exceptions', [{}, {'in': 8}])
def test_32_bits_leave_full_precision_whatever_the_exceptions(exceptions):
  act_only = search_tiny(bits=32, act_bits=4, exceptions=exceptions)
  assert {w for w, _ in widths(act_only).values()} == {None}
  assert {a for _, a in widths(act_only).values()} <= {4, 8}
  weights_only = search_tiny(bits=4, act_bits=32, exceptions=exceptions)
  assert {a for _, a in widths(weights_only).values()} == {None}
  assert {w for w, _ in widths(weights_only).values()} <= {4, 8}


def test_an_exception_may_be_full_precision():
  found = widths(search_tiny(exceptions={'in': 32}))
  assert found['conv_in'] == (None, None)
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


@pytest.mark.parametrize('options, message', [
    ({'recipe': 'fp5'}, "recipe 'fp5'.*msfp"),
    ({'exceptions': 'some-4'}, "'some-4'.*all-4.*skip-8"),
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
