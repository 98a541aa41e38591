"""Models small enough to compile in seconds, and their specs.

`UNET` has every part of the real UNet, `NET` one layer of each kind. All
results are cached, so that test files share compilations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import unet_oracle

from msfp_jax import diffusion
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.interception import list_layers
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.observe import collect
from msfp_jax.quant.quantizers import Static

CIFAR10 = UNetConfig()
CELEBA64 = UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4))
CIN256 = UNetConfig(
    image_size=64, ch=192, ch_mult=(1, 2, 3, 5), attn_resolutions=(32, 16, 8),
    num_heads=1, context_dim=512, context_classes=1001, norm_eps=1e-5,
    downsample_padding=(1, 1), time_order='cos_sin', time_freq_shift=0)
CONFIG = UNetConfig(
    image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1, 2),
    num_res_blocks=1, attn_resolutions=(4,), norm_groups=4, dropout=0.0)
UNET = UNet(CONFIG)
SCHEDULE = diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
PLAN = diffusion.ddim_plan(SCHEDULE, 4)  # t = 750, 500, 250, 0
IMAGE = (8, 8, 1)


class Net(nn.Module):
  """A noise predictor of three convolutions and a dense layer."""

  @nn.compact
  def __call__(self, x, t):
    angles = t[:, None] / jnp.asarray([30.0, 100.0, 300.0, 1000.0])
    temb = nn.Dense(6, name='temb')(jnp.sin(angles).astype(x.dtype))
    h = nn.Conv(6, (3, 3), name='conv_in')(x)
    h = nn.silu(nn.GroupNorm(2, name='norm')(h + temb[:, None, None]))
    h = nn.silu(nn.Conv(6, (3, 3), name='body')(h))
    return nn.Conv(x.shape[-1], (1, 1), name='conv_out')(h)


NET = Net()
NET_ROLES = {'in': 'conv_in', 'time': 'temb', 'body': 'body',
             'out': 'conv_out'}


@functools.cache
def layers(config):
  """Lists a UNet's layers, from shapes alone."""
  side = config.image_size
  labels = (jax.ShapeDtypeStruct((1,), jnp.int32),) if config.by_class else ()
  return list_layers(
      UNet(config), unet_oracle.abstract_params(config),
      jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.float32), *labels)


@functools.cache
def params(model):
  """Draws random parameters, none of them neutral."""
  if model is UNET:
    shapes = unet_oracle.state_dict_shapes(CONFIG)
    return unet_oracle.from_state_dict(
        CONFIG, unet_oracle.random_state_dict(shapes, seed=0))
  shapes = jax.eval_shape(model.init, jax.random.key(0), noise(0), t_of(0))
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda s: jnp.asarray(
          rng.normal(size=s.shape) / max(np.prod(s.shape[:-1]), 4)**0.5,
          jnp.float32), shapes['params'])


def noise(seed, batch=4):
  """Draws noise `[B, 8, 8, 1]`."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(batch, *IMAGE)), jnp.float32)


def t_of(t, batch=4):
  return jnp.full((batch,), t, jnp.float32)


@functools.cache
def activations(model):
  return collect(model, params(model), PLAN, [noise(0), noise(1)],
                 samples_per_layer=2048, key=jax.random.key(0))


@functools.cache
def spec(model, recipe='msfp', bits=4):
  """Calibrates a model; the last (and the UNet's first) layers have 8 bits."""
  options = {'exceptions': 'ends-8'}
  if model is NET:
    options = {'exceptions': {'out': 8}, 'roles': NET_ROLES}
  return calibrate(model, params(model), recipe=recipe, bits=bits,
                   activations=activations(model), **options)


@functools.cache
def teacher(model):
  """Jits the full-precision model, (params, x, t) -> eps."""
  return jax.jit(lambda params, x, t: model.apply({'params': params}, x, t))


def fake_quant(x, quantizer):
  """Quantizes a small array to the nearest levels by brute force, float64.

  Where two levels are equally near, either may be meant: tests draw values
  at random, which avoids ties.
  """
  x = np.asarray(x, np.float64)
  scale = np.asarray(quantizer.scale, np.float64)
  zero = (0.0 if quantizer.zero_point is None
          else np.asarray(quantizer.zero_point, np.float64))
  u = (x - zero) / scale
  grid = quantizer.fmt.levels()
  nearest = grid[np.abs(u[..., None] - grid).argmin(axis=-1)]
  return nearest * scale + zero


def assert_trees_equal(a, b):
  """Checks that two trees have equal structure and values (-0.0 is 0.0)."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def by_hand(params):
  """Makes a spec without calibration, for signed and for unsigned inputs."""
  acts = [
      Static(FPFormat.parse('E2M1'), jnp.float32(0.4)),
      Static(
          FPFormat.parse('UE3M1'), jnp.float32(0.15), jnp.float32(-0.4))]
  found = {}
  for i, (name, kernel) in enumerate(interception.leaves(
      params, 'kernel').items()):
    largest = np.abs(kernel).max(
        tuple(range(kernel.ndim - 1)), keepdims=True)
    found[name] = spec_lib.LayerSpec('', '', Static(
        FPFormat.parse('E2M1'), largest / 6), acts[i % 2])
  return spec_lib.QuantSpec('by hand', found)
