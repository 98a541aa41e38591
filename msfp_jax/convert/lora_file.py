"""Reads files of LoRAs, and checks them against the model they are for."""

from collections.abc import Mapping
import functools
import math
import os
import pathlib
import re
from typing import Any

from absl import logging
from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import arguments
from msfp_jax.convert import hub
from msfp_jax.convert import load
from msfp_jax.convert import lora_config
from msfp_jax.convert import lora_names
from msfp_jax.convert import native
from msfp_jax.convert import source as source_lib
from msfp_jax.convert import text_encoder
from msfp_jax.convert.fused import Product
from msfp_jax.convert.lora import Lora
from msfp_jax.convert.lora import LowRank
from msfp_jax.models.clip_text import ClipText
from msfp_jax.models.t5 import T5

# What a folder's file is called, by diffusers and by PEFT.
_FILES = ('pytorch_lora_weights.safetensors', 'adapter_model.safetensors')
_MOST_LINES = 60  # of a message


def load_lora(path: str | os.PathLike, model: Any) -> Lora:
  """Reads the part of a LoRA's file that is for one model.

  What the file has for text encoders is left out of a denoiser's, and a warning
  counts it: `load_lora(path, encoder)` reads it.

  Args:
    path: a .safetensors file with the names of diffusers, PEFT or kohya, for
      FLUX also BFL's or XLabs'; a folder that holds one under diffusers' or
      PEFT's name; or one of these in the Hugging Face Hub (see `hub`). Of PEFT
      the adapter_config.json beside it is read too.
    model: which it is for: of `load_pretrained`, with guidance or without, a
      packed one's `model`, or of `load_text_encoder`.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: a file of another kind; or one that does not fit the model, or
      holds what is no plain LoRA (DoRA, LoHa, LoKr, biases, whole weights but
      for those of 0): all of it is named.
    TypeError: a model of no known kind.
  """
  part, model = _part_of(model)
  path = _file(path)
  tensors, metadata = source_lib.read_safetensors(path)
  parts, odd = lora_names.sort(tensors)
  modules = parts.pop(part, {})
  left_out = {other: len(found) for other, found in sorted(parts.items())}
  odd = [name for name in odd if not _adds_nothing(name, tensors)]
  problems = [f'{name} is no half of a LoRA' for name in odd]
  if not modules and not odd:
    raise ValueError(f'{path} holds nothing for {part}'
                     + (f', but modules of {_counts(left_out)}' if left_out
                        else ''))
  try:
    is_peft = (any(name.startswith('base_model.model.') for name in tensors)
               and not any(name.endswith('.alpha') for name in tensors))
    scales = lora_config.read(path, metadata, part, is_peft)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  products, more = _products(modules, scales)
  renamed, misnamed = _renamed(part, model, products)
  shapes = {'.'.join(layer[:-1]): leaf.shape for layer, leaf
            in traverse_util.flatten_dict(_abstract(part, model)).items()
            if layer[-1] == 'kernel'}
  problems += more + misnamed + _misfits(renamed, shapes)
  _refuse(path, problems)
  layers = {name: _read(product, shapes[name], problems)
            for name, product in renamed.items()}
  _refuse(path, problems)
  if left_out and part == lora_names.DENOISER:
    logging.warning(
        '%s: its modules of %s are not for this model, and left out here; '
        'load_lora(path, encoder) reads those of a text encoder', path,
        _counts(left_out))
  logging.info('%s: %d layers of %s', path, len(layers), part)
  return Lora(str(path), layers, left_out)


def _counts(left_out):
  return ', '.join(f'{part} ({count})' for part, count in left_out.items())


def holds_lora(path: str | os.PathLike, model: Any) -> bool:
  """Whether a LoRA's file has anything for a model; as of `load_lora`."""
  part, _ = _part_of(model)
  tensors, _ = source_lib.read_safetensors(_file(path))
  return part in lora_names.sort(tensors)[0]


def _adds_nothing(name, tensors):
  """Whether a tensor is a change of weights or biases that is all 0."""
  # Trainers write such for what they did not train.
  return name.endswith(('.diff', '.diff_b')) and not (
      tensors[name].refused or np.any(np.float32(tensors[name].read())))


def _part_of(model):
  """Which part of a pipeline a model is, and the model without wrappers."""
  # Guidance and what turns v into noise have the names of what they wrap.
  while hasattr(model, 'inner'):
    model = model.inner
  if isinstance(model, ClipText):
    return lora_names.CLIP, model
  if isinstance(model, T5):
    return lora_names.T5, model
  kinds = tuple({family.MODEL for family in load.FAMILIES.values()})
  arguments.check_type('model', model, kinds, 'msfp.load_pretrained(...) or '
                       'load_text_encoder(...)')
  return lora_names.DENOISER, model


def _families_of(model):
  """The importers of a model's type."""
  return [family for family in load.FAMILIES.values()
          if isinstance(model, family.MODEL)]


def _abstract(part, model):
  return (native.abstract_params(model) if part == lora_names.DENOISER
          else text_encoder.abstract_text_encoder(model))


def _wanted(path, names):
  """What of a repository is read: the LoRA, and PEFT's configuration."""
  place = pathlib.PurePosixPath(path)
  files = [place] if path in names else [place / name for name in _FILES]
  found = next((file for file in files if str(file) in names), None)
  if found is None:
    raise FileNotFoundError(f'no LoRA in {path or "the repository"}: it has '
                            f'none of {list(_FILES)}; give the file')
  beside = str(found.with_name(lora_config.BESIDE))
  return [str(found), *([beside] if beside in names else [])]


def _file(path):
  if hub.is_reference(path):
    path = hub.fetch_files(str(path), _wanted)
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    file = next((path / name for name in _FILES if (path / name).is_file()),
                None)
    if file is None:
      raise FileNotFoundError(f'no LoRA in {path}: it has none of '
                              f'{list(_FILES)}; give the file')
    return file
  if not path.is_file():
    raise FileNotFoundError(f'no LoRA at {path}')
  if path.suffix != '.safetensors':
    raise ValueError(f'{path}: LoRAs are read from .safetensors files alone; '
                     'save its tensors as one')
  return path


def _products(modules: Mapping[str, lora_names.Module],
              scales: lora_config.Scales
              ) -> tuple[dict[str, Product], list[str]]:
  """{module: its halves, with their scale}, and what is wrong with others."""
  found, problems = {}, []
  for module, (name, down, up, alpha) in modules.items():
    absent = [half for half, tensor in (('down', down), ('up', up))
              if tensor is None]
    refused = [tensor.refused for tensor in (down, up, alpha)
               if tensor is not None and tensor.refused]
    if absent or refused:
      problems += [f'{name} has no {half}' for half in absent]
      problems += [f'{name} {reason}' for reason in refused]
      continue
    rank = down.shape[0] if down.shape else 0
    if len(down.shape) < 2 or len(up.shape) < 2 or not 0 < rank == up.shape[1]:
      problems.append(f'{name} of down {list(down.shape)} and up '
                      f'{list(up.shape)} is no product')
      continue
    scale = scales.of(module, rank)
    if alpha is not None:
      scale = _alpha(alpha) / rank
    # kohya reads an alpha of 0 as the rank, diffusers as it is.
    if not scale or not math.isfinite(scale):
      problems.append(f'{name} has an alpha that is 0 or no number')
      continue
    found[module] = Product(down, up, scale, name)
  return found, problems


def _alpha(tensor):
  if math.prod(tensor.shape) != 1:
    return math.nan
  return float(np.asarray(tensor.read(), np.float64).reshape(()))


# The names that each text encoder's modules have here.
_TEXT_NAMES = {lora_names.CLIP: text_encoder.clip_module,
               lora_names.T5: text_encoder.t5_module}


def _renamed(part, model, products):
  """The products by our layers' names, and what is wrong with the names."""
  families = _families_of(model)
  for family in families:
    if hasattr(family, 'rename_products'):
      return family.rename_products(products, model.config), []
  rules = [functools.partial(family.module_name, config=model.config)
           for family in families if hasattr(family, 'module_name')]
  if part != lora_names.DENOISER:
    rules = [_TEXT_NAMES[part]]
  name_of = lambda module: next(
      (ours for rule in rules if (ours := rule(module)) is not None), module)
  found, problems = {}, []
  for module, product in products.items():
    ours = name_of(module)
    if ours in found:
      problems.append(f'{product.name} is the same as {found[ours].name}')
    found.setdefault(ours, product)
  return found, problems


def _misfits(products, shapes):
  """What of {layer: Product} does not fit the model's kernels, in words."""
  problems = []
  for layer, product in products.items():
    if layer not in shapes:
      problems.append(f'{product.name} is no layer of the model')
      continue
    *window, inputs, outputs = shapes[layer]
    down, up = product.down.shape, product.up.shape
    # A dense layer and a convolution over one point are the same.
    points = {*window, *down[2:]} <= {1}
    if (down[1], up[0]) != (inputs, outputs) or not points and (
        list(down[2:]) != window) or not {*up[2:]} <= {1}:
      problems.append(
          f'{product.name} of down {list(down)} and up {list(up)} does not fit '
          f'a layer of {[outputs, inputs, *window]}')
    problems += [f'{product.name} has type {half.dtype}, which holds no weights'
                 for half in (product.down, product.up)
                 if not jnp.issubdtype(half.dtype, jnp.floating)]
  return problems


def _read(product, shape, problems):
  """Reads a product for a kernel of a shape `[*window, I, O]`."""
  *window, inputs, outputs = shape
  down, up = (np.asarray(half.read()) for half in (product.down, product.up))
  # To float32 at most: what is of 16 bits stays as it is.
  down, up = (half if half.dtype.itemsize <= 4 else np.float32(half)
              for half in (down, up))
  if bad := sum(np.count_nonzero(~np.isfinite(np.float32(half)))
                for half in (down, up)):
    problems.append(f'{product.name} holds {bad} values that are not finite')
  rank = down.shape[0]
  down = np.moveaxis(down.reshape(rank, inputs, *window), (0, 1), (-1, -2))
  return LowRank(np.ascontiguousarray(down),
                 np.ascontiguousarray(up.reshape(outputs, rank).T),
                 product.scale)


def _refuse(path, problems):
  """Raises ValueError if there are problems, each kind of them a line."""
  if not problems:
    return
  # Of another model's LoRA each block says the same: a line for all of them.
  alike: dict[str, list[str]] = {}
  for problem in sorted(problems):
    alike.setdefault(
        re.sub(r'(?<=[._])\d+(?=[._])', '*', problem), []).append(problem)
  texts = [same[0] if len(same) == 1 else f'{line} ({len(same)} of them)'
           for line, same in alike.items()]
  if len(texts) > _MOST_LINES:
    rest = len(texts) - _MOST_LINES
    texts = texts[:_MOST_LINES] + [f'and {rest} lines like these']
  raise ValueError(f'{path} is no LoRA for this model:\n  '
                   + '\n  '.join(texts))
