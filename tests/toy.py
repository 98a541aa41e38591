"""A model of three layers, quantized by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import common
from msfp_jax import diffusion
from msfp_jax.quant import interception as layers_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.tune import student as student_lib

SHAPE = (8, 8, 1)


class Toy(nn.Module):
  """A model of three layers, which is called as a UNet is."""

  @nn.compact
  def __call__(self, x, t):
    h = nn.Conv(4, (3, 3), name='conv_in')(x)
    time = jnp.stack([t, 1000 - t], axis=-1) / 1000
    h = h + nn.Dense(4, name='temb')(time)[:, None, None]
    return nn.Conv(x.shape[-1], (3, 3), name='conv_out')(nn.silu(h))


def plan():
  """Makes a plan of two steps that add noise."""
  config = common.get_config()
  config.sampler.num_steps = 2
  config.sampler.eta = 0.5
  schedule = diffusion.make_schedule(**config.schedule)
  return diffusion.make_plan(schedule, **config.sampler)


def params():
  return Toy().init(jax.random.key(0), jnp.zeros((1, *SHAPE)),
                    jnp.zeros((1,)))['params']


def quantizer(fmt, channels=None, zero_point=None):
  shape = () if channels is None else (1, 1, 1, channels)
  return Static(
      FPFormat.parse(fmt), jnp.full(shape, 0.25), zero_point)


def layer(weight, act):
  return spec_lib.LayerSpec('', '', weight, act)


def deployed():
  """Makes a model: two banks of 4 bits, a layer as it was, one of 3 bits."""
  spec = spec_lib.QuantSpec('by hand', {
      'conv_in': layer(quantizer('E2M1', 4),
                       quantizer('UE2M2', zero_point=jnp.float32(-0.25))),
      'temb': layer(None, None),
      'conv_out': layer(quantizer('E1M1', 1), quantizer('E2M1'))})
  kernels = layers_lib.leaves(params(), 'kernel')
  weights = {name: kernel[None] for name, kernel in kernels.items()}
  first = kernels['conv_in']
  weights['conv_in'] = jnp.stack([first, -first])
  return student_lib.Deployed(
      Toy(), params(), spec, weights, {'conv_in': jnp.asarray([0, 1])})
