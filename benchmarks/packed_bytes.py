"""Bytes of FLUX.1-schnell's packed file, by part and recipe, without weights.

  python -m benchmarks.packed_bytes

Prints two Markdown tables: the file's bytes by part of the transformer for
every recipe, beside those of bfloat16; and what else an image needs, in 16
bits. All follows from shapes: codes, scales, FLAGs, zero points, branches of
low rank, biases and the header as the file has them. Where the file depends on
weights, these are taken as normal numbers, and every layer that may have
smoothing and a branch as one that has them.
"""

from collections.abc import Mapping
import functools
import math
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import formats
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.base import markdown
from msfp_jax.base import progress as progress_lib
from msfp_jax.base import seal
from msfp_jax.convert import native
from msfp_jax.convert import piecewise
from msfp_jax.convert import text_encoder
from msfp_jax.models.autoencoder import Autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig
from msfp_jax.models.clip_text import ClipText
from msfp_jax.models.clip_text import ClipTextConfig
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig
from msfp_jax.models.t5 import T5
from msfp_jax.models.t5 import T5Config
from msfp_jax.packed import layers as stored
from msfp_jax.packed import streamed
from msfp_jax.packed import streamed_fits
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import recipes
from msfp_jax.quant import roles
from msfp_jax.quant import svdquant
from msfp_jax.quant import widths
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import FindAround
from msfp_jax.quant.around import Rotation
from msfp_jax.quant.fit import Fit
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.spec import AAL
from msfp_jax.quant.spec import LayerSpec
from msfp_jax.quant.spec import NAL
from msfp_jax.quant.spec import QuantSpec
from msfp_jax.run import cli

DOUBLE, SINGLE, ADALN, ENDS, HEADER = PARTS = (
    'double blocks', 'single blocks', 'adaLN', 'embedders, last layer',
    'header')
_ADALN = re.compile(r'(.*\.)?norm\w*\.linear(\..*)?')
BITS = 4


def job_of(model: Any, plan: diffusion.SamplerPlan) -> streamed_fits.Job:
  """A job whose parameters have shapes alone."""
  return streamed_fits.Job(model, plan, traverse_util.flatten_dict(
      convert.abstract_params(model)), {})


def spec_of(recipe: str, job: streamed_fits.Job,
            exceptions: Mapping[str, int] | None = None) -> QuantSpec:
  """What calibration finds, as far as bytes depend on it.

  Args:
    recipe: its name.
    job: of the layers.
    exceptions: as of `calibrate`.
  """
  of, layers = recipes.get(recipe), {}
  widths_of = widths.layer_widths(BITS, BITS, exceptions)
  for name, place in job.kernels.items():
    role, bits, act_bits = widths_of(name)
    kind = AAL if roles.follows_activation(name) else NAL
    of_input = of.aal if kind == AAL and not of.differences else of.nal
    *_, inner, outer = place.shape
    layers[name] = LayerSpec(
        role, kind, _weights(of.weight, bits, outer),
        _input(of_input, act_bits, kind),
        _around(of.around, (inner, outer), bits))
  return QuantSpec(recipe, layers, of.differences)


@functools.cache
def _weights(fit: Fit, bits: int, outputs: int) -> Quantizer:
  """Of normal weights; scales of an output for all of them."""
  kernel = np.random.default_rng(0).standard_normal((1024, 1), np.float32)
  found = fit_lib.fit(fit, Seen.of_weights(kernel), bits, -2).quantizer
  return jax.tree.map(lambda leaf: jnp.broadcast_to(
      leaf, (*leaf.shape[:-1], outputs)) if leaf.ndim else leaf, found)


@functools.cache
def _input(fit: Fit, bits: int, kind: str) -> Quantizer:
  """Of normal inputs, or of those behind SiLU."""
  return fit_lib.fit(
      fit, formats.seen_of(64)[kind.lower()], bits, -1).quantizer


def _around(find: FindAround | None, shape: tuple[int, int], bits: int
            ) -> Around | None:
  """The most that there may be around a product."""
  inner, outer = shape
  if find is None:
    return None
  if isinstance(find, Rotation):
    return Around(rotation=min(find.size, inner & -inner))
  if not isinstance(find, svdquant.SVDQuant):
    raise ValueError(f'bytes of {find} are not known')
  if bits > svdquant.MOST_BITS:
    return Around()
  zeros = lambda dtype, *shape: np.broadcast_to(np.zeros((), dtype), shape)
  rank = find.rank_of(shape, bits)
  smooth = zeros(np.float32, inner)
  if not rank:
    return Around(smooth)
  dtype = np.dtype(getattr(ml_dtypes, find.dtype, find.dtype))
  return Around(smooth, zeros(dtype, inner, rank), zeros(dtype, rank, outer))


def part_of(name: str) -> str:
  """The part of FLUX that a layer or another parameter is in."""
  if _ADALN.fullmatch(name):
    return ADALN
  return {'transformer_blocks': DOUBLE, 'single_transformer_blocks': SINGLE
          }.get(name.split('.')[0], ENDS)


def bytes_of(held: streamed.Contents) -> dict[str, int]:
  """{part of PARTS: bytes of a file}, together the whole of it."""
  found = dict.fromkeys(PARTS, 0)
  for name, layer in held.layers.items():
    found[part_of(name)] += sum(
        map(piecewise.nbytes, stored.shapes_of(name, layer).values())) + sum(
            part.nbytes for part in stored.channels_of(layer))
  for name, place in {**held.vectors, **held.rest}.items():
    found[part_of(name.replace('/', '.'))] += 4 * math.prod(place.shape)
  # The digest is of one length, whatever it says.
  head, _ = native.safetensors_head(
      {**held.metadata, seal.KEY: seal.UNKNOWN}, held.shapes)
  return found | {HEADER: len(head)}


def parameters_of(job: streamed_fits.Job) -> dict[str, int]:
  """{part of PARTS: its parameters}."""
  found = dict.fromkeys(PARTS, 0)
  for path, place in job.places.items():
    found[part_of('.'.join(path))] += math.prod(place.shape)
  return found


def companions() -> dict[str, int]:
  """{what else a text and its image take: its parameters}, FLUX.1's."""
  count = lambda tree: sum(
      math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  return {
      "T5-XXL's encoder": count(
          text_encoder.abstract_text_encoder(T5(T5Config()))),
      "CLIP-L's text encoder": count(
          text_encoder.abstract_text_encoder(ClipText(ClipTextConfig()))),
      'autoencoder': count(convert.abstract_autoencoder(Autoencoder(
          AutoencoderConfig(z_channels=16, embed_dim=16, quant_conv=False))))}


def rows_of(job: streamed_fits.Job,
            ways: Mapping[str, tuple[str, Mapping[str, int] | None]]
            ) -> list[list[str]]:
  """Rows: ways of equal bytes, GB by part and of the file, bits a parameter.

  Args:
    job: of the layers.
    ways: {what a row is called: (recipe, exceptions)}.
  """
  numbers = parameters_of(job)
  row = lambda sizes: (
      *[_giga(sizes[part]) for part in PARTS if part != HEADER],
      _giga(sum(sizes.values())),
      f'{8 * sum(sizes.values()) / sum(numbers.values()):.2f}')
  found = {row({part: 2 * number for part, number in numbers.items()}): [
      'bfloat16']}
  progress = progress_lib.Progress('recipes', len(ways), unit='recipes')
  for done, (name, (recipe, exceptions)) in enumerate(ways.items(), 1):
    held = streamed.contents_of(job, spec_of(recipe, job, exceptions))
    found.setdefault(row(bytes_of(held)), []).append(name)
    progress.update(done)
  return [[', '.join(same), *cells] for cells, same in found.items()]


def _giga(number: float) -> str:
  return f'{number / 1e9:.3f}'


def _others(transformers: Mapping[str, float]) -> list[list[str]]:
  """Rows of the second table; {name: bytes} of transformers to add up with."""
  found = companions()
  rows = [[name, f'{number:,}', _giga(2 * number)]
          for name, number in found.items()]
  rest = 2 * sum(found.values())
  return rows + [[f'all, with the transformer in {name}', '',
                  _giga(rest + size)] for name, size in transformers.items()]


def main(argv):
  del argv
  job = job_of(Flux(FluxConfig()), diffusion.flow_plan(4))
  ways = {f'`{name}`': (name, None) for name in recipes.RECIPES}
  few = {role: bits for role, bits in roles.exceptions_of('ends-8').items()
         if role not in ('modulation', 'norm_out')}
  ways |= {f'`{name}`, adaLN at 4 bits': (name, few)
           for name in ('nvfp4', 'msfp')}
  rows = rows_of(job, ways)
  heads = [part for part in PARTS if part != HEADER]
  print(markdown.table(
      ['', *heads, 'file, GB', 'bits a parameter'], rows, aligned=False))
  whole = {row[0]: 1e9 * float(row[-2]) for row in rows}
  print('\n' + markdown.table(['16 bits', 'parameters', 'GB'], _others({
      name: whole[name] for name in ('bfloat16', '`nvfp4`')}), aligned=False))


if __name__ == '__main__':
  cli.run(main)
