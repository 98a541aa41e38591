"""The project's own full-precision checkpoint: one safetensors file.

Tensors are float32, or of half its bytes, under the parameters' paths joined
with dots; the header holds the model's configuration and where it came from.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import inspect
import json
import math
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import files
from msfp_jax.base import seal
from msfp_jax.base.pickle_names import first_words
from msfp_jax.convert import restore as restore_lib
from msfp_jax.convert import source as source_lib
from msfp_jax.convert import tensors as tensors_lib
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.diffusion import sampling
from msfp_jax.models import denoiser
from msfp_jax.models import prediction
from msfp_jax.models import registry

FORMAT = 'msfp-jax/model/1'
# Of the metadata alone, for those who read no tensors.
_HEADER_KEY = 'header_digest'
_WAY_OUT = 'restore it, or make it again'
_ASSETS = pathlib.Path(__file__).parent.parent / 'assets'
# Checkpoints that ship with the package, by the name users type.
SHIPPED = {name: _ASSETS / f'{name}.safetensors'
           for name in ('digits16', 'cifar10_small')}
# SHA-256 of their files.
_SHIPPED_SHA256 = {
    'digits16': (
        'abd9b001f2e873c52fb5e460af0d882ee5635f28389ad776da0b18b088c4f03f'),
    'cifar10_small': (
        'b98db04a07337b73d74a420f06aa90ac2801474547aa2731d549f227722fc953')}
# Of the tensors that it writes.
DTYPES = {'float32': np.dtype(np.float32), 'float16': np.dtype(np.float16),
          'bfloat16': np.dtype(tensors_lib.BFLOAT16)}
_DTYPES = {np.dtype(dtype): name
           for name, dtype in source_lib.SAFETENSORS_DTYPES.items()}


def flatten(params: Any) -> dict[str, np.ndarray]:
  """Nested parameters -> {dotted path: array}."""
  flat = traverse_util.flatten_dict(params)
  return {'.'.join(path): np.asarray(value) for path, value in flat.items()}


def write_safetensors(path: str | pathlib.Path,
                      tensors: Mapping[str, np.ndarray],
                      metadata: dict[str, str]) -> None:
  """Writes tensors of one type under a temporary name, then renames.

  The header is in order, so that equal tensors make equal files (safetensors'
  own writer shuffles the metadata), and tensors are written one by one, so
  that no second copy of a model is in memory. A digest of all of it is added to
  the metadata.
  """
  metadata = metadata | {seal.KEY: _digest(metadata, {
      name: functools.partial(np.asarray, array)
      for name, array in tensors.items()})}
  head, _ = safetensors_head(metadata, tensors)
  with files.atomic_path(path) as temporary, open(temporary, 'wb') as file:
    file.write(head)
    for name in sorted(tensors):
      # As bytes: bfloat16 has no buffer of its own.
      array = np.ascontiguousarray(tensors[name])
      file.write(array.reshape(-1).view(np.uint8).data)


def safetensors_head(metadata: Mapping[str, str], tensors: Mapping[str, Any]
                     ) -> tuple[bytes, dict[str, int]]:
  """What a safetensors file begins with, and where in it each tensor begins.

  Args:
    metadata: of its header.
    tensors: {name: what has the shape and dtype of one}; in the file they are
      in the order of their names.
  """
  header, places = {'__metadata__': dict(sorted(metadata.items()))}, {}
  end = 0
  for name in sorted(tensors):
    shape, dtype = tensors[name].shape, np.dtype(tensors[name].dtype)
    places[name] = end
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': _DTYPES[dtype], 'shape': list(shape),
                    'data_offsets': [start, end]}
  # safetensors: 8 bytes with the header's length, the header in JSON, padded so
  # that tensors begin at a multiple of 8, then the tensors without gaps.
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  head = len(text).to_bytes(8, 'little') + text
  return head, {name: len(head) + start for name, start in places.items()}


def check_seal(path: str | pathlib.Path,
               tensors: Mapping[str, tensors_lib.LazyTensor],
               metadata: Mapping[str, str], way_out: str) -> None:
  """Checks a file's digest, if it has one; see `seal.check`."""
  seal.check(str(path), metadata.get(seal.KEY), lambda: _digest(
      metadata, {name: tensor.read for name, tensor in tensors.items()}),
             way_out)


def _digest(metadata, arrays):
  return seal.digest_of(
      {key: value for key, value in metadata.items() if key != seal.KEY},
      arrays)


def _header_digest(metadata):
  return _digest({key: value for key, value in metadata.items()
                  if key != _HEADER_KEY}, {})


def save_pretrained(path: str | pathlib.Path, model: denoiser.Denoiser,
                    params: Any, origin: origin_lib.Origin | None = None,
                    *, dtype: str = 'float32', **about: str) -> None:
  """Writes a model; `about` (command, seed, ...) goes into the header.

  Args:
    path: of the file.
    model: what computes with the parameters.
    params: its parameters.
    origin: the schedule that it was trained on, and the sampler that belongs
      to it; None where nobody knows.
    dtype: of the tensors in the file, of `DTYPES`; loaded they are float32.
    **about: texts.

  Raises:
    ValueError: the model is not of `models.registry`; another dtype, or values
      that it does not hold; values that are not finite; see `check_about`.
  """
  row = registry.to_dict(model)
  if not row:
    raise ValueError(f'{type(model).__name__} is no model that has a name in '
                     f'files: {sorted(registry.REGISTRY)}; add it to '
                     'models.registry.REGISTRY')
  if row.keys() == {'unet'}:
    row = row['unet']  # without the name, as in the first files
  check_about(about, ('format', 'model', 'origin'))
  metadata = {'format': FORMAT, 'model': json.dumps(row)}
  if origin is not None:
    metadata['origin'] = origin.to_json()
  metadata |= about
  write_safetensors(path, _rounded(flatten(params), dtype), metadata | {
      _HEADER_KEY: _header_digest(metadata)})


def check_about(about: Mapping[str, Any], own: Sequence[str]) -> None:
  """Refuses what a caller adds to a header, where no reader would take it.

  Args:
    about: {name: text}.
    own: names that the file keeps for itself, beside those of its digests.

  Raises:
    ValueError: a value that is no text, or a name of the file's own.
  """
  if odd := [name for name, text in about.items() if not isinstance(text, str)]:
    raise ValueError(f'{odd} go into the header, which holds texts: pass '
                     f'{odd[0]}=str(...)')
  if taken := sorted(about.keys() & {*own, seal.KEY, _HEADER_KEY}):
    raise ValueError(f'the header has {taken} of its own: choose other names')


def _rounded(tensors, dtype):
  """Tensors in the type of a file."""
  if dtype not in DTYPES:
    raise ValueError(f'dtype {dtype!r}: must be one of {list(DTYPES)}')
  # The largest numbers of float32 are infinite in these.
  with np.errstate(over='ignore'):
    found = {name: np.asarray(value, DTYPES[dtype])
             for name, value in tensors.items()}
  check_finite(tensors)
  if lost := sorted(name for name, value in tensors.items()
                    if (np.isfinite(value) & ~np.isfinite(found[name])).any()):
    raise ValueError(f'{dtype} does not hold values of {lost}: write float32')
  return found


def check_finite(tensors: Mapping[str, Any]) -> None:
  """Raises ValueError for values that no reader of these files takes."""
  if odd := sorted(name for name, value in tensors.items()
                   if not np.isfinite(np.asarray(value)).all()):
    raise ValueError(f'{odd} hold values that are NaN or infinite: check the '
                     'model')


def about_of(path: str | pathlib.Path) -> dict[str, str]:
  """What a file of ours tells of how it was made; {} of others' files.

  Command, seed and the like, which `save_pretrained` was given, and can be
  given again.
  """
  file = SHIPPED.get(str(path), pathlib.Path(path).expanduser())
  if file.suffix != '.safetensors' or not file.is_file():
    return {}
  _, metadata = source_lib.read_safetensors(file)
  if metadata.get('format') != FORMAT:
    return {}
  others = {'format', seal.KEY, _HEADER_KEY,
            *inspect.signature(save_pretrained).parameters}
  return {key: text for key, text in metadata.items() if key not in others}


def load_pretrained(path: str) -> tuple[denoiser.Denoiser, Any]:
  """Loads a model.

  Args:
    path: a file that `save_pretrained` wrote, or a name in `SHIPPED`.

  Returns:
    The Flax model and its parameters, float32.

  Raises:
    FileNotFoundError: no such file or name.
    ValueError: not such a file, or tensors that are missing, unexpected,
      misshapen or not finite: all are listed.
  """
  opened = open_pretrained(path)
  return opened.model, opened.params()


def open_pretrained(path: str | pathlib.Path) -> restore_lib.Pretrained:
  """Likewise, with the parameters still in the file, its digest checked.

  Raises:
    As `load_pretrained`; what is wrong with tensors, when these are asked for.
  """
  file, tensors, metadata = _opened(path)
  # The models of this package are older than the digest, and so may others be:
  # without it there is nothing to say.
  if seal.KEY in metadata:
    check_seal(file, tensors, metadata, _WAY_OUT)
  try:
    row = json.loads(metadata['model'])
    is_named = not registry.REGISTRY.keys().isdisjoint(row)
    model = registry.from_dict(row if is_named else {'unet': row})
    abstract = abstract_params(model)
  # Sizes that no model has end in errors of many types once it is traced.
  except Exception as error:
    raise ValueError(f'{file}: its header describes no model of this version '
                     f'({first_words(error)})') from error
  return restore_lib.Pretrained(
      model, file, tensors, abstract, restore_lib.FLAX)


def load_origin(path: str | pathlib.Path) -> origin_lib.Origin:
  """What a file of `save_pretrained` says of its schedule and its sampler.

  Raises:
    As `load_pretrained`; of damage, that of the header alone.
  """
  file, tensors, metadata = _opened(path)
  # A header without a digest of its own is sealed with the tensors alone, for
  # which they must be read.
  if _HEADER_KEY not in metadata and seal.KEY in metadata:
    check_seal(file, tensors, metadata, _WAY_OUT)
  if 'origin' not in metadata:
    # Of a file whose maker did not tell, its name, for a warning; the shipped
    # models are of the schedule that is taken.
    if file in SHIPPED.values():
      return origin_lib.Origin(schedule=origin_lib.SCHEDULE)
    return origin_lib.Origin(str(file))
  try:
    found = origin_lib.Origin.from_json(metadata['origin'])
    if found.predicts not in prediction.KINDS:
      raise ValueError(f'predicts={found.predicts!r}')
    return dataclasses.replace(found, source=str(file))
  except (TypeError, ValueError) as error:
    raise ValueError(f'{file}: its header describes no origin of this version '
                     f'({error})') from error


def _opened(path):
  """Finds a file of ours: (its path, its tensors, its metadata)."""
  file = SHIPPED.get(str(path), pathlib.Path(path).expanduser())
  if not file.is_file():
    raise FileNotFoundError(
        f'no checkpoint at {file}; give a .safetensors file or one of '
        f'{sorted(SHIPPED)}')
  if str(path) in SHIPPED:
    seal.check_file(file, _SHIPPED_SHA256[str(path)], seal.INSTALL_AGAIN)
  tensors, metadata = source_lib.read_safetensors(file)
  if metadata.get('format') != FORMAT:
    raise ValueError(f'{file} has format {metadata.get("format")!r}, expected '
                     f'{FORMAT!r}: it was not written by save_pretrained')
  if _HEADER_KEY in metadata:
    seal.check(str(file), metadata[_HEADER_KEY],
               lambda: _header_digest(metadata), _WAY_OUT)
  return file, tensors, metadata


def abstract_params(model: denoiser.Denoiser) -> Any:
  """Shapes of the model's parameters, without making any."""
  return _traced(model)[1]['params']


def check_prediction(model: denoiser.Denoiser) -> None:
  """Checks that a model makes of a sample what samplers need; nothing runs.

  Raises:
    ValueError: see `sampling.check_prediction`.
  """
  # What wraps a model of v computes with what it predicts, and needs the same.
  model = getattr(model, 'inner', model)
  predicted, _ = _traced(model)
  sampling.check_prediction((1, *model.sample_shape), predicted.shape)


# Asked by who reads the file and by who checks the model; to trace a large one
# takes seconds.
@functools.lru_cache(maxsize=16)
def _traced(model):
  """Shapes of what the model predicts of one sample, and of its variables."""
  x = jax.ShapeDtypeStruct((1, *model.sample_shape), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)
  # By name: a model may have others of them, which it does not take.
  conditions = {condition.name: condition.abstract(1)
                for condition in model.conditions}
  return jax.eval_shape(
      model.init_with_output, jax.random.key(0), x, t, **conditions)
