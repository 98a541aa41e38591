"""T5's encoder: tokens to the vectors that FLUX attends to.

Of T5 (Raffel et al. 2020) and T5 v1.1, whose feed-forward is gated; FLUX has
the latter's largest, T5-XXL.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.models.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class T5Config:
  """What T5's encoder is built of; the defaults are T5-XXL's, v1.1.

  Attributes:
    vocab_size: number of tokens, with some that no tokenizer gives.
    width: of the hidden vectors.
    head_width: of a head; all heads together may be wider than `width`.
    mlp_width: of the layer between those of a feed-forward.
    layers: number of blocks.
    heads: of every attention.
    activation: in the feed-forward, a name in `activations.ACTIVATIONS`.
    gated: whether what the activation gives is multiplied with a second
      product of the same input.
    norm_eps: epsilon of the norms.
    buckets: classes of distances between two tokens, half of them for tokens
      behind; each head learns a number for each.
    max_distance: from which on all distances are one class.
  """

  vocab_size: int = 32128
  width: int = 4096
  head_width: int = 64
  mlp_width: int = 10240
  layers: int = 24
  heads: int = 64
  activation: str = 'gelu_new'
  gated: bool = True
  norm_eps: float = 1e-6
  buckets: int = 32
  max_distance: int = 128

  def __post_init__(self):
    if self.buckets < 4 or self.max_distance <= self.buckets // 4:
      raise ValueError(f'{self.buckets} buckets up to distance '
                       f'{self.max_distance}: must be 4 or more, and the '
                       'distance above a quarter of them')


class T5(nn.Module):
  """The encoder, called as model(ids).

  It has no mask: FLUX lets its tokens attend to the padding, and attends to
  what becomes of it.
  """

  config: T5Config

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Encodes tokens int32 `[B, L]` to float32 `[B, L, width]`."""
    cfg = self.config
    # Parameters may be kept in half precision; all is computed in float32.
    h = nn.Embed(cfg.vocab_size, cfg.width, name='token_embedding')(ids).astype(
        jnp.float32)
    # One table, which the checkpoint keeps in its first block, for all blocks.
    table = nn.Embed(cfg.buckets, cfg.heads, name='distance_bias')
    classes = distance_classes(ids.shape[1], cfg.buckets, cfg.max_distance)
    bias = table(classes).astype(jnp.float32).transpose(2, 0, 1)[None]
    for i in range(cfg.layers):
      h = _Block(cfg, name=f'blocks.{i}')(h, bias)
    return _norm(cfg, 'final_norm')(h)


def distance_classes(length: int, buckets: int, max_distance: int
                     ) -> np.ndarray:
  """The class of the distance between any two tokens, int32 `[L, L]`.

  Row q, column k: of token k as token q sees it. Tokens before have the lower
  half of the classes. Of each half, one half is for single distances, and the
  other for distances that grow by powers up to `max_distance`.
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]
  half = buckets // 2
  exact = half // 2
  far = np.maximum(np.abs(distance), 1).astype(np.float32)
  # In float32 and in this order, as in the code that the weights were trained
  # with: at powers of two, whose logarithms are fractions without a rest, the
  # rounding decides.
  steps = (np.log(far / np.float32(exact))
           / np.float32(math.log(max_distance / exact))
           * np.float32(half - exact))
  # Below `exact` it is negative, and not used.
  large = np.minimum(exact + steps.astype(np.int32), half - 1)
  return (half * (distance > 0) + np.where(
      np.abs(distance) < exact, np.abs(distance), large)).astype(np.int32)


def _norm(cfg, name):
  # A scale alone: no mean is taken off, and there is no bias.
  return nn.RMSNorm(epsilon=cfg.norm_eps, name=name)


def _dense(width, name):
  return nn.Dense(width, use_bias=False, name=name)


class _Block(nn.Module):
  """Attention to all tokens, and a feed-forward, each with its norm."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    x = x + _Attention(self.config, name='attn')(
        _norm(self.config, 'norm1')(x), bias)
    return x + _FeedForward(self.config, name='ff')(
        _norm(self.config, 'norm2')(x))


class _Attention(nn.Module):
  """softmax(q k^T + bias) v: the scores are not scaled, as T5 was trained."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    cfg = self.config
    inner = cfg.heads * cfg.head_width
    q, k, v = (_dense(inner, name)(x).reshape(
        *x.shape[:2], cfg.heads, cfg.head_width) for name in 'qkv')
    h = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0)
    return _dense(cfg.width, 'proj_out')(h.reshape(*x.shape[:2], inner))


class _FeedForward(nn.Module):
  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    h = ACTIVATIONS[cfg.activation](_dense(cfg.mlp_width, 'proj')(x))
    if cfg.gated:
      h = h * _dense(cfg.mlp_width, 'gated')(x)
    return _dense(cfg.width, 'out')(h)
