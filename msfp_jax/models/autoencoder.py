"""First stages of latent diffusion: VQ and KL autoencoders.

Module names are CompVis' (`decoder.up.2.block.0.conv1`); blocks are the UNet's
without a timestep.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import blocks

KL, VQ = 'kl', 'vq'


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """Shape of a first stage; the defaults are those of Stable Diffusion's.

  Raises:
    ValueError: an unknown kind, or one that contradicts another field.
  """

  kind: str = KL  # or 'vq'
  in_channels: int = 3
  out_channels: int = 3
  ch: int = 128  # channels of the finest level
  ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # per level, fine to coarse
  num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
  attn_levels: tuple[int, ...] = ()  # levels with attention beside the middle
  z_channels: int = 4  # of the encoder's result
  embed_dim: int = 4  # of the latents
  codebook_size: int = 0  # of 'vq'
  norm_groups: int = 32
  norm_eps: float = 1e-6
  quant_conv: bool = True  # 1x1 convolutions around the latents
  # Latents that a UNet sees are (z - shift) * scale.
  scale: float = 1.0
  shift: float = 0.0

  def __post_init__(self):
    object.__setattr__(self, 'ch_mult', tuple(self.ch_mult))
    object.__setattr__(self, 'attn_levels', tuple(self.attn_levels))
    if self.kind not in (KL, VQ):
      raise ValueError(f'kind {self.kind!r}: must be {KL!r} or {VQ!r}')
    if (self.kind == VQ) != bool(self.codebook_size):
      raise ValueError(f'kind {self.kind!r} with codebook_size='
                       f'{self.codebook_size}: a codebook belongs to {VQ!r}')
    if not 0 < self.scale < math.inf or not math.isfinite(self.shift):
      raise ValueError(f'scale={self.scale}, shift={self.shift} of latents: '
                       'must be numbers, and the scale above 0')

  @property
  def stride(self) -> int:
    """The pixels of an image along a side of one latent."""
    return 2 ** (len(self.ch_mult) - 1)


class _Stack(nn.Module):
  """The blocks that encoder and decoder are both built of."""

  config: AutoencoderConfig

  @property
  def _norm(self):
    return blocks.group_norm(self.config.norm_groups, self.config.norm_eps)

  def _block(self, channels, name):
    return blocks.ResnetBlock(channels, self._norm, name=name)

  def _attn(self, name):
    return blocks.AttnBlock(1, self._norm, name=name)

  def _middle(self, h):
    h = self._block(h.shape[-1], 'mid.block_1')(h)
    h = self._attn('mid.attn_1')(h)
    return self._block(h.shape[-1], 'mid.block_2')(h)

  def _out(self, h, channels):
    return blocks.conv3x3(channels, 'conv_out')(
        nn.silu(self._norm('norm_out')(h)))


class Encoder(_Stack):
  """Encodes images `[B, H, W, in_channels]` to `[B, H/s, W/s, z; KL: 2 z]`."""

  @nn.compact
  def __call__(self, x):
    cfg = self.config
    h = blocks.conv3x3(cfg.ch, 'conv_in')(x)
    for i, mult in enumerate(cfg.ch_mult):
      for j in range(cfg.num_res_blocks):
        h = self._block(cfg.ch * mult, f'down.{i}.block.{j}')(h)
        if i in cfg.attn_levels:
          h = self._attn(f'down.{i}.attn.{j}')(h)
      if i < len(cfg.ch_mult) - 1:
        # Padded to the right and below only, as CompVis does.
        h = blocks.conv3x3(h.shape[-1], f'down.{i}.downsample.conv', 2,
                           (0, 1))(h)
    width = cfg.z_channels * (2 if cfg.kind == KL else 1)
    return self._out(self._middle(h), width)


class Decoder(_Stack):
  """Decodes `[B, h, w, z_channels]` to images `[B, s h, s w, out_channels]`."""

  @nn.compact
  def __call__(self, z):
    cfg = self.config
    levels = list(enumerate(cfg.ch_mult))
    h = blocks.conv3x3(cfg.ch * cfg.ch_mult[-1], 'conv_in')(z)
    h = self._middle(h)
    for i, mult in reversed(levels):
      for j in range(cfg.num_res_blocks + 1):
        h = self._block(cfg.ch * mult, f'up.{i}.block.{j}')(h)
        if i in cfg.attn_levels:
          h = self._attn(f'up.{i}.attn.{j}')(h)
      if i > 0:
        h = blocks.conv3x3(h.shape[-1], f'up.{i}.upsample.conv')(
            blocks.upsample_nearest(h))
    return self._out(h, cfg.out_channels)


class Autoencoder(nn.Module):
  """A first stage: `encode` and `decode` are its two methods.

  Source: Rombach et al., CVPR 2022, and its public code.
  """

  config: AutoencoderConfig

  def setup(self):
    cfg = self.config
    self.encoder = Encoder(cfg)
    self.decoder = Decoder(cfg)
    if cfg.quant_conv:
      width = 2 if cfg.kind == KL else 1
      self.quant_conv = nn.Conv(cfg.embed_dim * width, (1, 1))
      self.post_quant_conv = nn.Conv(cfg.z_channels, (1, 1))
    if cfg.kind == VQ:
      self.quantize = nn.Embed(cfg.codebook_size, cfg.embed_dim)

  def __call__(self, x):
    return self.decode(self.encode(x))

  def encode(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Encodes images in [-1, 1] to the latents that a UNet sees.

    Args:
      x: `[B, H, W, in_channels]`, sides multiples of `config.stride`.
      key: draws from a KL autoencoder's distribution; without it, its mean.

    Returns:
      `[B, H/s, W/s, embed_dim]`; a VQ autoencoder's are not yet quantized.
    """
    cfg = self.config
    h = self.encoder(x)
    if cfg.quant_conv:
      h = self.quant_conv(h)
    if cfg.kind == KL:
      # Mean and logarithm of the variance, the latter clipped as in CompVis.
      h, log_variance = jnp.split(h, 2, axis=-1)
      if key is not None:
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        h += std * jax.random.normal(key, h.shape)
    return (h - cfg.shift) * cfg.scale

  def decode(self, z: jax.Array) -> jax.Array:
    """Decodes latents as a UNet sees them to images, nominally in [-1, 1].

    Large images in less memory: `decode_rows.decode`.
    """
    return self.decoder(self.to_decoder(z))

  def to_decoder(self, z: jax.Array) -> jax.Array:
    """Latents as a UNet sees them, as the decoder takes them."""
    cfg = self.config
    # What a UNet generates lies near entries of the codebook, not on them.
    h = z / cfg.scale + cfg.shift
    if cfg.kind == VQ:
      h = self._nearest(h)
    if cfg.quant_conv:
      h = self.post_quant_conv(h)
    return h

  def _nearest(self, z):
    """Replaces every position by the nearest entry of the codebook."""
    book = self.quantize.embedding
    norms = jnp.sum(book**2, axis=1)

    def nearest(image):
      # |z - e|^2 without |z|^2, which is the same for every entry; at full
      # precision, as the entries lie close together.
      products = jnp.matmul(image, book.T, precision=jax.lax.Precision.HIGHEST)
      return book[jnp.argmin(norms - 2 * products, axis=-1)]

    # Of a batch at once the distances would be gigabytes.
    return jax.lax.map(nearest, z)
