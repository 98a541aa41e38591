"""A checkpoint becomes a packed model layer by layer, and may be resumed.

What `load_pretrained`, `calibrate`, `pack` and `save` make of a model that fits
into memory, byte for byte, of one that does not: no more is held than a layer.
"""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.base import files
from msfp_jax.base import lock
from msfp_jax.base import progress as progress_lib
from msfp_jax.base import version
from msfp_jax.convert import lora as lora_lib
from msfp_jax.convert import native
from msfp_jax.convert import piecewise
from msfp_jax.convert import source as source_lib
from msfp_jax.models import prediction
from msfp_jax.packed import file as file_lib
from msfp_jax.packed import header as header_lib
from msfp_jax.packed import layers as stored
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import streamed_fits
from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant import quantize as quantize_lib
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.spec import LayerSpec
from msfp_jax.quant.spec import QuantSpec

# Beside the file, while it is made.
SUFFIX = '.partial'
# The piece of parameters of one axis.
_VECTORS = 'vectors'


def pack_streamed(source: str | os.PathLike, target: str | os.PathLike, *,
                  recipe: str | None = None, bits: int | None = None,
                  act_bits: int | None = None,
                  exceptions: str | Mapping[str, int] | None = None,
                  roles: Mapping[str, str] | None = None,
                  spec: QuantSpec | None = None,
                  plan: diffusion.SamplerPlan | None = None,
                  num_steps: int | None = None,
                  config: str | None = None, ema: bool | None = None,
                  loras: Iterable[tuple[str | os.PathLike, float]] = (),
                  about: Mapping[str, str] | None = None) -> pathlib.Path:
  """Packs a checkpoint of any size, a layer in memory at a time.

  The model does not run, so that the recipe must see nothing of its inputs
  ('nvfp4', 'quartz'; any with act_bits=32 that needs nothing for weights), or
  `spec` says how every layer is quantized. A process that is killed goes on
  where it stopped when the same is asked again. Until all is there, nothing
  has the file's name; what is needed meanwhile is in TARGET.partial.

  Args:
    source: as of `load_pretrained`.
    target: the packed model's file, .safetensors; `load` reads it.
    recipe: as of `calibrate`, likewise all to roles; None for 'nvfp4'.
    bits: of weights; None for 4.
    act_bits: of inputs.
    exceptions: roles with other bits.
    roles: of layers, for models of no known family.
    spec: of `calibrate` or `QuantSpec.load`, in place of all from recipe to
      roles.
    plan: the sampler; None for the checkpoint's own, see `load_plan`.
    num_steps: of that one; None for 20.
    config: as of `load_pretrained`.
    ema: likewise.
    loras: (file, as of `load_lora`, strength) of those that are merged into
      the weights before they are quantized.
    about: goes into the header, as of `save`.

  Returns:
    The file's path.

  Raises:
    FileNotFoundError: no checkpoint, or shards that are absent: all are named.
    OSError: the disk has no room for the result.
    ValueError: a target that is a folder, `about` that is no texts or takes
      the header's own names, num_steps beside a plan, a plan beyond the
      model's schedule; a checkpoint that does not fit its model, a LoRA of
      another model, a recipe that has to see inputs, a spec of another model or
      beside a recipe, what another call has begun, or weights that are not
      finite.
  """
  target = pathlib.Path(target).expanduser()
  if target.suffix != '.safetensors':
    raise ValueError(f'{target}: the file of a packed model must end in '
                     '.safetensors')
  files.check_target(target)
  native.check_about(about or {}, file_lib.OWN)
  asked = {'recipe': recipe, 'bits': bits, 'act_bits': act_bits,
           'exceptions': exceptions, 'roles': roles}
  if spec is not None and (beside := [
      name for name, value in asked.items() if value is not None]):
    raise ValueError(f'{", ".join(beside)} beside a spec, which says how every '
                     'layer is quantized: pass one or the other')
  if plan is not None and num_steps is not None:
    raise ValueError(f'num_steps={num_steps} beside a plan, which has its own: '
                     'pass one or the other')
  opened = convert.open_pretrained(os.fspath(source), config, ema)
  if plan is None:
    plan = convert.load_plan(os.fspath(source), config,
                             20 if num_steps is None else num_steps, ema=ema)
  diffusion.check_plan(plan)
  prediction.check_plan(opened.model, plan)
  read = [(convert.load_lora(file, opened.model), strength)
          for file, strength in loras]
  job = streamed_fits.Job(
      opened.model, plan, lora_lib.merge_places(opened.places(), read),
      dict(about or {}))
  how = streamed_fits.Fits(
      'nvfp4' if recipe is None else recipe, 4 if bits is None else bits,
      act_bits, exceptions, roles)
  # The files alone do not say which of two sets of weights in them is read, nor
  # another version that it quantizes as this one.
  identity = {'files': _identity_of(opened.path), 'ema': ema,
              'version': version.VERSION}
  if read:
    identity['loras'] = [[_identity_of(pathlib.Path(lora.source)),
                          float(strength)]
                         for lora, strength in read]
  if spec is None:
    how.check()
    order = calibrate_lib.check_model(opened.model, opened.abstract)
    identity['recipe'] = dataclasses.astuple(how)
  else:
    quantize_lib.check_layers(
        QuantSpec(spec.recipe, {
            name: dataclasses.replace(layer, rounded=None)
            for name, layer in spec.layers.items()}), job.kernels)
    identity['spec'] = _digest_of(spec)
  folder = target.with_name(target.name + SUFFIX)
  try:
    with lock.hold(folder):
      if spec is None:
        spec = how.fit(job, order, folder, identity)
      _write(job, spec, target, folder, identity)
  except lock.InUseError as error:
    raise ValueError(f'{folder} is in use: {error}') from error
  # A folder of an earlier process stays when the lock is given back.
  with contextlib.suppress(OSError):
    folder.rmdir()
  logging.info('wrote %s', target)
  return target


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a packed model's file holds, by shapes and types alone.

  Attributes:
    layers: as packed, those with weights of their own; arrays hold zeros.
    vectors: {path: what has the shape} of parameters of one axis that stay.
    rest: {path: likewise} of others that stay.
    starts: {layer: the first of its numbers in `channels`}.
    end: of all of theirs, where the vectors begin.
    shapes: {tensor of the file: what has its shape and type}.
    metadata: of the header, but for digest and `about`.
  """

  layers: Mapping[str, QLayer]
  vectors: Mapping[str, Any]
  rest: Mapping[str, Any]
  starts: Mapping[str, int]
  end: int
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  metadata: Mapping[str, str]


def contents_of(job: streamed_fits.Job, spec: QuantSpec) -> Contents:
  """What the file of a job will hold; nothing is computed.

  Args:
    job: of whose places the shapes count.
    spec: how every layer is quantized.

  Raises:
    ValueError: the file could not tell names apart, or a spec of other steps
      than the plan's.
  """
  layers = {name: _shape_of(job, name, layer)
            for name, layer in spec.layers.items()}
  packed_lib.PackedModel(job.model, {}, layers, {}, job.plan)
  own = {name: layer for name, layer in layers.items()
         if layer.weight is not None}
  vectors, rest = _others(job, own)
  shapes, starts, end = {}, {}, 0
  for name, layer in own.items():
    shapes |= stored.shapes_of(name, layer)
    starts[name] = end
    end += sum(part.size for part in stored.channels_of(layer))
  sizes = {name: place.shape[0] for name, place in vectors.items()}
  channels = end + sum(sizes.values())
  shapes[file_lib.CHANNELS] = jax.ShapeDtypeStruct((channels,), jnp.float32)
  if taken := sorted(shapes.keys() & {*rest, *vectors}):
    raise ValueError(f'parameters named {taken}, as the file names its own')
  shapes |= {name: jax.ShapeDtypeStruct(place.shape, jnp.float32)
             for name, place in rest.items()}
  return Contents(own, vectors, rest, starts, end, shapes, file_lib.metadata_of(
      job.model, layers, sizes, job.plan, spec.differences))


def _write(job: streamed_fits.Job, spec: QuantSpec, target: pathlib.Path,
           folder: pathlib.Path, identity: Any) -> None:
  """Quantizes and writes what is not in the file yet."""
  # What it refuses, before work is done.
  held = contents_of(job, spec)
  with piecewise.PiecewiseFile(
      target, folder, {**held.metadata, **job.about}, held.shapes, identity
  ) as out:
    _write_pieces(job, spec, out, held)
    out.finish()
  (folder / streamed_fits.FITS).unlink(missing_ok=True)


def _write_pieces(job, spec, out, held):
  """Writes layers, then the parameters that stay, with progress."""
  def of_layer(name):
    alone = packed_lib.simulate(
        job.model, job.params_of(name),
        QuantSpec(spec.recipe, {name: spec.layers[name]}), job.plan)
    layer = packed_lib.as_codes(name, alone.layers[name])
    parts = stored.channels_of(layer)
    within = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return stored.tensors_of(name, layer), {
        (file_lib.CHANNELS, held.starts[name]): within}

  pieces = {f'layer {name}': (
      lambda name=name: of_layer(name), math.prod(job.kernels[name].shape))
            for name in held.layers}
  for name, place in held.rest.items():
    pieces[f'parameter {name}'] = (
        lambda name=name, place=place: ({name: place.read()}, {}),
        math.prod(place.shape))
  if held.vectors:
    pieces[_VECTORS] = lambda: ({}, {
        (file_lib.CHANNELS, held.end): np.concatenate(
            [place.read() for place in held.vectors.values()])}), sum(
                place.shape[0] for place in held.vectors.values())
  count = lambda names: sum(pieces[name][1] for name in names) // 10**6
  progress = progress_lib.Progress(
      f'pack {spec.recipe}, million parameters', count(pieces), count(out.done),
      unit='million')
  for name, (make, _) in pieces.items():
    if name in out.done:
      continue
    before = count(out.done)
    out.write(name, *make())
    if (now := count(out.done)) > before:
      progress.update(now)


def _others(job, own):
  """Places of parameters that stay: of one axis, and others, by path."""
  vectors, rest = {}, {}
  for path, place in job.places.items():
    if '.'.join(path[:-1]) in own:
      continue
    if odd := [part for part in path if '/' in part]:
      raise ValueError(f"parameters cannot have '/' in their names: {odd}")
    group = vectors if len(place.shape) == 1 else rest
    group['/'.join(path)] = place
  return vectors, rest


def _shape_of(job: streamed_fits.Job, name: str, layer: LayerSpec) -> QLayer:
  """A layer as packed: shapes and types of its arrays; these hold zeros."""
  if layer.rounded is not None:
    weight = layer.rounded.weight
  elif layer.weight.is_full:
    weight = None
  else:
    kernel = jax.ShapeDtypeStruct((1, *job.kernels[name].shape), jnp.float32)
    abstract = jax.eval_shape(layer.weight.quantize_banks, kernel)
    # Views of one zero: of the layer's size, and no room.
    zeros = lambda part: np.broadcast_to(
        np.zeros((), part.dtype), part.shape)
    layout = header_lib.stored_layout(abstract.fmt)
    *window, rows, outputs = abstract.data.shape
    if layout == layout_lib.NIBBLES:
      rows = -(-rows // 2)
    weight = jax.tree.map(zeros, abstract.replace(
        data=jax.ShapeDtypeStruct((*window, rows, outputs), np.uint8),
        layout=layout))
  bias = job.biases.get(name)
  if bias is not None:
    bias = np.broadcast_to(np.zeros((), np.float32), bias.shape)
  return quantize_lib.make_layer(weight, layer, bias)


def _identity_of(path: pathlib.Path) -> dict[str, list[int]]:
  """By what a checkpoint is known again: {file: [size, time of its change]}."""
  found = {file.name: file.stat() for file in source_lib.files_of(path)}
  return {name: [stat.st_size, stat.st_mtime_ns]
          for name, stat in found.items()}


def _digest_of(spec: QuantSpec) -> str:
  # A layer at a time: a spec may hold all weights, rounded.
  made = hashlib.sha256(spec.recipe.encode())
  if spec.differences:
    made.update(b'differences')
  for name, layer in spec.layers.items():
    made.update(QuantSpec(spec.recipe, {name: layer}).to_json().encode())
  return made.hexdigest()
