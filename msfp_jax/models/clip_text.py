"""CLIP's text encoder: tokens to the vectors that images are made from.

Stable Diffusion 1 takes the hidden vectors of OpenAI's ViT-L/14, Stable
Diffusion 2 those of OpenCLIP's ViT-H/14, and FLUX the pooled vector of the
former (Radford et al. 2021).
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """What CLIP's text encoder is built of; the defaults are ViT-L/14's.

  Attributes:
    vocab_size: number of tokens.
    width: of the hidden vectors; a multiple of `heads`.
    mlp_width: of the layer between the two of a feed-forward.
    layers: number of blocks.
    heads: of every attention.
    length: most tokens of a text, its begin and its end among them.
    activation: in the feed-forward, a name in `activations.ACTIVATIONS`.
    norm_eps: epsilon of the norms.
    eos_id: the token that ends a text, at whose first place it is pooled.
      None: it is pooled where its highest token stands, which in CLIP's
      vocabulary is the same one.
    projection_dim: width of the pooled vector where it is projected.
  """

  vocab_size: int = 49408
  width: int = 768
  mlp_width: int = 3072
  layers: int = 12
  heads: int = 12
  length: int = 77
  activation: str = 'quick_gelu'
  norm_eps: float = 1e-5
  eos_id: int | None = 49407
  projection_dim: int | None = None

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(f'width {self.width} is no multiple of {self.heads} '
                       'heads')


class ClipTextOutput(NamedTuple):
  """What the encoder makes of tokens.

  Attributes:
    hidden: `[B, L, width]` float32, after the final norm.
    pooled: `[B, width]`, that of the text's end; `[B, projection_dim]` where
      the encoder projects it.
  """

  hidden: jax.Array
  pooled: jax.Array


class ClipText(nn.Module):
  """The encoder, called as model(ids).

  Of a text whose tokens end early the rest is computed too, as Stable
  Diffusion and FLUX do: no token looks behind itself, so that the padding
  changes nothing before it, and what it becomes is part of their context.
  """

  config: ClipTextConfig

  @nn.compact
  def __call__(self, ids: jax.Array) -> ClipTextOutput:
    """Encodes tokens int32 `[B, L]`, each from 0 to below vocab_size.

    Raises:
      ValueError: more tokens than there are positions.
    """
    cfg = self.config
    if ids.shape[1] > cfg.length:
      raise ValueError(f'{ids.shape[1]} tokens: the encoder has {cfg.length} '
                       'positions')
    h = _embedded(cfg.vocab_size, cfg.width, 'token_embedding', ids)
    h = h + _embedded(cfg.length, cfg.width, 'position_embedding',
                      jnp.arange(ids.shape[1]))
    for i in range(cfg.layers):
      h = _Block(cfg, name=f'layers.{i}')(h)
    h = _norm(cfg, 'final_norm')(h)
    pooled = h[jnp.arange(ids.shape[0]), _end(ids, cfg.eos_id)]
    if cfg.projection_dim is not None:
      pooled = nn.Dense(cfg.projection_dim, use_bias=False,
                        name='projection')(pooled)
    return ClipTextOutput(h, pooled)


def _end(ids, eos_id):
  """Where each text ends, `[B]`: the first of equal tokens counts."""
  # Configurations from before transformers 4.31 have a wrong eos_token_id, 2,
  # and are pooled at the highest token; so are Stable Diffusion's and FLUX's.
  return jnp.argmax(ids if eos_id is None else ids == eos_id, axis=-1)


def _embedded(count, width, name, ids):
  # Parameters may be kept in half precision; all is computed in float32.
  return nn.Embed(count, width, name=name)(ids).astype(jnp.float32)


def _norm(cfg, name):
  # Variances in two passes, which do not cancel.
  return nn.LayerNorm(epsilon=cfg.norm_eps, use_fast_variance=False, name=name)


class _Block(nn.Module):
  """Attention to what stands before, and a feed-forward, each with its norm."""

  config: ClipTextConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    x = x + _CausalAttention(cfg.heads, name='attn')(_norm(cfg, 'norm1')(x))
    h = nn.Dense(cfg.mlp_width, name='fc1')(_norm(cfg, 'norm2')(x))
    return x + nn.Dense(cfg.width, name='fc2')(ACTIVATIONS[cfg.activation](h))


class _CausalAttention(nn.Module):
  """Attention in which no token of x `[B, L, C]` looks behind itself."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = x.shape[-1]
    q, k, v = (nn.Dense(c, name=name)(x).reshape(
        *x.shape[:2], self.heads, c // self.heads) for name in 'qkv')
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return nn.Dense(c, name='proj_out')(h.reshape(x.shape))
