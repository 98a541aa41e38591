"""A model of three layers, quantized by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import common
from msfp_jax.diffusion import origin
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantize import make_layer
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static

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
  return origin.choose(origin.Origin(), config.schedule, config.sampler).plan


def params():
  return jax.jit(Toy().init)(
      jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros((1,)))['params']


def quantizer(fmt, channels=None, zero_point=None):
  shape = () if channels is None else (1, 1, 1, channels)
  return Static(
      FPFormat.parse(fmt), jnp.full(shape, 0.25), zero_point)


def layer(weight, act):
  return spec_lib.LayerSpec('', '', weight, act)


def spec():
  """4 bits, a layer as it was, and 3 bits."""
  return spec_lib.QuantSpec('by hand', {
      'conv_in': layer(quantizer('E2M1', 4),
                       quantizer('UE2M2', zero_point=jnp.float32(-0.25))),
      'temb': layer(Full(), Full()),
      'conv_out': layer(quantizer('E1M1', 1), quantizer('E2M1'))})


def sets():
  """{layer: its weights before they are quantized, `[h, ...]`}."""
  kernels = interception.leaves(params(), 'kernel')
  weights = {name: kernel[None] for name, kernel in kernels.items()}
  first = kernels['conv_in']
  return weights | {'conv_in': jnp.stack([first, -first])}


def deployed(given=None):
  """Makes a model of `spec`: two banks in the first layer, not packed.

  Args:
    given: parameters whose biases the model has; those of `params` if None.
  """
  given = params() if given is None else given
  biases = interception.leaves(given, 'bias')
  layers = {}
  for name, row in spec().layers.items():
    weight = None if row.weight.is_full else row.weight.quantize_banks(
        sets()[name])
    layers[name] = make_layer(weight, row, biases[name])
  return packed_lib.PackedModel(
      Toy(), {'temb': given['temb']}, layers,
      {'conv_in': jnp.asarray([0, 1])}, plan())
