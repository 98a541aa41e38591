"""Packed models as one safetensors file.

The tensors:

    LAYER.codes     uint8 `[h, *window, ceil(I / 2), O]`, two codes a byte (see
                    `kernels.carriers.pack_halves`); of formats of more than 4
                    bits `[h, *window, I, O]`
    channels        float32: of every layer in the header's order its scale
                    `[O]`, zero point of the weights and bias, where it has them
    PARAMETER       whatever stays as it is, under its path joined with '/'
    choices         uint8 `[L, S]`: the bank of every layer with h > 1, in the
                    header's order, at every step

The header's metadata holds, in JSON, `model` (what to build), `plan` (the
sampler), `others` (inputs of layers that are not packed) and `layers`, a row of
each: name, format, I, which channels it has (s, z, b), and if its input is
quantized its format, scale and, where there is one, zero point. `format` is the
version. Nothing is pickled, and PyTorch is not needed to read it. Small models
are the reason for the brevity: their header counts.
"""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax import packed as packed_lib
from msfp_jax import quantizers
from msfp_jax.convert import abstract_params
from msfp_jax.convert import native
from msfp_jax.convert import source as source_lib
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.diffusion import sampling
from msfp_jax.formats import FPFormat
from msfp_jax.kernels import layer as layer_lib
from msfp_jax.models.guided import Guided
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

_FAMILY = 'msfp-jax/packed/'
FORMAT = _FAMILY + '1'
_MULTISTEP = ('x_part', 'eps_part', 'weights')
_PLAN = ('timesteps', 'x_coef', 'eps_factor', 'noise_std')
_CHOICES, _CHANNELS = 'choices', 'channels'
# What a layer may have for every output channel, by its letter.
_PER_CHANNEL = {'s': 'scale', 'z': 'zero_point', 'b': 'bias'}


def save(path: str | os.PathLike, model: packed_lib.PackedModel,
         **about: str) -> None:
  """Writes a packed model, whole or not at all; equal models, equal files.

  Args:
    path: of the file.
    model: what `packed.pack` or `load` returned.
    **about: goes into the header, such as the command that made the model.

  Raises:
    ValueError: layers laid out for a kernel, or names that cannot be told
      apart in the file.
  """
  tensors: dict[str, np.ndarray] = {}
  rows, channels = [], [np.zeros(0, np.float32)]
  for name, layer in model.layers.items():
    if layer.packing not in (layer_lib.NIBBLES, layer_lib.BYTES):
      raise ValueError(
          f'layer {name} is stored as {layer.packing}: save the model before '
          'it is laid out for a device, as `packed.pack` and `load` leave it')
    tensors[f'{name}.codes'] = np.asarray(layer.weights)
    row, found = _layer_to_row(name, layer)
    rows.append(row)
    channels += found
  tensors[_CHANNELS] = np.concatenate(channels)
  for path_, value in traverse_util.flatten_dict(model.params).items():
    tensors['/'.join(path_)] = np.asarray(value)
  if model.choices:
    tensors[_CHOICES] = np.stack([
        np.asarray(model.choices[name], np.uint8) for name in model.layers
        if name in model.choices])
  metadata = {
      'format': FORMAT,
      'model': _dumps(_model_to_dict(model.model)),
      'layers': _dumps(rows),
      'others': _dumps({
          name: [] if act is None else _act_to_row(
              act.fmt, act.scale, act.zero_point)
          for name, act in model.act_quantizers.items()}),
      'plan': _dumps(_plan_to_dict(model.plan)),
  }
  native.write_safetensors(path, tensors, metadata | about)


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
  reader = _Reader(tensors)
  try:
    header = {key: json.loads(metadata[key]) for key in
              ('model', 'layers', 'others', 'plan')}
    built = _model_from_dict(header['model']) if model is None else model
    plan = _plan_from_dict(header['plan'])
    others = {name: _act_from_row(row)
              for name, row in header['others'].items()}
    layers = _read_layers(header['layers'], reader)
  except (AttributeError, IndexError, KeyError, TypeError, ValueError
          ) as error:
    raise ValueError(f'{file}: its header describes no packed model of this '
                     f'version ({error!r})') from error
  choices = _read_choices(layers, plan, reader)
  params = reader.rest()
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
                  plan: diffusion.SamplerPlan, reader: '_Reader'
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


class _Reader:
  """Takes tensors out of a file and keeps account of what does not fit."""

  def __init__(self, tensors: Mapping[str, LazyTensor]):
    self._left = dict(tensors)
    self.problems: list[str] = []

  def take(self, name: str, dtype: Any, shape: tuple[int | None, ...]
           ) -> np.ndarray:
    """A tensor of this type and shape (None: any size); zeros if it is not."""
    zeros = np.zeros([size or 1 for size in shape], dtype)
    tensor = self._left.pop(name, None)
    if tensor is None:
      self.problems.append(f'missing {name} {shape}')
      return zeros
    fits = len(shape) == len(tensor.shape) and all(
        want in (None, size)
        for want, size in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != np.dtype(dtype):
      self.problems.append(f'{name} is {tensor.dtype} {tensor.shape}, expected '
                           f'{np.dtype(dtype)} {shape}')
      return zeros
    return tensor.read()

  def take_codes(self, name: str, rows: int) -> np.ndarray:
    """Codes `[h, *window, rows, O]`, whatever the window."""
    tensor = self._left.get(name)
    axes = 3 if tensor is None else len(tensor.shape)
    return self.take(name, np.uint8, (*(None,) * (axes - 2), rows, None))

  def rest(self) -> Any:
    """What is left, as nested parameters."""
    flat = {}
    for name, tensor in self._left.items():
      value = tensor.read()
      if not np.isfinite(value).all():
        self.problems.append(f'{name} holds values that are not finite')
      flat[tuple(name.split('/'))] = jnp.asarray(value)
    return traverse_util.unflatten_dict(flat)


def _layer_to_row(name: str, layer: kernels.PackedLayer
                  ) -> tuple[list[Any], list[np.ndarray]]:
  """Its row of the header, and what it has for every channel."""
  has = {letter: np.asarray(getattr(layer, field), np.float32)
         for letter, field in _PER_CHANNEL.items()
         if getattr(layer, field) is not None}
  row = [name, str(layer.fmt), layer.in_features, ''.join(has)]
  if layer.act_fmt is not None:
    row += _act_to_row(layer.act_fmt, layer.act_scale, layer.act_zero_point)
  return row, list(has.values())


def _read_layers(rows: list[list[Any]], reader: _Reader
                 ) -> dict[str, kernels.PackedLayer]:
  """The inverse of `_layer_to_row`, for all layers."""
  codes = {name: reader.take_codes(
      f'{name}.codes', -(-length // 2) if FPFormat.parse(fmt).bits <= 4
      else length) for name, fmt, length, *_ in rows}
  sizes = [codes[row[0]].shape[-1] * len(row[3]) for row in rows]
  table = reader.take(_CHANNELS, np.float32, (sum(sizes),))
  if not np.isfinite(table).all():
    reader.problems.append(f'{_CHANNELS} holds values that are not finite')
  layers = {}
  for row, channels in zip(rows, np.split(table, np.cumsum(sizes)[:-1]),
                           strict=True):
    name, fmt, length, letters, *act = row
    has = dict(zip(letters, channels.reshape(len(letters), -1), strict=True))
    if 's' not in has or (has['s'] <= 0).any():
      reader.problems.append(f'{_CHANNELS}: layer {name} has scales that are '
                             'not positive')
    act, fmt = _act_from_row(act), FPFormat.parse(fmt)
    layers[name] = kernels.PackedLayer(
        weights=codes[name], scale=has.get('s'), zero_point=has.get('z'),
        bias=has.get('b'), tap_sums=None, fmt=fmt, in_features=length,
        act_scale=None if act is None else act.scale,
        act_zero_point=None if act is None else act.zero_point,
        act_fmt=None if act is None else act.fmt, banked=True,
        packing=layer_lib.NIBBLES if fmt.bits <= 4 else layer_lib.BYTES)
  return layers


def _act_to_row(fmt: FPFormat, scale: Any, zero_point: Any) -> list[Any]:
  # As text a float32 is shortest, and survives.
  short = lambda value: float(str(np.float32(value)))
  zero = [] if zero_point is None else [short(zero_point)]
  return [str(fmt), short(scale), *zero]


def _act_from_row(row: list[Any]) -> quantizers.Quantizer | None:
  if not row:
    return None
  fmt, *values = row
  scale, *zero = np.float32(values)
  if not (np.isfinite(values).all() and scale > 0 and len(zero) < 2):
    raise ValueError(f'scale and zero point {values} of an input')
  return quantizers.Quantizer(
      FPFormat.parse(fmt), scale, zero[0] if zero else None)


def _model_to_dict(model: nn.Module) -> dict[str, Any]:
  """Empty for models that are no UNet of this package."""
  if isinstance(model, Guided):
    return {'unet': model.inner.config.to_dict(), 'scale': model.scale,
            'null_label': model.null_label}
  return {'unet': model.config.to_dict()} if isinstance(model, UNet) else {}


def _model_from_dict(row: dict[str, Any]) -> nn.Module:
  if not row:
    raise ValueError('the file does not describe its model: pass '
                     'load(path, model=...)')
  unet = UNet(UNetConfig(**row['unet']))
  if 'scale' in row:
    return Guided(unet, row['scale'], row['null_label'])
  return unet


def _plan_to_dict(plan: diffusion.SamplerPlan) -> dict[str, Any]:
  row = {name: np.asarray(getattr(plan, name)).tolist() for name in _PLAN}
  if plan.multistep is not None:
    row['multistep'] = {name: getattr(plan.multistep, name).tolist()
                        for name in _MULTISTEP}
  return row


def _plan_from_dict(row: dict[str, Any]) -> diffusion.SamplerPlan:
  array = lambda row, name: np.asarray(row[name], np.float64)
  multistep = row.get('multistep')
  if multistep is not None:
    multistep = sampling.Multistep(
        *(array(multistep, name) for name in _MULTISTEP))
  timesteps, *others = (array(row, name) for name in _PLAN)
  if not len(timesteps) or any(a.shape != timesteps.shape for a in others):
    raise ValueError('a plan of unequal lengths')
  return diffusion.SamplerPlan(np.int64(timesteps), *others, multistep)


def _dumps(content: Any) -> str:
  return json.dumps(content, separators=(',', ':'))
