"""Opens checkpoints: files or folders of safetensors or torch, and configs."""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import pathlib
from pathlib import PurePath
from typing import Any

from absl import logging
import numpy as np
import safetensors
import yaml

from msfp_jax.convert import contents
from msfp_jax.convert import tensors as tensors_lib
from msfp_jax.convert import torch_file
from msfp_jax.convert import torch_tensors
from msfp_jax.convert.tensors import LazyTensor

# Parts of names by torch.compile and by DataParallel, see `_unwrapped`.
WRAPPERS = ('_orig_mod', 'module')
_TORCH_SUFFIXES = ('.ckpt', '.pth', '.pt', '.bin')
# The file names of diffusers and of its sharded form, best first.
# That is the moving average where a folder has weights that are `non_ema` too.
_WEIGHTS = (
    'diffusion_pytorch_model.safetensors',
    'diffusion_pytorch_model.safetensors.index.json',
    'diffusion_pytorch_model.fp16.safetensors',
    'diffusion_pytorch_model.safetensors.index.fp16.json',
    'diffusion_pytorch_model.bin', 'diffusion_pytorch_model.bin.index.json',
    'diffusion_pytorch_model.fp16.bin',
    # And of transformers, which has text encoders.
    'model.safetensors', 'model.safetensors.index.json',
    'model.fp16.safetensors', 'model.safetensors.index.fp16.json',
    'pytorch_model.bin', 'pytorch_model.bin.index.json',
    'pytorch_model.fp16.bin')
_NON_AVERAGED = (
    'diffusion_pytorch_model.non_ema.safetensors',
    'diffusion_pytorch_model.non_ema.safetensors.index.json',
    'diffusion_pytorch_model.safetensors.index.non_ema.json',
    'diffusion_pytorch_model.non_ema.bin')
# Folder of the moving average, beside that of the weights.
_AVERAGED_SUFFIX = '_ema'
SAFETENSORS_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
    'BF16': tensors_lib.BFLOAT16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened checkpoint.

  Attributes:
    path: of the file or folder, for messages.
    tensors: {dotted name: tensor}, still in the file.
    metadata: of a safetensors file's header.
    config: diffusers' config.json or CompVis' yaml; None where there is none.
    beside: what a file of torch.save holds that is no tensor, for messages.
  """

  path: pathlib.Path
  tensors: Mapping[str, LazyTensor]
  metadata: Mapping[str, str]
  config: Mapping[str, Any] | None
  beside: str = ''


def open_source(path: str | pathlib.Path,
                config: str | pathlib.Path | None = None,
                parts: tuple[str, ...] = (), ema: bool = True) -> Source:
  """Opens a checkpoint without reading its tensors.

  Args:
    path: a .safetensors, a file of torch.save, or a folder as diffusers
      writes it.
    config: a config.json or a CompVis yaml that describes the model; by
      default the config.json (diffusers) or config.yaml beside it.
    parts: names of the sub-folders of a pipeline that are wanted.
    ema: of folders that hold both, whether to open the moving average
      (`unet_ema` beside `unet`) or the weights (files that are `non_ema`).

  Raises:
    FileNotFoundError: no such file or folder, or one without weights.
    ValueError: the file is damaged, or of no known kind.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    path = _weights_in(path, parts, ema)
  elif not path.is_file():
    raise FileNotFoundError(f'no checkpoint at {path}')
  tensors, metadata, beside = _read(path)
  tensors = _unwrapped(tensors, path)
  if config is None:
    config = _config_beside(path, tensors)
  return Source(path, tensors, metadata,
                None if config is None else read_config(config), beside)


def _config_beside(path: pathlib.Path, tensors: Mapping[str, LazyTensor]
                   ) -> pathlib.Path | None:
  """Looks for diffusers' config.json, or CompVis' yaml, beside the weights."""
  # By the tensors' names: a folder may hold files of several code bases.
  blocks = ('down_blocks.', 'encoder.down_blocks.', 'transformer_blocks.')
  names = (['config.json'] if any(n.startswith(blocks) for n in tensors)
           else [f'{path.stem}.yaml', 'config.yaml'])
  return next((path.parent / name for name in names
               if (path.parent / name).is_file()), None)


def candidates(folder: PurePath, parts: tuple[str, ...], ema: bool
               ) -> Iterator[tuple[PurePath, bool]]:
  """Where diffusers keeps weights: (file, whether an average), best first."""
  places = [folder / part for part in parts] + [folder]
  averaged = []
  if ema:
    # Also of a folder that is itself a part.
    averaged = [place.with_name(place.name + _AVERAGED_SUFFIX)
                for place in places if place.name in parts]
  for place in averaged + places:
    for name in _WEIGHTS if ema else _NON_AVERAGED + _WEIGHTS:
      yield place / name, place in averaged


def _weights_in(folder: pathlib.Path, parts: tuple[str, ...], ema: bool
                ) -> pathlib.Path:
  """Looks for the file with the weights in a folder of diffusers."""
  for file, averaged in candidates(folder, parts, ema):
    if file.is_file():
      if averaged:
        logging.info('took the moving average, %s; ema=False takes the '
                     'weights', file.parent)
      return file
  raise FileNotFoundError(
      f'no weights in {folder}: none of its folders {list(parts)} and not '
      f'itself has one of {list(_WEIGHTS)}')


def _unwrapped(tensors: Mapping[str, LazyTensor], path: pathlib.Path
               ) -> dict[str, LazyTensor]:
  """Takes the parts of names off that wrappers of a model add.

  torch.compile adds `_orig_mod.` and DataParallel `module.`, wherever in a
  model the wrapped one stands.
  """
  found, came_from = {}, {}
  for name, tensor in tensors.items():
    plain = '.'.join(part for part in name.split('.') if part not in WRAPPERS)
    if plain in found:
      raise ValueError(f'{path}: {came_from[plain]} and {name} are one tensor '
                       'by name; save the model that is wanted alone')
    found[plain], came_from[plain] = tensor, name
  return found


def _read(path: pathlib.Path
          ) -> tuple[dict[str, LazyTensor], dict[str, str], str]:
  if _is_index(path):
    return _read_shards(path), {}, ''
  if path.suffix == '.safetensors':
    return *read_safetensors(path), ''
  if path.suffix in _TORCH_SUFFIXES or _looks_like_torch(path):
    content = torch_file.load(path)
    if isinstance(content, Mapping) and isinstance(
        content.get('state_dict'), Mapping):
      content = content['state_dict']  # Lightning keeps much beside it
    tensors, told = tensors_lib.flatten(content), contents.told(content)
    if told and not tensors:
      raise ValueError(f'{path}: {told}')
    return tensors_lib.of_file(path, tensors), {}, told
  raise ValueError(f'{path}: expected a .safetensors file, one of torch.save '
                   f'({", ".join(_TORCH_SUFFIXES)}), or a folder')


def _looks_like_torch(path: pathlib.Path) -> bool:
  """Whether a file begins as torch's do: ermongroup's have no suffix."""
  # A zip archive, or a pickle of protocol 2 or later.
  with open(path, 'rb') as file:
    head = file.read(4)
  return head == b'PK\x03\x04' or head[:1] == b'\x80'


def read_safetensors(path: pathlib.Path
                     ) -> tuple[dict[str, LazyTensor], dict[str, str]]:
  """Opens one file: ({name: tensor}, metadata).

  Raises:
    ValueError: it is no safetensors file, or a damaged one.
  """
  try:
    with safetensors.safe_open(path, 'np') as opened:
      found = {}
      for name in opened.keys():
        part = opened.get_slice(name)
        kind = part.get_dtype()
        if kind not in SAFETENSORS_DTYPES:
          found[name] = LazyTensor.odd(
              tuple(part.get_shape()), torch_tensors.of_type(kind))
          continue
        found[name] = LazyTensor(
            tuple(part.get_shape()), np.dtype(SAFETENSORS_DTYPES[kind]),
            _safetensors_reader(path, name),
            read_rows=_safetensors_row_reader(path, name))
      return tensors_lib.of_file(path, found), opened.metadata() or {}
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path} is no safetensors file: {error}') from error


def _safetensors_reader(path, name):
  def read():
    with safetensors.safe_open(path, 'np') as opened:
      return opened.get_tensor(name)
  return read


def _safetensors_row_reader(path, name):
  def read_rows(first, end):
    with safetensors.safe_open(path, 'np') as opened:
      return opened.get_slice(name)[first:end]
  return read_rows


def _is_index(path: pathlib.Path) -> bool:
  return path.name.endswith(('.index.json', '.index.fp16.json'))


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of `Source.path`: itself, and its shards if it is an index."""
  if not _is_index(path):
    return [path]
  return [path, *[path.parent / name for name in shard_names(path)]]


def shard_names(index: pathlib.Path) -> list[str]:
  """The files that an index.json lists, all of them beside it.

  Raises:
    ValueError: it is no index, or lists others.
  """
  files = sorted({str(file) for file in _weight_map(index).values()})
  # A name with folders in it could lead out of the checkpoint's own.
  if odd := [f for f in files if pathlib.Path(f).name != f
             or not f.endswith(('.safetensors', '.bin'))]:
    raise ValueError(f'{index} names {odd}, which are no files of weights '
                     'beside it')
  return files


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  try:
    return dict(json.loads(_text(index))['weight_map'])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{index} is no index of shards: {error!r}') from error


def _read_shards(index: pathlib.Path) -> dict[str, LazyTensor]:
  """Opens the files that an index.json lists, as if they were one."""
  places, files = _weight_map(index), shard_names(index)
  if absent := [f for f in files if not (index.parent / f).is_file()]:
    raise FileNotFoundError(f'{index} names files that are absent: {absent}')
  found = {}
  for file in files:
    found |= _read(index.parent / file)[0]
  if odd := sorted(found.keys() ^ places.keys()):
    raise ValueError(f'{index} and its files disagree about {odd}')
  return found


def _text(path):
  """A text file in UTF-8, with or without the mark that Windows puts first."""
  return path.read_text(encoding='utf-8-sig')


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads a config.json, or a yaml without any of its tags resolved.

  Raises:
    ValueError: it is neither.
  """
  path = pathlib.Path(path)
  try:
    text = _text(path)
    content = (json.loads(text) if path.suffix == '.json'
               else yaml.safe_load(text))
  except (ValueError, yaml.YAMLError) as error:
    raise ValueError(f'{path} is no configuration: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} is no configuration: it holds no fields')
  return content
