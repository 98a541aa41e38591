"""Packed models as one safetensors file.

The tensors:

    LAYER.codes     uint8 `[h, *window, ceil(I / 2), O]`, two codes a byte (see
                    `kernels.carriers.pack_halves`); of formats of more than 4
                    bits `[h, *window, I, O]`
    channels        float32: of every layer in the header's order its scale
                    `[O]`, zero point of the weights and bias, where it has
                    them; then the parameters of one axis that stay as they are
    PARAMETER       others that stay, under their paths joined with '/'
    choices         uint8 `[L, S]`: the bank of every layer with h > 1, in the
                    header's order, at every step

The header's metadata holds, in JSON, `model` (what to build), `plan` (the
sampler), `others` (inputs of layers that are not packed), `vectors` (paths and
sizes of the parameters in `channels`) and `layers`, a row of each: name,
format, I, which channels it has (s, z, b), and if its input is quantized its
format, scale and, where there is one, zero point. `format` is the version.
Nothing is pickled, and PyTorch is not needed to read it. Small models are the
reason for the brevity: their header counts.
"""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

from flax import traverse_util
import flax.linen as nn
import numpy as np

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.convert import abstract_params
from msfp_jax.convert import native
from msfp_jax.convert import source as source_lib
from msfp_jax.kernels import layer as layer_lib
from msfp_jax.models.guided import Guided
from msfp_jax.models.unet import UNet
from msfp_jax.packed import header as header_lib
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import reader as packed_reader
from msfp_jax.quant.numbers import FPFormat

_FAMILY = 'msfp-jax/packed/'
FORMAT = _FAMILY + '1'
_CHOICES, _CHANNELS = 'choices', 'channels'


def save(path: str | os.PathLike, model: packed_lib.PackedModel,
         **about: str) -> None:
  """Writes a packed model, whole or not at all; equal models, equal files.

  Args:
    path: of the file.
    model: what `packed.pack` or `load` returned.
    **about: goes into the header, such as the command that made the model.

  Raises:
    ValueError: layers laid out for a kernel, names that cannot be told apart
      in the file, or too many banks.
  """
  tensors: dict[str, np.ndarray] = {}
  channels = [np.zeros(0, np.float32)]
  for name, layer in model.layers.items():
    if layer.packing not in (layer_lib.NIBBLES, layer_lib.BYTES):
      raise ValueError(
          f'layer {name} is stored as {layer.packing}: save the model before '
          'it is laid out for a device, as `packed.pack` and `load` leave it')
    tensors[f'{name}.codes'] = np.asarray(layer.weights)
    channels += [np.asarray(getattr(layer, field), np.float32)
                 for field in header_lib.PER_CHANNEL.values()
                 if getattr(layer, field) is not None]
  vectors, rest = _flatten(model.params)
  channels += vectors.values()
  tensors[_CHANNELS] = np.concatenate(channels)
  if model.choices:
    choices = np.stack([model.choices[name] for name in model.layers
                        if name in model.choices])
    if choices.max() > 255:
      raise ValueError(f'{choices.max() + 1} banks: a file holds up to 256')
    tensors[_CHOICES] = np.uint8(choices)
  if taken := sorted(tensors.keys() & {*rest, *vectors}):
    raise ValueError(f'parameters named {taken}, as the file names its own')
  header = {
      'model': header_lib.model_to_dict(model.model),
      'layers': [header_lib.layer_to_row(name, layer)
                 for name, layer in model.layers.items()],
      'others': {name: [] if act is None else header_lib.act_to_row(
          act.fmt, act.scale, act.zero_point)
                 for name, act in model.act_quantizers.items()},
      'vectors': {name: len(vector) for name, vector in vectors.items()},
      'plan': header_lib.plan_to_dict(model.plan),
  }
  metadata = {key: header_lib.dumps(value) for key, value in header.items()}
  tensors |= rest
  native.write_safetensors(path, tensors,
                           {'format': FORMAT} | metadata | about)


def load(path: str | os.PathLike, model: nn.Module | None = None,
         implementation: str | None = None) -> packed_lib.PackedModel:
  """Reads a packed model; weights stay packed.

  Args:
    path: a file that `save` wrote.
    model: the linen model, for those that are no UNet of this package, which
      the file describes itself.
    implementation: of `kernels.ops`; None picks for every layer.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another format or version, a damaged or incomplete file, or
      tensors that are missing, unexpected or misshapen: all are listed.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f'no packed model at {file}')
  tensors, metadata = source_lib.read_safetensors(file)
  _check_format(file, metadata.get('format'))
  reader = packed_reader.Reader(tensors)
  try:
    header = {key: json.loads(metadata[key]) for key in
              ('model', 'layers', 'others', 'vectors', 'plan')}
    built = model
    if model is None:
      built = header_lib.model_from_dict(header['model'])
    plan = header_lib.plan_from_dict(header['plan'])
    others = {name: header_lib.act_from_row(row)
              for name, row in header['others'].items()}
    layers, vectors = _read_layers(
        header['layers'], header['vectors'], reader)
  except (AttributeError, IndexError, KeyError, TypeError, ValueError
          ) as error:
    raise ValueError(f'{file}: its header describes no packed model of this '
                     f'version ({error!r})') from error
  choices = _read_choices(layers, plan, reader)
  params = reader.rest(vectors)
  problems = list(reader.problems)
  if isinstance(built, UNet | Guided):
    problems += _misfits(built, layers, others, params)
  if problems:
    raise ValueError(f'{file} does not fit the model:\n  '
                     + '\n  '.join(sorted(problems)))
  return packed_lib.PackedModel(
      built, params, layers, others, choices, plan
  ).with_implementation(implementation)


def _check_format(file: pathlib.Path, found: str | None) -> None:
  if found == FORMAT:
    return
  if found and found.startswith(_FAMILY):
    raise ValueError(
        f'{file} is of version {found.removeprefix(_FAMILY)} of packed models, '
        f'this msfp-jax reads version {FORMAT.removeprefix(_FAMILY)}: pack the '
        'model again, or use the msfp-jax that wrote it')
  raise ValueError(f'{file} has format {found!r}, expected {FORMAT!r}: it was '
                   'not written by msfp_jax.save')


def _read_choices(layers: Mapping[str, kernels.PackedLayer],
                  plan: diffusion.SamplerPlan, reader: packed_reader.Reader
                  ) -> dict[str, np.ndarray]:
  """{layer: int32 `[S]`} of the layers with several banks."""
  banked = [name for name, layer in layers.items() if len(layer.weights) > 1]
  if not banked:
    return {}
  table = reader.take(_CHOICES, np.uint8, (len(banked), plan.num_steps))
  for name, banks in zip(banked, table, strict=True):
    if banks.max() >= (count := len(layers[name].weights)):
      reader.problems.append(f'{_CHOICES}: bank {banks.max()} of layer {name}, '
                             f'which has {count}')
  return dict(zip(banked, np.int32(table), strict=True))


def _misfits(model: UNet | Guided, layers: Mapping[str, kernels.PackedLayer],
             others: Mapping[str, Any], params: Any) -> list[str]:
  """What of the file the model does not have, and the other way round."""
  unet = model.inner if isinstance(model, Guided) else model
  flat = {path: leaf.shape for path, leaf in
          traverse_util.flatten_dict(abstract_params(unet)).items()}
  found = {path: value.shape
           for path, value in traverse_util.flatten_dict(params).items()}
  kernels_of = {'.'.join(path[:-1]): (path, shape)
                for path, shape in flat.items() if path[-1] == 'kernel'}
  problems = [f'missing layer {name}' for name in kernels_of
              if name not in layers and name not in others]
  problems += [f'layer {name}, which the model lacks'
               for name in {*layers, *others} - set(kernels_of)]
  expected = {path: shape for path, shape in flat.items()
              if '.'.join(path[:-1]) not in layers}
  for path in expected.keys() | found.keys():
    name = '/'.join(path)
    if path not in found:
      problems.append(f'missing {name} {expected[path]}')
    elif path not in expected:
      problems.append(f'unexpected {name} {found[path]}')
    elif found[path] != expected[path]:
      problems.append(
          f'{name} is {found[path]}, the model wants {expected[path]}')
  for name in layers.keys() & kernels_of.keys():
    path, wanted = kernels_of[name]
    layer, bias = layers[name], flat.get((*path[:-1], 'bias'))
    shape = _kernel_shape(layer)
    if shape != wanted:
      problems.append(f'{name} is {shape}, the model wants {wanted}')
    if (layer.bias is None) != (bias is None):
      problems.append(f'{name}: a bias in the model or in the file alone')
  return problems


def _kernel_shape(layer: kernels.PackedLayer) -> tuple[int, ...]:
  *window, _, outputs = layer.weights.shape[1:]
  return (*window, layer.in_features, outputs)


def _flatten(params: Any) -> tuple[dict[str, np.ndarray],
                                   dict[str, np.ndarray]]:
  """Parameters of one axis in float32, and the others, by path."""
  vectors, rest = {}, {}
  for path, value in traverse_util.flatten_dict(params).items():
    if odd := [part for part in path if '/' in part]:
      raise ValueError(f"parameters cannot have '/' in their names: {odd}")
    value = np.asarray(value)
    group = vectors if (value.ndim, value.dtype) == (1, np.float32) else rest
    group['/'.join(path)] = value
  return vectors, rest


def _read_layers(
    rows: list[list[Any]], vectors: dict[str, int],
    reader: packed_reader.Reader
) -> tuple[dict[str, kernels.PackedLayer], dict[str, np.ndarray]]:
  """The layers, and what else is in `channels`."""
  codes = {name: reader.take_codes(
      f'{name}.codes', -(-length // 2) if FPFormat.parse(fmt).bits <= 4
      else length) for name, fmt, length, *_ in rows}
  sizes = [codes[row[0]].shape[-1] * len(row[3]) for row in rows]
  sizes += vectors.values()
  known = len(reader.problems)
  table = reader.take(_CHANNELS, np.float32, (sum(sizes),))
  is_read = len(reader.problems) == known
  if is_read and not np.isfinite(table).all():
    reader.problems.append(f'{_CHANNELS} holds values that are not finite')
  pieces = np.split(table, np.cumsum(sizes, dtype=int))[:-1]
  layers = {}
  for row, channels in zip(rows, pieces[:len(rows)], strict=True):
    name, fmt, length, letters, *act = row
    has = dict(zip(letters, channels.reshape(len(letters), -1), strict=True))
    if 's' not in has or is_read and (has['s'] <= 0).any():
      reader.problems.append(f'{_CHANNELS}: layer {name} has scales that are '
                             'not positive')
    act, fmt = header_lib.act_from_row(act), FPFormat.parse(fmt)
    layers[name] = kernels.PackedLayer(
        weights=codes[name], scale=has.get('s'), zero_point=has.get('z'),
        bias=has.get('b'), tap_sums=None, fmt=fmt, in_features=length,
        act_scale=None if act is None else act.scale,
        act_zero_point=None if act is None else act.zero_point,
        act_fmt=None if act is None else act.fmt, banked=True,
        packing=layer_lib.NIBBLES if fmt.bits <= 4 else layer_lib.BYTES)
  return layers, dict(zip(vectors, pieces[len(rows):], strict=True))
