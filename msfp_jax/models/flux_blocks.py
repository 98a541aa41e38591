"""The two kinds of blocks of FLUX.1's transformer.

Names of modules are diffusers'. Every product with weights is a plain nn.Dense
of its own, so that each has its own quantizers: q, k and v are three, also
where a checkpoint has them fused, and what a single block makes of attention
and of GELU together are two (`SingleBlock`).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import attention
from msfp_jax.models import rope

_EPSILON = 1e-6  # of every norm
_WIDENING = 4  # the feed-forward layer's


class _Stream(NamedTuple):
  """Names of the layers that image or text have to themselves in a block."""

  modulation: str
  q: str
  k: str
  v: str
  norm_q: str
  norm_k: str
  out: str
  widen: str
  narrow: str


_IMAGE = _Stream(
    'norm1.linear', 'attn.to_q', 'attn.to_k', 'attn.to_v', 'attn.norm_q',
    'attn.norm_k', 'attn.to_out.0', 'ff.net.0.proj', 'ff.net.2')
_TEXT = _Stream(
    'norm1_context.linear', 'attn.add_q_proj', 'attn.add_k_proj',
    'attn.add_v_proj', 'attn.norm_added_q', 'attn.norm_added_k',
    'attn.to_add_out', 'ff_context.net.0.proj', 'ff_context.net.2')


def modulation(vector: jax.Array, parts: int, channels: int, name: str
               ) -> list[jax.Array]:
  """adaLN's layer: shifts, scales and gates from what is known of the sample.

  Args:
    vector: `[B, C]`, of time and text, without a last activation.
    parts: how many there are.
    channels: of what they change.
    name: of the layer.

  Returns:
    Each `[B, 1, channels]`, the same for all tokens.
  """
  found = nn.Dense(parts * channels, name=name)(nn.silu(vector))
  return jnp.split(found[:, None], parts, axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """A layer norm whose affine part comes from `modulation`; x is `[B, N, C]`.
  """
  # Variances in two passes, which do not cancel (see `blocks.group_norm`).
  normed = nn.LayerNorm(_EPSILON, use_bias=False, use_scale=False,
                        use_fast_variance=False)(x)
  return normed * (1 + scale) + shift


def _qkv(x, heads, names):
  """q, k and v `[B, N, heads, D]`, the first two with their norm by head."""
  q, k, v = (
      nn.Dense(x.shape[-1], name=name)(x).reshape(*x.shape[:2], heads, -1)
      for name in (names.q, names.k, names.v))
  norm = lambda name: nn.RMSNorm(_EPSILON, use_fast_variance=False, name=name)
  return norm(names.norm_q)(q), norm(names.norm_k)(k), v


def _attend(q, k, v, table):
  """Attention of all tokens to all, `[B, N, heads * D]`."""
  found = attention.attend(rope.rotate(q, table), rope.rotate(k, table), v)
  return found.reshape(*found.shape[:2], -1)


def gelu(x: jax.Array) -> jax.Array:
  """GELU by tanh, which all of the model has; up to 5e-4 off the exact one."""
  return jax.nn.gelu(x, approximate=True)


class DoubleBlock(nn.Module):
  """Image and text, each with its own weights, attend to both together.

  Attributes:
    heads: of the attention; the channels are a multiple of it.
  """

  is_block = True  # see `denoiser.Denoiser`

  heads: int

  @nn.compact
  def __call__(self, image: jax.Array, text: jax.Array, vector: jax.Array,
               table: rope.Table) -> tuple[jax.Array, jax.Array]:
    """Returns image `[B, N, C]` and text `[B, L, C]`, like what is given.

    Args:
      image: `[B, N, C]`.
      text: `[B, L, C]`.
      vector: see `modulation`.
      table: of L + N tokens.
    """
    channels, length = image.shape[-1], text.shape[1]
    # Text first: the order of the table.
    streams = ((_TEXT, text), (_IMAGE, image))
    given = [modulation(vector, 6, channels, names.modulation)
             for names, _ in streams]
    parts = [_qkv(modulate(x, shift, scale), self.heads, names)
             for (names, x), (shift, scale, *_) in zip(
                 streams, given, strict=True)]
    q, k, v = (jnp.concatenate(both, axis=1)
               for both in zip(*parts, strict=True))
    attended = _attend(q, k, v, table)
    attended = attended[:, :length], attended[:, length:]
    text, image = (
        self._rest(names, x, own, *rest) for (names, x), own, (_, _, *rest)
        in zip(streams, attended, given, strict=True))
    return image, text

  def _rest(self, names, x, attended, gate, shift, scale, ff_gate):
    """What a stream does for itself: attention's output and feed-forward."""
    channels = x.shape[-1]
    x = x + gate * nn.Dense(channels, name=names.out)(attended)
    h = nn.Dense(_WIDENING * channels, name=names.widen)(
        modulate(x, shift, scale))
    return x + ff_gate * nn.Dense(channels, name=names.narrow)(gelu(h))


class SingleBlock(nn.Module):
  """Attention and feed-forward beside each other, over text and image.

  Published files have one matrix for [attention, GELU] together. Here it is
  two, whose products are added: the GELU's half is then an AAL, whose values
  all lie above -0.17, and does not share its quantizer with attention's, which
  have both signs.

  Attributes:
    heads: of the attention; the channels are a multiple of it.
  """

  is_block = True  # see `denoiser.Denoiser`

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, vector: jax.Array, table: rope.Table
               ) -> jax.Array:
    """Returns `[B, L + N, C]` like x.

    Args:
      x: text, then image.
      vector: see `modulation`.
      table: of L + N tokens.
    """
    channels = x.shape[-1]
    shift, scale, gate = modulation(vector, 3, channels, 'norm.linear')
    h = modulate(x, shift, scale)
    attended = _attend(*_qkv(h, self.heads, _IMAGE), table)
    wide = gelu(nn.Dense(_WIDENING * channels, name='proj_mlp')(h))
    out = nn.Dense(channels, name='proj_out.attn')(attended)
    # The bias is there already.
    out += nn.Dense(channels, use_bias=False, name='proj_out.mlp')(wide)
    return x + gate * out
