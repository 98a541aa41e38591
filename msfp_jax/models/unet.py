"""The UNet of DDPM (Ho et al. 2020) and of its relatives, by switches.

Module names are those of ermongroup/ddim (`down.0.block.1.conv1`), so that for
its models a parameter's path joined with dots is the key of the original state
dict. What latent diffusion, Stable Diffusion and diffusers do otherwise are
fields of `UNetConfig`.

Models import nothing else of the package and know nothing of quantization.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from msfp_jax.models import attention
from msfp_jax.models import blocks
from msfp_jax.models import denoiser
from msfp_jax.models import timestep

# The CIFAR-10 model, R a ResnetBlock, A attention, numbers the channels:
#
#   side
#    32   conv_in  R R 128 ------------- skips ------------> R R R 128  conv_out
#                     | downsample                              ^ upsample
#    16            RA RA 256 ----------- skips -----------> RA RA RA 256
#                     |                                         ^
#     8             R R 256 ------------ skips -------------> R R R 256
#                     |                                         ^
#     4             R R 256 --> mid: R A R --> skips -------> R R R 256
#
# Everything that goes down is kept: conv_in, each block, each downsample. On
# the way up each block takes the latest one that is left, behind its own
# channels. That is num_res_blocks + 1 blocks a level: one for a skip of conv_in
# or of the downsample into it.


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Shape of a UNet; the defaults are the CIFAR-10 model's.

  Raises:
    ValueError: a field contradicts another; the message names both.
  """

  # Height of the trained model's images; fixes where attention stands.
  image_size: int = 32
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
  # Width of the context; with one, attention is by spatial transformers.
  context_dim: int | None = None
  context_classes: int | None = None  # the context is a class embedding
  transformer_depth: int = 1  # blocks of a spatial transformer
  image_width: int | None = None  # of images that are not square

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
    if self.context_classes and not self.context_dim:
      raise ValueError(f'context_classes={self.context_classes} need a '
                       'context_dim')
    self.check_size(self.image_size, self.image_width or self.image_size)
    # Where attention will stand: at the listed resolutions, and in the middle.
    for i, mult in enumerate(self.ch_mult):
      attn = self.image_size // 2 ** i in self.attn_resolutions
      if attn or i == len(self.ch_mult) - 1:
        self.heads(self.ch * mult)

  @property
  def stride(self) -> int:
    """The number that sides must be multiples of: 2 a down-sampling."""
    return 2 ** (len(self.ch_mult) - 1)

  @property
  def by_class(self) -> bool:
    """Whether the model takes labels."""
    return bool(self.num_classes or self.context_classes)

  @property
  def by_context(self) -> bool:
    """Whether the model takes a context."""
    return bool(self.context_dim and not self.context_classes)

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
    """The fields as plain JSON; `UNetConfig(**d)` is the inverse."""
    fields = {k: list(v) if isinstance(v, tuple) else v
              for k, v in dataclasses.asdict(self).items()}
    # Files of square models stay as they were before there were others.
    if self.image_width is None:
      del fields['image_width']
    return fields


class UNet(nn.Module):
  """Predicts the noise in `x`.

  Call with x `[B, H, W, in_channels]` float32 (H and W multiples of
  `config.stride`) and t `[B]` (timesteps, int or float). Class-conditional
  models (`num_classes`, `context_classes`) take labels `[B]` int; with a
  `context_dim` alone, context `[B, N, context_dim]`, by its name or as the only
  argument after t. Returns float32
  `[B, H, W, out_channels]`. With `train=True` dropout needs a 'dropout' rng.

  Raises ValueError where labels or context are missing or not wanted.
  """

  config: UNetConfig

  @nn.compact
  def __call__(self, x, t, labels=None, context=None, *, train: bool = False):
    cfg = self.config
    cfg.check_size(*x.shape[1:3])
    # By their order, conditions of a model without labels begin here.
    if (context is None and getattr(labels, 'ndim', 0) == 3 and cfg.by_context
        and not cfg.by_class):
      labels, context = None, labels
    self._check_condition(labels, context)
    temb = self._embed(t, labels, x.dtype)
    # A class as a context of one token (cin256-v2).
    if cfg.context_classes:
      context = nn.Embed(cfg.context_classes, cfg.context_dim,
                         name='context_emb')(labels)[:, None]
    block = lambda channels, name, resample=None: (
        lambda h: blocks.ResnetBlock(
            channels, self._norm, cfg.dropout, cfg.time_injection, resample,
            name=name)(h, temb, train))
    attend = lambda name: lambda h: self._attention(h, context, name)
    # From the trained model's side, not from x: another size of x has attention
    # at the same levels.
    levels = len(cfg.ch_mult)
    resolutions = [cfg.image_size // 2 ** i for i in range(levels)]

    h = blocks.conv3x3(cfg.ch, 'conv_in')(x)
    skips = [h]
    for i, mult in enumerate(cfg.ch_mult):
      for j in range(cfg.num_res_blocks):
        h = block(cfg.ch * mult, f'down.{i}.block.{j}')(h)
        if resolutions[i] in cfg.attn_resolutions:
          h = attend(f'down.{i}.attn.{j}')(h)
        skips.append(h)
      if i < levels - 1:
        if cfg.resample == 'conv':
          h = blocks.conv3x3(h.shape[-1], f'down.{i}.downsample.conv', 2,
                             cfg.downsample_padding)(h)
        else:
          h = block(h.shape[-1], f'down.{i}.downsample', 'down')(h)
        skips.append(h)

    h = block(h.shape[-1], 'mid.block_1')(h)
    h = attend('mid.attn_1')(h)
    h = block(h.shape[-1], 'mid.block_2')(h)

    for i, mult in reversed(list(enumerate(cfg.ch_mult))):
      for j in range(cfg.num_res_blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = block(cfg.ch * mult, f'up.{i}.block.{j}')(h)
        if resolutions[i] in cfg.attn_resolutions:
          h = attend(f'up.{i}.attn.{j}')(h)
      if i > 0:
        if cfg.resample == 'conv':
          h = blocks.conv3x3(h.shape[-1], f'up.{i}.upsample.conv')(
              blocks.upsample_nearest(h))
        else:
          h = block(h.shape[-1], f'up.{i}.upsample', 'up')(h)

    h = nn.silu(self._norm('norm_out')(h))
    return blocks.conv3x3(cfg.out_channels, 'conv_out')(h)

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what it denoises."""
    return denoiser.shape_of(self.config)

  @property
  def conditions(self) -> tuple[denoiser.Condition, ...]:
    """Labels where it is class-conditional, the context where it takes one."""
    cfg, found = self.config, []
    if cfg.by_class:
      found.append(denoiser.Condition(
          'labels', classes=cfg.num_classes or cfg.context_classes))
    if cfg.by_context:
      found.append(denoiser.Condition('context', shape=(1, cfg.context_dim)))
    return tuple(found)

  @nn.nowrap
  def to_dict(self) -> dict[str, Any]:
    """The configuration's."""
    return self.config.to_dict()

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'UNet':
    """The inverse of `to_dict`."""
    return cls(UNetConfig(**fields))

  @property
  def _norm(self):
    return blocks.group_norm(self.config.norm_groups, self.config.norm_eps)

  def _attention(self, h, context, name):
    heads = self.config.heads(h.shape[-1])
    if self.config.context_dim is None:
      return blocks.AttnBlock(heads, self._norm, name=name)(h)
    return attention.SpatialTransformer(
        heads, self.config.transformer_depth, self.config.norm_groups,
        name=name)(h, context)

  def _check_condition(self, labels, context):
    for name, given, wanted in (
        ('labels', labels, self.config.by_class),
        ('context', context, self.config.by_context)):
      if (given is not None) != wanted:
        raise ValueError(f'this UNet {"needs" if wanted else "takes no"} '
                         f'{name}')

  def _embed(self, t, labels, dtype):
    """Embeds time (and class) as `[B, 4 ch]`, without a last activation."""
    cfg = self.config
    temb = timestep.timestep_embedding(
        t, cfg.ch, cfg.time_order, cfg.time_freq_shift).astype(dtype)
    temb = nn.Dense(4 * cfg.ch, name='temb.dense.0')(temb)
    temb = nn.Dense(4 * cfg.ch, name='temb.dense.1')(nn.silu(temb))
    if cfg.num_classes is not None:
      temb += nn.Embed(cfg.num_classes, 4 * cfg.ch, name='label_emb')(labels)
    return temb
