"""Decoding large images in little memory: exactly, some rows at a time.

A convolution sees one row above and below, so that rows of its result need
hardly more rows of what is before it. A group normalization needs the mean and
the variance of all rows first. So every pair of the two goes over the image
twice, in strips: once for these, once for the values. Whole are two feature
maps at a time, and one strip is what lies between them, where the undivided
decoder has all of that whole, for all images of a batch.

The result is that of `Autoencoder.decode` up to rounding: nothing is cut into
tiles that would have to be blended, and there are no seams.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import autoencoder
from msfp_jax.models import blocks


@dataclasses.dataclass(frozen=True)
class _Source:
  """A feature map, of which rows are made when they are asked for.

  Attributes:
    height: H of the map.
    rows: (first, count) -> rows `[count, W, C]`; where they lie outside of the
      map, whatever is there.
  """

  height: int
  rows: Callable[[jax.Array, int], jax.Array]


def decode(model: autoencoder.Autoencoder, params: Any, z: jax.Array,
           rows: int) -> jax.Array:
  """Decodes like `Autoencoder.decode`, images one after another, in strips.

  Of FLUX's first stage and images of 1024 x 1024, XLA's program for CPUs takes
  1.7 GB at 32 rows, and undivided 5.9 GB for one image and 32.5 GB for four;
  from `python -m benchmarks.decoding`.

  Args:
    model: the first stage.
    params: its parameters.
    z: latents `[B, h, w, embed_dim]`, as a denoiser sees them.
    rows: of a strip of the image, at most; a strip is a whole share of h, and
      at least one latent high.

  Returns:
    Images `[B, H, W, out_channels]`, nominally in [-1, 1].
  """
  latents = model.apply({'params': params}, z, method='to_decoder')
  strips = num_strips(z.shape[1], model.config.stride, rows)
  return jax.lax.map(
      lambda h: _image(model.config, params['decoder'], h, strips), latents)


def num_strips(height: int, stride: int, rows: int) -> int:
  """The fewest equal strips of latents that make `rows` rows each, or fewer."""
  return next(n for n in range(1, height + 1)
              if height % n == 0 and (height // n * stride <= rows
                                      or n == height))


def _image(config: autoencoder.AutoencoderConfig, params: Mapping[str, Any],
           h: jax.Array, strips: int) -> jax.Array:
  """The decoder of one image, `[h, w, z_channels]` -> `[H, W, C]`."""
  run = lambda module, name, x: module.apply({'params': params[name]}, x[None]
                                             )[0]
  norm = blocks.group_norm(config.norm_groups, config.norm_eps)
  attend = lambda name, x: run(blocks.AttnBlock(1, norm), name, x)
  width = config.ch * config.ch_mult[-1]
  h = run(_conv(width), 'conv_in', h)
  # The middle sees all latents at once, and is small: it stays whole.
  h = run(blocks.ResnetBlock(width, norm), 'mid.block_1', h)
  h = attend('mid.attn_1', h)
  h = run(blocks.ResnetBlock(width, norm), 'mid.block_2', h)
  source = None
  for i in reversed(range(len(config.ch_mult))):
    for j in range(config.num_res_blocks + 1):
      h = _block(config, params[f'up.{i}.block.{j}'], h, source, strips)
      source = None
      if i in config.attn_levels:
        h = attend(f'up.{i}.attn.{j}', h)
    if i > 0:
      # Of the largest map, the upsampled one, only rows are ever made.
      source = _upsampled(h, params[f'up.{i}.upsample.conv'])
  out = _normalized(config, params['norm_out'], _whole(h), strips)
  return _joined(_by_strips(
      lambda i: _convolved(params['conv_out'], out, i, h.shape[0] // strips),
      strips, h))


def _block(config, params, before, source, strips):
  """`blocks.ResnetBlock` of a source, or of the map before if that is None."""
  is_map = source is None
  source = _whole(before) if is_map else source
  each = source.height // strips
  first = _normalized(config, params['norm1'], source, strips)
  shortcut = params.get('nin_shortcut')

  def begin(i):
    h = _convolved(params['conv1'], first, i, each)
    if shortcut is None and is_map:
      return h, None  # the map itself
    x = source.rows(i * each, each)
    if shortcut is not None:
      x = x @ shortcut['kernel'][0, 0] + shortcut['bias']
    return h, x

  h, x = _by_strips(begin, strips, before)
  x = before.reshape(h.shape) if x is None else x
  second = _normalized(config, params['norm2'], _whole(_joined(h)), strips)
  # Onto the shortcut, in its place: a third map is not needed.
  return _joined(jax.lax.fori_loop(
      0, strips, lambda i, x: x.at[i].add(
          _convolved(params['conv2'], second, i, each)), x))


def _by_strips(run, strips, before):
  """What run(i) returns of all strips `[n, ...]`; made after the map before."""
  # Not lax.map: its results begin as zeros, for which XLA waits for nothing, so
  # that those of all layers would be in memory from the beginning on.
  begin = jax.tree.map(
      lambda one: jnp.broadcast_to(before[0, 0, 0], (strips, *one.shape)),
      jax.eval_shape(run, 0))
  return jax.lax.fori_loop(0, strips, lambda i, found: jax.tree.map(
      lambda whole, one: whole.at[i].set(one), found, run(i)), begin)


def _joined(strips):
  """`[n, rows, W, C]` -> `[H, W, C]`."""
  return strips.reshape(-1, *strips.shape[2:])


def _conv(channels):
  return blocks.conv3x3(channels, None)


def _whole(x: jax.Array) -> _Source:
  """Rows of a map that is there."""
  return _Source(len(x), lambda first, count: x[jnp.clip(
      first + jnp.arange(count), 0, len(x) - 1)])


def _upsampled(x: jax.Array, params: Mapping[str, jax.Array]) -> _Source:
  """Rows of the convolution of a map of twice the sides."""
  height = 2 * len(x)

  def rows(first, count):
    place = first - 1 + jnp.arange(count + 2)
    found = jnp.repeat(x[jnp.clip(place // 2, 0, len(x) - 1)], 2, axis=1)
    return _cut(params, _inside(found, place, height))

  return _Source(height, rows)


def _normalized(config, params, source, strips) -> _Source:
  """Rows of the source behind its group normalization and SiLU, 0 outside."""
  mean, variance = _statistics(source, config.norm_groups, strips)
  scale = jax.lax.rsqrt(variance + config.norm_eps) * params['scale']

  def rows(first, count):
    x = (source.rows(first, count) - mean) * scale + params['bias']
    return _inside(nn.silu(x), first + jnp.arange(count), source.height)

  return _Source(source.height, rows)


def _statistics(source, groups, strips):
  """Mean and variance of the groups of channels, `[C]` each."""
  each = source.height // strips

  def of_strip(i):
    x = source.rows(i * each, each)
    x = x.reshape(*x.shape[:2], groups, -1)
    return x.mean((0, 1, 3)), x.var((0, 1, 3)), jnp.zeros(x.shape[-1])

  means, variances, group = jax.lax.map(of_strip, jnp.arange(strips))
  # Strips are equally large: the variance is that within them and that between
  # them, neither of which cancels as the mean of squares would.
  found = means.mean(0), variances.mean(0) + means.var(0)
  return tuple(jnp.repeat(value, group.shape[-1]) for value in found)


def _convolved(params, source, i, each):
  """Strip i of the 3x3 convolution of a source that is 0 outside."""
  return _cut(params, source.rows(i * each - 1, each + 2))


def _cut(params, x):
  """The 3x3 convolution of rows, without the first and the last of them."""
  # These two see zeros where there are other rows.
  module = _conv(params['kernel'].shape[-1])
  return module.apply({'params': params}, x[None])[0, 1:-1]


def _inside(x, place, height):
  """Rows `[n, W, C]` with zeros for those that lie outside of the map."""
  return jnp.where(((place >= 0) & (place < height))[:, None, None], x, 0)
