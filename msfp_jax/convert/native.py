"""The project's own full-precision checkpoint: one safetensors file.

Tensors are float32 under the parameters' paths joined with dots; the header
holds the model's configuration and where it came from.
"""

import json
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from msfp_jax import files
from msfp_jax.models import unet

FORMAT = 'msfp-jax/model/1'
_ASSETS = pathlib.Path(__file__).parent.parent / 'assets'
# Checkpoints that ship with the package, by the name users type.
SHIPPED = {'digits16': _ASSETS / 'digits16.safetensors'}


def flatten(params: Any) -> dict[str, np.ndarray]:
  """Nested parameters -> {dotted path: array}."""
  flat = traverse_util.flatten_dict(params)
  return {'.'.join(path): np.asarray(value) for path, value in flat.items()}


def write_safetensors(path: str | pathlib.Path, tensors: dict[str, np.ndarray],
                      metadata: dict[str, str]) -> None:
  """Writes under a temporary name, then renames."""
  with files.atomic_path(path) as temporary:
    # Not save_file, which makes a file that only its owner can read.
    temporary.write_bytes(
        _sorted_header(safetensors.numpy.save(tensors, metadata)))


def _sorted_header(content: bytes) -> bytes:
  """The file with its metadata in order: safetensors shuffles them."""
  end = 8 + int.from_bytes(content[:8], 'little')
  header = json.loads(content[8:end])
  header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text + content[end:]


def save_pretrained(path: str | pathlib.Path, config: unet.UNetConfig,
                    params: Any, **about: str) -> None:
  """Writes a model; `about` (command, seed, ...) goes into the header."""
  metadata = {'format': FORMAT, 'model': json.dumps(config.to_dict())}
  write_safetensors(path, flatten(params), metadata | about)


def load_pretrained(path: str) -> tuple[unet.UNet, Any]:
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
  file = SHIPPED.get(str(path), pathlib.Path(path).expanduser())
  if not file.is_file():
    raise FileNotFoundError(
        f'no checkpoint at {file}; give a .safetensors file or one of '
        f'{sorted(SHIPPED)}')
  try:
    with safetensors.safe_open(file, 'np') as opened:
      metadata = opened.metadata() or {}
      tensors = {key: opened.get_tensor(key) for key in opened.keys()}
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'{file} is no safetensors file: {error}') from error
  if metadata.get('format') != FORMAT:
    raise ValueError(f'{file} has format {metadata.get("format")!r}, expected '
                     f'{FORMAT!r}: it was not written by save_pretrained')
  try:
    model = unet.UNet(unet.UNetConfig(**json.loads(metadata['model'])))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{file}: its header describes no UNet of this version '
                     f'({error})') from error
  return model, restore(tensors, abstract_params(model), str(file))


def abstract_params(model: unet.UNet) -> Any:
  """Shapes of the model's parameters, without making any."""
  cfg = model.config
  side = cfg.image_size
  image = jax.ShapeDtypeStruct((1, side, side, cfg.in_channels), jnp.float32)
  labels = context = None
  if cfg.by_class:
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
  if cfg.by_context:
    context = jax.ShapeDtypeStruct((1, 1, cfg.context_dim), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)
  return jax.eval_shape(
      model.init, jax.random.key(0), image, t, labels, context)['params']


def restore(tensors: dict[str, np.ndarray], abstract: Any, source: str) -> Any:
  """Dotted tensors -> parameters of exactly the structure of `abstract`."""
  expected = {'.'.join(path): path
              for path in traverse_util.flatten_dict(abstract)}
  shapes = {key: traverse_util.flatten_dict(abstract)[path].shape
            for key, path in expected.items()}
  problems = [f'missing {key} {shapes[key]}'
              for key in expected if key not in tensors]
  problems += [f'unexpected {key} {tensors[key].shape}'
               for key in tensors if key not in expected]
  for key in expected.keys() & tensors.keys():
    if tensors[key].shape != shapes[key]:
      problems.append(
          f'{key} is {tensors[key].shape}, the model wants {shapes[key]}')
    elif not np.isfinite(tensors[key]).all():
      count = np.count_nonzero(~np.isfinite(tensors[key]))
      problems.append(f'{key} holds {count} values that are not finite')
  if problems:
    raise ValueError(f'{source} does not fit the model:\n  '
                     + '\n  '.join(sorted(problems)))
  return traverse_util.unflatten_dict({
      path: jnp.asarray(tensors[key], jnp.float32)
      for key, path in expected.items()})
