"""A model of two layers, and temporal differences of it by hand, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from msfp_jax import diffusion
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import block_formats
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import int_format
from msfp_jax.run import layer_error

RECIPE = 'int4_minmax_image+differences'
PLAN = diffusion.ddim_plan(tiny.SCHEDULE, 5, eta=0.5)
KEY = jax.random.key(3)


class Two(nn.Module):
  """Predicts noise by two dense layers on every pixel."""

  sample_shape = (3, 3, 4)
  conditions = ()

  @nn.compact
  def __call__(self, x, t):
    h = nn.Dense(6, name='first')(x + t[:, None, None, None] / 1000)
    return nn.Dense(x.shape[-1], name='last', use_bias=False)(jnp.tanh(h))


MODEL = Two()
X = jax.random.normal(jax.random.key(0), (3, 3, 3, 4))
PARAMS = jax.tree.map(lambda p: p + 0.1, MODEL.init(
    jax.random.key(1), X, X[:, 0, 0, 0])['params'])
STEPS = [0, *range(PLAN.num_steps)]  # the first one twice


def simulated(act=4):
  """Weights of 4 bits; of inputs one scale an image, in float32."""
  weight = block_formats.int_group(4)
  quantizer = Block(int_format(act), 'image')
  return packed_lib.simulate(MODEL, PARAMS, spec_lib.QuantSpec('by hand', {
      name: spec_lib.LayerSpec('', '', weight, quantizer)
      for name in ('first', 'last')}, differences=True), PLAN)


def nearest(d):
  """d [B, ...] to 16 levels from an image's minimum to its maximum, float64."""
  axes = tuple(range(1, d.ndim))
  low = d.min(axes, keepdims=True)
  step = (d.max(axes, keepdims=True) - low) / 15
  step = np.where(step > 0, step, 1)  # where nothing differs
  return np.round((d - low) / step) * step + low


class ByHand:
  """The recursion of one model's two layers in float64."""

  def __init__(self, model):
    self.kernels = [np.float64(model.layers[name].weight.dequantize()[0])
                    for name in ('first', 'last')]
    self.bias = np.float64(PARAMS['first']['bias'])
    self.known = [0.0, 0.0]

  def __call__(self, x, i):
    h = x + PLAN.timesteps[i] / 1000
    for layer in range(2):
      self.known[layer] = self.known[layer] + nearest(h - self.known[layer])
      h = self.out(layer, self.known[layer])
    return h

  def out(self, layer, h):
    h = h @ self.kernels[layer]
    return np.tanh(h + self.bias) if layer == 0 else h

  def whole(self, x, i):
    """[(input, output) of both layers], inputs as they are."""
    h, found = x + PLAN.timesteps[i] / 1000, []
    for layer in range(2):
      found.append((h, h := self.out(layer, h)))
    return found


def by_hand(predict, visit=lambda i, x, eps: None):
  x = np.float64(X)
  for taken, i in enumerate(STEPS):
    eps = predict(x, i)
    if taken == 0:
      continue
    visit(i, x, eps)
    z = np.float64(jax.random.normal(jax.random.fold_in(KEY, i), X.shape))
    x = (PLAN.x_coef[i] * x - PLAN.eps_factor[i] * eps
         + PLAN.noise_std[i] * z)
  return x


def inputs_of(*batches):
  """{layer: its input at every step of every batch}, of `observe.collect`.

  The model is written out, and the noise of its steps is that of KEY.
  """
  inputs = {'first': [], 'last': []}
  note = lambda name: lambda h: inputs[name].append(np.asarray(h))

  def predict(x, t, index):
    h = x + t[:, None, None, None] / 1000
    jax.debug.callback(note('first'), h, ordered=True)
    h = jnp.tanh(h @ PARAMS['first']['kernel'] + PARAMS['first']['bias'])
    jax.debug.callback(note('last'), h, ordered=True)
    return h @ PARAMS['last']['kernel']

  for number, x in enumerate(batches):
    diffusion.sample(predict, PLAN, x, jax.random.fold_in(
        jax.random.fold_in(KEY, number), PLAN.num_steps))
  jax.effects_barrier()
  return inputs


def assert_sqnr(model, rounded):
  """SQNR of the first layer at five of five steps, against float64.

  Args:
    model: a simulated one.
    rounded: given the inputs of all steps, `[S, ...]`, what the layer takes
      for them.
  """
  errors = layer_error.LayerErrors(MODEL, PARAMS, PLAN, X, key=KEY)
  kernel = np.float64(PARAMS['first']['kernel'])
  weight = np.float64(model.layers['first'].weight.dequantize()[0])
  t = PLAN.timesteps[:, None, None, None, None]
  h = np.float64(errors._seen) + t / 1000
  seen = rounded(h)
  powers = [np.sum(part**2) for part in (
      h @ kernel + np.float64(PARAMS['first']['bias']),
      seen @ weight - h @ kernel, h @ (weight - kernel), (seen - h) @ kernel)]
  found = errors.sqnr(model)
  for i, part in enumerate(layer_error.PARTS, 1):
    np.testing.assert_allclose(
        found[part]['first'], 10 * np.log10(powers[0] / powers[i]), atol=0.01)
