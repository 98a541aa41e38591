"""Attention over pixels and over a context, in bounded memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Scores held at once: 256 MB in float32. Up to here all of them, beyond it as
# many queries at a time as fit, but no fewer than keep the products efficient.
_SCORES_AT_ONCE, _LEAST_QUERIES = 2**26, 64


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v.

  Where the scores are many, queries are taken in pieces, so that they are
  never all in memory: at 64 x 64 pixels they are 64 MB a head and image.

  Args:
    q: `[B, N, heads, D]`.
    k: `[B, M, heads, D]`.
    v: like k.

  Returns:
    Like q.
  """
  # A query has one score for every key, head and image. Pieces need no
  # exchange: the softmax goes over keys, and each piece sees all of them.
  images, count, heads = q.shape[:3]
  piece = max(_SCORES_AT_ONCE // (images * heads * k.shape[1]), _LEAST_QUERIES)
  if count <= piece:
    return jax.nn.dot_product_attention(q, k, v)
  pieces = -(-count // piece)
  piece = -(-count // pieces)  # even pieces: the least padding
  padded = jnp.pad(q, ((0, 0), (0, pieces * piece - count), (0, 0), (0, 0)))
  split = padded.reshape(q.shape[0], pieces, piece, *q.shape[2:])
  # A loop, one piece at a time: [pieces, B, piece, heads, D] in and out.
  out = jax.lax.map(lambda part: jax.nn.dot_product_attention(part, k, v),
                    jnp.moveaxis(split, 1, 0))
  return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :count]


class Attention(nn.Module):
  """Multi-head attention from x `[B, N, C]` to a context, or to x itself.

  Attributes:
    heads: number of heads; C is a multiple of it.
    qkv_bias: whether the projections of q, k and v have a bias.
  """

  heads: int
  qkv_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None
               ) -> jax.Array:
    c = x.shape[-1]
    context = x if context is None else context
    # Three layers and not a fused one, so that each has its own quantizers; q,
    # k and v of a fused checkpoint are split when it is read.
    q, k, v = (
        nn.Dense(c, self.qkv_bias, name=name)(source).reshape(
            *source.shape[:2], self.heads, c // self.heads)
        for name, source in (('q', x), ('k', context), ('v', context)))
    h = attend(q, k, v).reshape(x.shape)
    return nn.Dense(c, name='proj_out')(h)


class FeedForward(nn.Module):
  """The feed-forward layer GEGLU: 4 C values, each times its own gate."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = x.shape[-1]
    # 4 c channels and a gate for each. The exact GELU is PyTorch's default,
    # Flax's an approximation that is up to 5e-4 away.
    value, gate = jnp.split(nn.Dense(8 * c, name='proj')(x), 2, axis=-1)
    return nn.Dense(c, name='out')(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nn.Module):
  """Attention to x, attention to the context, GEGLU, each with its norm."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None) -> jax.Array:
    # PyTorch's epsilon (Flax's is 1e-6), and variances in two passes, which do
    # not cancel (see `blocks.group_norm`).
    norm = lambda name: nn.LayerNorm(
        epsilon=1e-5, use_fast_variance=False, name=name)
    attention = lambda name: Attention(self.heads, qkv_bias=False, name=name)
    x = x + attention('attn1')(norm('norm1')(x))
    x = x + attention('attn2')(norm('norm2')(x), context)
    return x + FeedForward(name='ff')(norm('norm3')(x))


class SpatialTransformer(nn.Module):
  """Transformer blocks over the pixels of an image (Rombach et al. 2022).

  Attributes:
    heads: of every attention.
    depth: number of blocks.
    groups: of the group normalization, whose epsilon is 1e-6 even where the
      rest of the UNet has 1e-5.
  """

  is_block = True  # see `denoiser.Denoiser`

  heads: int
  depth: int = 1
  groups: int = 32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None) -> jax.Array:
    c = x.shape[-1]
    # [B, H, W, C] -> [B, H W, C], pixels as tokens. The projections, 1x1
    # convolutions in Stable Diffusion 1, are the same products as dense layers.
    h = nn.GroupNorm(self.groups, epsilon=1e-6, use_fast_variance=False,
                     name='norm')(x)
    h = nn.Dense(c, name='proj_in')(h.reshape(x.shape[0], -1, c))
    for i in range(self.depth):
      h = TransformerBlock(self.heads, name=f'transformer.{i}')(h, context)
    return x + nn.Dense(c, name='proj_out')(h).reshape(x.shape)
