"""Convolutional blocks that the UNets and the autoencoders share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import attention
from msfp_jax.models import convolution


def upsample_nearest(x: jax.Array) -> jax.Array:
  """Doubles the sides of `[B, H, W, C]`: every pixel becomes four."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def conv3x3(channels: int, name: str, stride: int = 1,
            padding: tuple[int, int] = (1, 1)) -> nn.Conv:
  # Padding is written out: 'SAME' at stride 2 would pad otherwise than PyTorch.
  return nn.Conv(channels, (3, 3), (stride, stride), (padding, padding),
                 conv_general_dilated=convolution.conv_general_dilated,
                 name=name)


def group_norm(groups: int, epsilon: float) -> Callable[[str], nn.GroupNorm]:
  """Returns a maker of group normalizations, to be called with their names."""
  # In two passes: the fast variance cancels, with an error of 2e-2 where
  # |mean| = 100 std.
  return lambda name: nn.GroupNorm(
      groups, epsilon=epsilon, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
  """Norm, SiLU, conv, plus time; norm, SiLU, dropout, conv, plus shortcut.

  Attributes:
    channels: of the result.
    norm: makes a group normalization of a given name.
    dropout: its rate.
    time_injection: 'add', or 'scale_shift' on the second norm.
    resample: 'up' or 'down' inside the block, or None.
  """

  is_block = True  # see `denoiser.Denoiser`

  channels: int
  norm: Callable[[str], nn.Module]
  dropout: float = 0.0
  time_injection: str = 'add'
  resample: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array | None = None,
               train: bool = False) -> jax.Array:
    h = nn.silu(self.norm('norm1')(x))
    # Both ways, between the activation and the convolution, as in ADM: the
    # shortcut has to have the size of what it is added to.
    if self.resample == 'down':
      h, x = (nn.avg_pool(v, (2, 2), (2, 2)) for v in (h, x))
    elif self.resample == 'up':
      h, x = upsample_nearest(h), upsample_nearest(x)
    h = conv3x3(self.channels, 'conv1')(h)
    if temb is None:
      h = self.norm('norm2')(h)
    else:
      h = self._with_time(h, temb)
    h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
    h = conv3x3(self.channels, 'conv2')(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), name='nin_shortcut')(x)
    return x + h

  def _with_time(self, h, temb):
    # The embedding comes without its last activation (see `UNet._embed`), which
    # each block has before its own projection: a layer behind SiLU.
    scale_shift = self.time_injection == 'scale_shift'
    temb = nn.Dense(self.channels * (2 if scale_shift else 1),
                    name='temb_proj')(nn.silu(temb))[:, None, None, :]
    if not scale_shift:
      return self.norm('norm2')(h + temb)
    scale, shift = jnp.split(temb, 2, axis=-1)
    return self.norm('norm2')(h) * (1 + scale) + shift


class AttnBlock(nn.Module):
  """Self-attention over the pixels, with a residual connection."""

  is_block = True  # see `denoiser.Denoiser`

  heads: int
  norm: Callable[[str], nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, height, width, c = x.shape
    h = self.norm('norm')(x).reshape(b, height * width, c)
    q, k, v = (
        nn.Dense(c, name=name)(h).reshape(b, -1, self.heads, c // self.heads)
        for name in ('q', 'k', 'v'))
    h = attention.attend(q, k, v).reshape(b, height * width, c)
    return x + nn.Dense(c, name='proj_out')(h).reshape(x.shape)
