"""Packed models as one safetensors file.

The tensors:

    LAYER.codes     uint8 `[h, *window, ceil(I / 2), O]` of formats of 4 bits,
                    two codes a byte (see `layout.pack_halves`); of 8 bits
                    `[h, *window, I, O]`; of others a stream of bits `[n]`
    LAYER.PART      what else a layer has, under the names of
                    `header.parts_of`: scales of groups, shifts (3 bits each,
                    as a stream), factors of smoothing, a branch of low rank
    channels        float32: of every layer in the header's order its scale
                    `[O]`, zero point of the weights and bias, where it has
                    them; then the parameters of one axis that stay as they are
    PARAMETER       others that stay, under their paths joined with '/'
    choices         uint8 `[L, S]`: the bank of every layer with h > 1, in the
                    header's order, at every step
    drift           float32 `[S, C]`: what is subtracted from the predictions

The header's metadata holds, in JSON, `model` (what to build), `plan` (the
sampler), `others` (inputs of layers that are not packed), `vectors` (paths and
sizes of the parameters in `channels`) and `layers` (see `header.layer_to_row`).
`format` is the version: 2; of models that quantize differences between steps 3,
of those with a drift 4, with both 5. Files of version 1 load too. `digest` is
of all the others and of the tensors, and is checked at loading. Nothing is
pickled, and PyTorch is not needed to read it. Small models are the reason for
the brevity: their header counts.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import numpy as np

from msfp_jax import diffusion
from msfp_jax.base import arguments
from msfp_jax.base.pickle_names import first_words
from msfp_jax.convert import native
from msfp_jax.convert import source as source_lib
from msfp_jax.kernels import offload as offload_lib
from msfp_jax.models import registry
from msfp_jax.packed import header as header_lib
from msfp_jax.packed import layers as stored
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import placing
from msfp_jax.packed import reader as reader_lib
from msfp_jax.packed import tables
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.qlayer import QLayer

# A small model, all in one file; metadata first, in safetensors' own header:
#
#   layers    [["conv_in","E3M4",3,"sb",["E3M4",0.021]],
#              ["down.0.conv1","E2M1",32,"sb",["UE2M2",0.25,-0.2785]], ...]
#   channels  [ scale | bias | scale | bias | ... | vectors ]
#               conv_in        down.0.conv1         not quantized
#   codes     conv_in.codes, down.0.conv1.codes, ...
#
# Every tensor of a safetensors file costs about 100 bytes of JSON, and a UNet
# has hundreds of short ones (scales, biases, normalizations): hence `channels`.
_FAMILY = 'msfp-jax/packed/'
FORMAT, _FIRST = _FAMILY + '2', _FAMILY + '1'
# {version: whether it quantizes differences, whether it corrects its drift}: in
# all else alike; but a reader that does not know of them must not sample
# without them.
_VERSIONS = {FORMAT: (False, False), _FAMILY + '3': (True, False),
             _FAMILY + '4': (False, True), _FAMILY + '5': (True, True)}
_LAST = [*_VERSIONS][-1].removeprefix(_FAMILY)
CHANNELS = 'channels'
# Of the header's metadata.
OWN = ('format', 'model', 'layers', 'others', 'vectors', 'plan')


def save(path: str | os.PathLike, model: packed_lib.PackedModel,
         **about: str) -> None:
  """Writes a packed model, whole or not at all; equal models, equal files.

  Args:
    path: of the file.
    model: what `pack` or `load` returned.
    **about: goes into the header, such as the command that made the model.

  Raises:
    ValueError: a model that is not packed, one with LoRAs, layers laid out for
      a kernel, names that cannot be told apart in the file, too many banks,
      or values that are not finite; see `native.check_about`.
  """
  arguments.check_type('model', model, packed_lib.PackedModel,
                       'msfp.pack(...) or msfp.load(...)')
  native.check_about(about, OWN)
  if any(layer.adapter is not None for layer in model.layers.values()):
    raise ValueError('the model has LoRAs, which keep their own files: save '
                     'model.with_loras([]), and give them to what is loaded; '
                     'or merge them before packing, with merge_loras')
  layers = {name: offload_lib.to_numpy(layer)
            for name, layer in model.layers.items()}
  # Those without weights of their own have only an input quantizer, for
  # `others`; their kernels and biases are among the parameters.
  own = {name: layer for name, layer in layers.items()
         if layer.weight is not None}
  tensors: dict[str, np.ndarray] = {}
  channels = [np.zeros(0, np.float32)]
  for name, layer in own.items():
    _check_layout(name, layer)
    tensors |= stored.tensors_of(name, layer)
    channels += stored.channels_of(layer)
  vectors, rest = _flatten(model.params)
  channels += vectors.values()
  tensors[CHANNELS] = np.concatenate(channels)
  tensors |= tables.tensors_of(model, own)
  # All tensors of a file share one space of names.
  if taken := sorted(tensors.keys() & {*rest, *vectors}):
    raise ValueError(f'parameters named {taken}, as the file names its own')
  native.check_finite(vectors | rest | {
      f'{name} (scales or bias)': np.concatenate(
          [np.zeros(0, np.float32), *stored.channels_of(layer)])
      for name, layer in own.items()})
  metadata = metadata_of(model.model, layers, {
      name: len(vector) for name, vector in vectors.items()}, model.plan,
                         model.differences, model.drift is not None)
  tensors |= rest
  native.write_safetensors(path, tensors, metadata | about)


def metadata_of(model: nn.Module, layers: Mapping[str, QLayer],
                vectors: Mapping[str, int], plan: diffusion.SamplerPlan,
                differences: bool, drifts: bool = False) -> dict[str, str]:
  """The header's metadata, but for the digest.

  Args:
    model: the linen model.
    layers: all of them; of arrays in weights only shapes and types count.
    vectors: {path: size} of the parameters in `channels`.
    plan: the sampler.
    differences: of `PackedModel`.
    drifts: whether a drift is corrected.
  """
  own = {name: layer for name, layer in layers.items()
         if layer.weight is not None}
  header = {
      'model': registry.to_dict(model),
      'layers': [header_lib.layer_to_row(name, layer)
                 for name, layer in own.items()],
      'others': {name: header_lib.input_to_row(layer.input)
                 for name, layer in layers.items() if name not in own},
      'vectors': dict(vectors),
      'plan': plan.to_dict(),
  }
  version, = (version for version, has in _VERSIONS.items()
              if has == (differences, drifts))
  return {'format': version} | {
      key: header_lib.dumps(value) for key, value in header.items()}


def _check_layout(name: str, layer: QLayer) -> None:
  """Raises ValueError unless the codes are as files have them."""
  weight = layer.weight
  if not weight.is_packed:
    raise ValueError(f'layer {name} is not packed: save what pack returned')
  if weight.layout not in (layout_lib.NIBBLES, layout_lib.BYTES):
    raise ValueError(
        f'layer {name} is stored as {weight.layout.name}: save the model '
        'before it is laid out for a device, as msfp.pack and msfp.load '
        'leave it')


def load(path: str | os.PathLike, model: nn.Module | None = None,
         implementation: str | None = None, offload: bool = False
         ) -> packed_lib.PackedModel:
  """Reads a packed model onto the device; weights stay packed.

  Tensor by tensor: no more is held than the model and a layer of it.

  Args:
    path: a file that `save` wrote.
    model: the linen model, for those that are no model of this package, which
      the file describes itself.
    implementation: of `kernels.door`; None picks for every layer.
    offload: whether the weights wait in the host's memory, and come to the
      device layer by layer whenever these run: for models that are larger than
      the memory of the device. The samples are the same.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another format or version, a damaged or incomplete file, or
      tensors that are missing, unexpected or misshapen: all are listed; no
      such implementation; a device that does not read the host's memory.
  """
  arguments.check_type('path', path, (str, os.PathLike), 'pathlib.Path(...)')
  settle = placing.settler(implementation, offload)
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f'no packed model at {file}')
  # Problems are gathered rather than raised, for one message to list them all.
  tensors, metadata = source_lib.read_safetensors(file)
  first = _check_format(file, metadata.get('format'))
  native.check_seal(file, tensors, metadata, 'restore it, or pack the model '
                    'again')
  reader = reader_lib.Reader(tensors)
  if model is None and metadata.get('model') == header_lib.dumps({}):
    raise ValueError(f'{file} does not describe its model, which is none of '
                     'this package: pass load(path, model=...)')
  with _blaming_header(file):
    header = {key: json.loads(metadata[key]) for key in
              ('model', 'layers', 'others', 'vectors', 'plan')}
    built = model
    if model is None:
      built = registry.from_dict(header['model'])
    plan = diffusion.SamplerPlan.from_dict(header['plan'])
    others = {name: QLayer(None, header_lib.input_from_row(row))
              for name, row in header['others'].items()}
    rows = header['layers']
    if first:
      rows = [header_lib.row_from_first(row) for row in rows]
    for row in rows:
      stored.check_size(row, reader)
    pieces, vectors, is_read = _read_channels(
        rows, header['vectors'], reader, first)
  layers, found = {}, {}
  for row, piece in zip(rows, pieces, strict=True):
    with _blaming_header(file):
      layer = stored.read_layer(
          row, stored.read_codes(row, reader, first), piece, reader, is_read)
      found[row[0]] = reader_lib.Found.of(layer)
    # Of a file that will be refused nothing need be moved.
    layers[row[0]] = layer if reader.problems else settle(layer)
  choices = tables.read_choices(layers, plan, reader)
  differences, drifts = _VERSIONS.get(metadata['format'], (False, False))
  with _blaming_header(file):
    drift = tables.read_drift(built, plan, reader) if drifts else None
  # After the layers took theirs: what is left is a parameter, or unexpected.
  params = reader.rest(vectors)
  problems = list(reader.problems)
  # Of a model that the caller gave nothing is known to compare with; Flax will
  # say what it misses.
  if header['model'] and model is None:
    with _blaming_header(file):
      problems += reader_lib.misfits(built, found, others, params)
  if problems:
    raise ValueError(f'{file} does not fit the model:\n  '
                     + '\n  '.join(sorted(problems)))
  return packed_lib.PackedModel(
      built, jax.device_put(params), layers | others, choices, plan,
      implementation, differences, drift)


@contextlib.contextmanager
def _blaming_header(file: pathlib.Path) -> Iterator[None]:
  """Says of errors that come of a header that it is the file's."""
  try:
    yield
  # The header comes from outside, and may fail in any way: sizes that no model
  # has do so once it is traced.
  except Exception as error:
    raise ValueError(f'{file}: its header describes no packed model of this '
                     f'version ({type(error).__name__}: {first_words(error)})'
                     ) from error


def _check_format(file: pathlib.Path, found: str | None) -> bool:
  """Whether it is of version 1; raises ValueError for unknown ones."""
  if found in (_FIRST, *_VERSIONS):
    return found == _FIRST
  if found and found.startswith(_FAMILY):
    raise ValueError(
        f'{file} is of version {found.removeprefix(_FAMILY)} of packed models, '
        f'this msfp-jax reads versions up to {_LAST}: pack the model again, or '
        'use the msfp-jax that wrote it')
  raise ValueError(f'{file} has format {found!r}, expected {FORMAT!r}: it was '
                   'not written by msfp_jax.save')


def _flatten(params: Any) -> tuple[dict[str, np.ndarray],
                                   dict[str, np.ndarray]]:
  """Parameters of one axis in float32, and the others, by path."""
  vectors, rest = {}, {}
  for path, value in traverse_util.flatten_dict(params).items():
    if odd := [part for part in path if '/' in part]:
      raise ValueError(f"parameters cannot have '/' in their names: {odd}")
    value = np.asarray(value)
    # `channels` is float32; other types keep a tensor of their own.
    group = vectors if (value.ndim, value.dtype) == (1, np.float32) else rest
    group['/'.join(path)] = value
  return vectors, rest


def _read_channels(
    rows: list[list[Any]], vectors: dict[str, int], reader: reader_lib.Reader,
    first: bool
) -> tuple[list[np.ndarray], dict[str, np.ndarray], bool]:
  """The layers' parts `[letters, O]` of `channels`; what else is there; and
  whether it is the file's, for where it is missing it is zeros.
  """
  # The shapes of codes tell how many output channels a layer has, and so where
  # its part of `channels` ends.
  shapes = [(len(row[3]), stored.outputs_of(row, reader, first))
            for row in rows]
  sizes = [*map(math.prod, shapes), *vectors.values()]
  known = len(reader.problems)
  table = reader.take(CHANNELS, np.float32, (sum(sizes),))
  # Zeros are nobody's scales: to list each as flawed would bury the one problem
  # that there is.
  is_read = len(reader.problems) == known
  if is_read and not np.isfinite(table).all():
    reader.problems.append(f'{CHANNELS} holds values that are not finite')
  pieces = np.split(table, np.cumsum(sizes, dtype=int))[:-1]
  # No -1 in a shape: a layer without bias whose scales are of groups has none.
  return ([piece.reshape(shape) for piece, shape
           in zip(pieces, shapes, strict=False)],
          dict(zip(vectors, pieces[len(rows):], strict=True)), is_read)
