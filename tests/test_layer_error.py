"""SQNR of layers, against float64 and a teacher followed by hand."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import diffusion
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static
from msfp_jax.run import layer_error

PLAN = diffusion.ddim_plan(diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02), 4)


class Net(nn.Module):
  """Predicts noise by two dense layers on every pixel."""

  @nn.compact
  def __call__(self, x, t):
    h = nn.Dense(8, name='first')(x) + t[:, None, None, None] / 1000
    return nn.Dense(x.shape[-1], name='last')(nn.silu(h))


MODEL = Net()
X = jax.random.normal(jax.random.key(0), (3, 4, 4, 4))
PARAMS = jax.tree.map(
    lambda p: p + 0.1, MODEL.init(jax.random.key(1), X, X[:, 0, 0, 0])[
        'params'])
FULL = Full()
WEIGHT = Static(FPFormat.parse('E2M1'), jnp.full((1, 8), 0.2))
ACT = Static(FPFormat.parse('E1M2'), jnp.float32(0.5))


def sqnr(first, last=None, **changes):
  full = spec_lib.LayerSpec('', '')
  model = packed_lib.simulate(MODEL, PARAMS, spec_lib.QuantSpec('by hand', {
      'first': first, 'last': last or full}), PLAN)
  model = dataclasses.replace(model, **changes)
  errors = layer_error.LayerErrors(
      MODEL, PARAMS, PLAN, X, key=jax.random.key(2))
  return errors.sqnr(model)


def layer(weight=FULL, act=FULL, around=None):
  return spec_lib.LayerSpec('', '', weight, act, around)


def nearest(x, quantizer):
  grid = quantizer.fmt.levels()
  scale = np.float64(quantizer.scale)
  u = x / scale
  return grid[np.abs(u[..., None] - grid).argmin(-1)] * scale


def trajectory():
  """Inputs of both layers at all steps of DDIM, in float64."""
  p = jax.tree.map(np.float64, PARAMS)
  x, found = np.float64(X), []
  for i, t in enumerate(PLAN.timesteps):
    h = x @ p['first']['kernel'] + p['first']['bias'] + t / 1000
    h = h * (1 + np.tanh(h / 2)) / 2  # SiLU, which overflows nowhere
    found.append((x, h))
    eps = h @ p['last']['kernel'] + p['last']['bias']
    x = PLAN.x_coef[i] * x - PLAN.eps_factor[i] * eps
  return [np.stack(part) for part in zip(*found, strict=True)]


def decibels(y, other):
  return 10 * np.log10(np.sum(y**2) / np.sum((other - y)**2))


def test_one_layer_against_numpy():
  """Over all images and the four steps, bias included in the signal."""
  x, _ = trajectory()
  w = np.float64(PARAMS['first']['kernel'])
  bias = np.float64(PARAMS['first']['bias'])
  y = x @ w + bias
  found = sqnr(layer(WEIGHT, ACT))
  qx, qw = nearest(x, ACT), nearest(w, WEIGHT)
  for part, other in (('output', qx @ qw), ('weight', x @ qw),
                      ('input', qx @ w)):
    assert found[part] == {'first': pytest.approx(
        decibels(y, other + bias), abs=0.01)}, part
  json.dumps(found)


def test_errors_of_earlier_layers_have_no_part():
  """The last layer is fed by full precision, whatever the first loses."""
  last = layer(Static(FPFormat.parse('E2M1'), jnp.full((1, 4), 0.2)), ACT)
  coarse = Static(FPFormat.parse('E2M1'), jnp.full((1, 8), 3.0))
  found = sqnr(layer(coarse), last)['output']
  assert found['last'] == sqnr(layer(), last)['output']['last']
  assert found['first'] < 5


def test_a_layer_with_a_branch_and_smoothing():
  """What the branch carries is no error, also of input or weights alone."""
  rng = np.random.default_rng(0)
  around = Around(jnp.asarray(rng.uniform(0.5, 2, 4), jnp.float32),
                  jnp.asarray(rng.normal(size=(4, 1)), jnp.bfloat16),
                  jnp.asarray(rng.normal(size=(1, 8)) / 4, jnp.bfloat16))
  x, _ = trajectory()
  w = np.float64(PARAMS['first']['kernel'])
  y = x @ w + np.float64(PARAMS['first']['bias'])
  s = np.float64(around.smooth)
  branch = np.float64(around.down) @ np.float64(around.up)
  seen, rest = x / s, s[:, None] * w - branch
  qx, qw = nearest(seen, ACT), nearest(rest, WEIGHT)
  found = sqnr(layer(WEIGHT, ACT, around))
  carried = seen @ branch + np.float64(PARAMS['first']['bias'])
  for part, other in (('output', qx @ qw), ('weight', seen @ qw),
                      ('input', qx @ rest)):
    assert found[part]['first'] == pytest.approx(
        decibels(y, other + carried), abs=0.02), part


def test_each_step_has_its_bank():
  kernel = PARAMS['first']['kernel']
  one = packed_lib.simulate(MODEL, PARAMS, spec_lib.QuantSpec('by hand', {
      'first': layer(WEIGHT), 'last': layer()}), PLAN).layers
  banks = {'first': one['first'].replace(
      weight=WEIGHT.quantize_banks(jnp.stack([0 * kernel, kernel])))}
  by = lambda choices: sqnr(layer(WEIGHT), layers=one | banks, choices={
      'first': np.asarray(choices)})['output']['first']
  assert by([1, 1, 1, 1]) == sqnr(layer(WEIGHT))['output']['first']
  # Of weights that are 0 only the bias is left.
  assert by([0, 0, 0, 0]) < by([1, 0, 1, 1]) < by([1, 1, 1, 1])


def test_an_input_alone_in_a_layer_of_full_weights():
  x, _ = trajectory()
  w, b = (np.float64(PARAMS['first'][kind]) for kind in ('kernel', 'bias'))
  found = sqnr(layer(FULL, ACT))
  assert found['output'] == found['input'] == {'first': pytest.approx(
      decibels(x @ w + b, nearest(x, ACT) @ w + b), abs=0.01)}
  assert not found['weight']


def test_full_precision_has_no_error_to_tell():
  found = sqnr(layer())
  assert found == {'output': {}, 'weight': {}, 'input': {}}
  assert layer_error.summary(found) == {}


def test_mean_and_minimum():
  assert layer_error.summary({'output': {'a': 10.0, 'b': 13.0, 'c': 40.0}}) == {
      'sqnr_mean': 21.0, 'sqnr_min': 10.0}
