"""The DDPM / DDIM UNet (Ho et al. 2020) as ermongroup/ddim builds it.

Module names are the original ones (`down.0.block.1.conv1`), so a parameter's
path joined with dots is the key of the original state dict. The switches of
the relatives (latent diffusion, diffusers) are fields of `UNetConfig`.

This module imports nothing of the package and knows nothing of quantization.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Shape of a UNet; the defaults are the CIFAR-10 model's.

  Raises:
    ValueError: a field contradicts another; the message names both.
  """

  image_size: int = 32  # of the trained model; fixes where attention stands
  in_channels: int = 3
  out_channels: int = 3
  ch: int = 128  # channels of the finest level
  ch_mult: tuple[int, ...] = (1, 2, 2, 2)  # per level, fine to coarse
  num_res_blocks: int = 2  # per level going down; one more going up
  attn_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.1
  norm_groups: int = 32
  norm_eps: float = 1e-6  # latent diffusion and diffusers: 1e-5
  num_heads: int | None = None  # attention heads everywhere; None: one head
  head_channels: int | None = None  # width of a head; excludes num_heads
  downsample_padding: tuple[int, int] = (0, 1)  # latent diffusion: (1, 1)
  resample: str = 'conv'  # 'conv' or 'resblock' (average pool / nearest)
  time_injection: str = 'add'  # 'add' or 'scale_shift' (on norm2)
  time_order: str = 'sin_cos'  # or 'cos_sin'
  time_freq_shift: int = 1  # frequencies 10000^(-k / (half - shift))
  num_classes: int | None = None  # class embedding added to the time's

  def __post_init__(self):
    object.__setattr__(self, 'ch_mult', tuple(self.ch_mult))
    object.__setattr__(self, 'attn_resolutions', tuple(self.attn_resolutions))
    object.__setattr__(
        self, 'downsample_padding', tuple(self.downsample_padding))
    for field, allowed in (('resample', ('conv', 'resblock')),
                           ('time_injection', ('add', 'scale_shift')),
                           ('time_order', ('sin_cos', 'cos_sin'))):
      value = getattr(self, field)
      if value not in allowed:
        raise ValueError(f'{field}={value!r}: must be one of {allowed}')
    if self.num_heads and self.head_channels:
      raise ValueError(f'num_heads={self.num_heads} and '
                       f'head_channels={self.head_channels}: give one')
    for mult in (1, *self.ch_mult):
      if self.ch * mult % self.norm_groups:
        raise ValueError(
            f'ch={self.ch} x ch_mult={mult} is not a multiple of '
            f'norm_groups={self.norm_groups}')
    self.check_size(self.image_size)
    for i, mult in enumerate(self.ch_mult):
      attn = self.image_size // 2 ** i in self.attn_resolutions
      if attn or i == len(self.ch_mult) - 1:
        self.heads(self.ch * mult)

  @property
  def stride(self) -> int:
    """Sides must be multiples of this: 2 to the number of down-samplings."""
    return 2 ** (len(self.ch_mult) - 1)

  def check_size(self, *sides: int) -> None:
    """Raises ValueError unless every side is a positive multiple of stride."""
    for side in sides:
      if side < self.stride or side % self.stride:
        lower = max(side // self.stride, 1) * self.stride
        raise ValueError(
            f'image side {side}: the {len(self.ch_mult)} levels of this UNet '
            f'take multiples of {self.stride}, such as {lower} or '
            f'{lower + self.stride}; resize the images or change ch_mult')

  def heads(self, channels: int) -> int:
    """Number of attention heads over `channels` channels."""
    field = 'head_channels' if self.head_channels else 'num_heads'
    divisor = getattr(self, field) or 1
    if channels % divisor:
      raise ValueError(f'attention over {channels} channels: not a multiple '
                       f'of {field}={divisor}')
    return channels // divisor if self.head_channels else divisor

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON-able form; `UNetConfig(**d)` is its inverse."""
    return {k: list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(self).items()}


def timestep_embedding(t: jax.Array, dim: int, order: str = 'sin_cos',
                       freq_shift: int = 1) -> jax.Array:
  """Sinusoidal embedding of timesteps.

  Args:
    t: timesteps, float or int, `[B]`.
    dim: width of the result.
    order: 'sin_cos' (DDPM) or 'cos_sin' (latent diffusion).
    freq_shift: 1 for DDPM, 0 for latent diffusion.

  Returns:
    float32 `[B, dim]`; an odd `dim` gets a last column of zeros.
  """
  half = dim // 2
  # In float64 once: float32 frequencies differ by an ULP between frameworks,
  # which is 3e-5 of the embedding at t = 999.
  freqs = np.exp(-math.log(10000.0) * np.arange(half) / (half - freq_shift))
  angles = t.astype(jnp.float32)[:, None] * freqs.astype(np.float32)[None, :]
  parts = [jnp.sin(angles), jnp.cos(angles)]
  emb = jnp.concatenate(parts if order == 'sin_cos' else parts[::-1], axis=-1)
  return jnp.pad(emb, ((0, 0), (0, dim % 2)))


def upsample_nearest(x: jax.Array) -> jax.Array:
  """`[B, H, W, C]` -> `[B, 2H, 2W, C]`, every pixel four times."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def conv3x3(channels: int, name: str, stride: int = 1,
            padding: tuple[int, int] = (1, 1)) -> nn.Conv:
  return nn.Conv(channels, (3, 3), (stride, stride), (padding, padding),
                 name=name)


def group_norm(config: UNetConfig, name: str) -> nn.GroupNorm:
  # The fast variance cancels: an error of 2e-2 where |mean| = 100 std.
  return nn.GroupNorm(config.norm_groups, epsilon=config.norm_eps,
                      use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
  """Norm, SiLU, conv, plus time; norm, SiLU, dropout, conv, plus shortcut."""

  config: UNetConfig
  channels: int
  resample: str | None = None  # 'up' or 'down' inside the block

  @nn.compact
  def __call__(self, x, temb, train: bool):
    cfg = self.config
    h = nn.silu(group_norm(cfg, 'norm1')(x))
    if self.resample == 'down':
      h, x = (nn.avg_pool(v, (2, 2), (2, 2)) for v in (h, x))
    elif self.resample == 'up':
      h, x = upsample_nearest(h), upsample_nearest(x)
    h = conv3x3(self.channels, 'conv1')(h)
    scale_shift = cfg.time_injection == 'scale_shift'
    temb = nn.Dense(self.channels * (2 if scale_shift else 1),
                    name='temb_proj')(nn.silu(temb))[:, None, None, :]
    if scale_shift:
      scale, shift = jnp.split(temb, 2, axis=-1)
      h = group_norm(cfg, 'norm2')(h) * (1 + scale) + shift
    else:
      h = group_norm(cfg, 'norm2')(h + temb)
    h = nn.Dropout(cfg.dropout, deterministic=not train)(nn.silu(h))
    h = conv3x3(self.channels, 'conv2')(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), name='nin_shortcut')(x)
    return x + h


class AttnBlock(nn.Module):
  """Self-attention over the pixels, with a residual connection."""

  config: UNetConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.config
    b, height, width, c = x.shape
    h = group_norm(cfg, 'norm')(x)
    h = h.reshape(b, height * width, c)
    heads = cfg.heads(c)
    q, k, v = (nn.Dense(c, name=name)(h).reshape(b, -1, heads, c // heads)
               for name in ('q', 'k', 'v'))
    h = jax.nn.dot_product_attention(q, k, v)
    h = nn.Dense(c, name='proj_out')(h.reshape(b, height * width, c))
    return x + h.reshape(x.shape)


class UNet(nn.Module):
  """Predicts the noise in `x`.

  Call with x `[B, H, W, in_channels]` float32 (H and W multiples of
  `config.stride`), t `[B]` (timesteps, int or float), and, where
  `num_classes` is set, labels `[B]` int. Returns float32
  `[B, H, W, out_channels]`. With `train=True` dropout needs a 'dropout' rng.
  """

  config: UNetConfig

  @nn.compact
  def __call__(self, x, t, labels=None, train: bool = False):
    cfg = self.config
    cfg.check_size(*x.shape[1:3])
    temb = self._embed(t, labels)
    block = lambda channels, name, resample=None: (
        lambda h: ResnetBlock(cfg, channels, resample, name=name)(
            h, temb, train))
    attn = lambda name: AttnBlock(cfg, name=name)
    levels = len(cfg.ch_mult)
    resolutions = [cfg.image_size // 2 ** i for i in range(levels)]

    h = conv3x3(cfg.ch, 'conv_in')(x)
    skips = [h]
    for i, mult in enumerate(cfg.ch_mult):
      for j in range(cfg.num_res_blocks):
        h = block(cfg.ch * mult, f'down.{i}.block.{j}')(h)
        if resolutions[i] in cfg.attn_resolutions:
          h = attn(f'down.{i}.attn.{j}')(h)
        skips.append(h)
      if i < levels - 1:
        if cfg.resample == 'conv':
          h = conv3x3(h.shape[-1], f'down.{i}.downsample.conv', 2,
                      cfg.downsample_padding)(h)
        else:
          h = block(h.shape[-1], f'down.{i}.downsample', 'down')(h)
        skips.append(h)

    h = block(h.shape[-1], 'mid.block_1')(h)
    h = attn('mid.attn_1')(h)
    h = block(h.shape[-1], 'mid.block_2')(h)

    for i, mult in reversed(list(enumerate(cfg.ch_mult))):
      for j in range(cfg.num_res_blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = block(cfg.ch * mult, f'up.{i}.block.{j}')(h)
        if resolutions[i] in cfg.attn_resolutions:
          h = attn(f'up.{i}.attn.{j}')(h)
      if i > 0:
        if cfg.resample == 'conv':
          h = conv3x3(h.shape[-1], f'up.{i}.upsample.conv')(
              upsample_nearest(h))
        else:
          h = block(h.shape[-1], f'up.{i}.upsample', 'up')(h)

    h = group_norm(cfg, 'norm_out')(h)
    return conv3x3(cfg.out_channels, 'conv_out')(nn.silu(h))

  def _embed(self, t, labels):
    """Time (and class) embedding `[B, 4 ch]`, without a last activation."""
    cfg = self.config
    temb = timestep_embedding(t, cfg.ch, cfg.time_order, cfg.time_freq_shift)
    temb = nn.Dense(4 * cfg.ch, name='temb.dense.0')(temb)
    temb = nn.Dense(4 * cfg.ch, name='temb.dense.1')(nn.silu(temb))
    if cfg.num_classes is not None:
      temb += nn.Embed(cfg.num_classes, 4 * cfg.ch, name='label_emb')(labels)
    return temb
