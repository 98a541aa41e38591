"""The transformer of FLUX.1 (Black Forest Labs 2024), for schnell and dev.

Names of modules are those of diffusers' FluxTransformer2DModel, so that a
parameter's path joined with dots is the key of the published state dict; only
`proj_out` of a single block is two layers here, see `flux_blocks`.

Models import nothing else of the package and know nothing of quantization.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.models import denoiser
from msfp_jax.models import flux_blocks
from msfp_jax.models import rope
from msfp_jax.models import timestep

# Latents of 2 x 2 places are one token.
PATCH = 2
# The timestep and the guidance are embedded like a step of 1000.
_STEPS, _FREQUENCIES = 1000.0, 256

# The flow, D = 3072 channels of which a head has 128:
#
#   x [B, H, W, 16] -- 2x2 --> tokens [B, H W / 4, 64] --> x_embedder ---+
#   text [B, L, 4096] --> context_embedder --------------------+         |
#   t, pooled[, guidance] --> time_text_embed --> vector [B, D] |         |
#                                    |                          v         v
#                                    +--> adaLN of ... 19 double blocks (two
#                                    |    streams of weights, one attention)
#                                    |                   |  [text, image]
#                                    +--> adaLN of ... 38 single blocks
#                                    |                   |  image alone
#                                    +--> norm_out --> proj_out --> v like x


@dataclasses.dataclass(frozen=True)
class FluxConfig:
  """Shape of the transformer; the defaults are FLUX.1-schnell's.

  Raises:
    ValueError: a field contradicts another; the message names it.
  """

  image_size: int = 128  # height of the trained model's latents
  in_channels: int = 16  # of the latents
  out_channels: int = 16
  num_layers: int = 19  # double blocks
  num_single_layers: int = 38
  num_heads: int = 24
  head_dim: int = 128
  text_dim: int = 4096  # T5's
  pooled_dim: int = 768  # CLIP's
  guidance_embeds: bool = False  # dev takes the strength of guidance
  axes_dims: tuple[int, ...] = (16, 56, 56)  # of a head, by axis of positions
  image_width: int | None = None  # of latents that are not square

  def __post_init__(self):
    object.__setattr__(self, 'axes_dims', tuple(self.axes_dims))
    for field in ('in_channels', 'out_channels', 'num_layers',
                  'num_single_layers', 'num_heads', 'head_dim', 'text_dim',
                  'pooled_dim'):
      if getattr(self, field) < 1:
        raise ValueError(f'{field}={getattr(self, field)}: must be positive')
    if (len(self.axes_dims) != 3 or sum(self.axes_dims) != self.head_dim
        or any(dim < 0 or dim % 2 for dim in self.axes_dims)):
      raise ValueError(
          f'axes_dims={list(self.axes_dims)}: must be three even numbers '
          f'that add up to head_dim={self.head_dim}')
    self.check_size(self.image_size, self.image_width or self.image_size)

  @property
  def channels(self) -> int:
    """Of a token."""
    return self.num_heads * self.head_dim

  def check_size(self, *sides: int) -> None:
    """Raises ValueError unless every side is a positive even number."""
    for side in sides:
      if side < PATCH or side % PATCH:
        lower = max(side // PATCH, 1) * PATCH
        raise ValueError(
            f'latent side {side}: this transformer takes even ones, such as '
            f'{lower} or {lower + PATCH}; of images that is a multiple of '
            f'{8 * PATCH} pixels')

  def to_dict(self) -> dict[str, Any]:
    """The fields as plain JSON; `FluxConfig(**d)` is the inverse."""
    return dataclasses.asdict(self) | {'axes_dims': list(self.axes_dims)}


def to_tokens(x: jax.Array) -> jax.Array:
  """Latents `[B, H, W, C]` -> `[B, H W / 4, 4 C]`; channels by (c, dy, dx)."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
  return x.transpose(0, 1, 3, 5, 2, 4).reshape(
      batch, -1, channels * PATCH**2)


def from_tokens(tokens: jax.Array, height: int, width: int) -> jax.Array:
  """The inverse of `to_tokens`."""
  batch = tokens.shape[0]
  x = tokens.reshape(batch, height // PATCH, width // PATCH, -1, PATCH, PATCH)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height, width, -1)


class Flux(nn.Module):
  """Predicts the velocity v = noise - data in x = (1 - t) data + t noise.

  Call with x `[B, H, W, in_channels]` float32 (latents as the autoencoder has
  them, H and W even), t `[B]` in [0, 1] (sigma of flow matching), text
  `[B, L, text_dim]` of any length, pooled `[B, pooled_dim]` and, where the
  model has `guidance_embeds`, guidance `[B]`, such as 3.5. Returns
  `[B, H, W, out_channels]`.

  Raises ValueError where guidance is missing or not wanted, and for sides that
  are odd.
  """

  config: FluxConfig

  @nn.compact
  def __call__(self, x, t, text, pooled, guidance=None):
    cfg = self.config
    height, width = x.shape[1:3]
    cfg.check_size(height, width)
    if (guidance is not None) != cfg.guidance_embeds:
      raise ValueError('this transformer '
                       f'{"needs" if cfg.guidance_embeds else "takes no"} '
                       'guidance')
    vector = self._embed(t, pooled, guidance)
    dense = lambda channels, name: nn.Dense(channels, name=name)
    image = dense(cfg.channels, 'x_embedder')(to_tokens(x))
    text = dense(cfg.channels, 'context_embedder')(text)
    length = text.shape[1]
    table = rope.make_table(rope.joint_positions(
        length, height // PATCH, width // PATCH), cfg.axes_dims)
    for i in range(cfg.num_layers):
      image, text = flux_blocks.DoubleBlock(
          cfg.num_heads, name=f'transformer_blocks.{i}')(
              image, text, vector, table)
    h = jnp.concatenate([text, image], axis=1)
    for i in range(cfg.num_single_layers):
      h = flux_blocks.SingleBlock(
          cfg.num_heads, name=f'single_transformer_blocks.{i}')(
              h, vector, table)
    # Here alone the scale comes first.
    scale, shift = flux_blocks.modulation(
        vector, 2, cfg.channels, 'norm_out.linear')
    h = flux_blocks.modulate(h[:, length:], shift, scale)
    return from_tokens(dense(cfg.out_channels * PATCH**2, 'proj_out')(h),
                       height, width)

  def _embed(self, t, pooled, guidance):
    """Time, text and guidance as one vector `[B, channels]`."""
    def embed(x, name):
      name = f'time_text_embed.{name}_embedder.linear_'
      h = nn.Dense(self.config.channels, name=f'{name}1')(x)
      return nn.Dense(self.config.channels, name=f'{name}2')(nn.silu(h))

    # With the cosines first, like latent diffusion. Guidance times 1000 is an
    # angle of thousands, of which the model was trained on float32's.
    waves = lambda number: timestep.timestep_embedding(
        number.astype(jnp.float32) * _STEPS, _FREQUENCIES, 'cos_sin',
        freq_shift=0, exponents=np.float32).astype(pooled.dtype)
    vector = embed(waves(t), 'timestep') + embed(pooled, 'text')
    if guidance is not None:
      vector += embed(waves(guidance), 'guidance')
    return vector

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what it denoises."""
    return denoiser.shape_of(self.config)

  @property
  def conditions(self) -> tuple[denoiser.Condition, ...]:
    """Text by token, text as one vector, and the guidance where it is taken."""
    cfg = self.config
    found = (denoiser.Condition('text', shape=(1, cfg.text_dim)),
             denoiser.Condition('pooled', shape=(cfg.pooled_dim,)))
    return found + (denoiser.Condition('guidance'),) * cfg.guidance_embeds

  @nn.nowrap
  def to_dict(self) -> dict[str, Any]:
    """The configuration's."""
    return self.config.to_dict()

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'Flux':
    """The inverse of `to_dict`."""
    return cls(FluxConfig(**fields))
