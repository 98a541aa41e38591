"""Loads any supported checkpoint as a model and its parameters."""

import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp

from msfp_jax.convert import ddim
from msfp_jax.convert import diffusers_unet
from msfp_jax.convert import first_stage
from msfp_jax.convert import ldm
from msfp_jax.convert import native
from msfp_jax.convert import restore
from msfp_jax.convert import source as source_lib
from msfp_jax.models import autoencoder
from msfp_jax.models import denoiser

# Name -> module with MODEL, detect, select, config and rename; a new family is
# one module and one entry. The first that detects its landmark takes the file.
FAMILIES = {'ddim': ddim, 'ldm': ldm, 'diffusers': diffusers_unet}
# Sub-folders of a pipeline of diffusers.
_UNET_PARTS = ('unet',)
_FIRST_STAGE_PARTS = ('vae', 'vqvae', 'vqmodel')


def load_pretrained(path: str, config: str | None = None,
                    ema: bool | None = None
                    ) -> tuple[denoiser.Denoiser, Any]:
  """Loads a model, whoever trained it.

  The family is told from the tensors' names; the configuration comes from the
  config.json beside them, from `config`, or from shapes.

  Args:
    path: a name in `native.SHIPPED`; a .safetensors file or one of torch.save
      (.ckpt, .pth, .bin, ema_cifar10); a folder of diffusers. Files of
      torch.save are read as data: nothing in them runs.
    config: a config.json or CompVis yaml that describes the model.
    ema: whether to take the moving average of the weights where the file has
      one; None: yes, unless the yaml says otherwise (`use_ema`).

  Returns:
    The Flax model and its parameters, float32.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: a damaged file, one of no known family, or tensors that are
      missing, unexpected, misshapen or not finite: all are listed.
  """
  if str(path) in native.SHIPPED:
    return native.load_pretrained(path)
  # Names and shapes tell the family and the configuration; only then are
  # values read, one tensor at a time.
  try:
    source = _open(path, config, _UNET_PARTS)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{error}; give a file, a folder, or one of '
                            f'{sorted(native.SHIPPED)}') from error
  if source.metadata.get('format') == native.FORMAT:
    return native.load_pretrained(source.path)
  _check_scheduler(source.path)
  name = family_of(source)
  family = FAMILIES[name]
  tensors = _configure(source, lambda: family.select(
      source.tensors, _wants_ema(source.config) if ema is None else ema))
  found = _configure(source, lambda: family.config(tensors, source.config))
  logging.info('%s: %s, %s', source.path, name, found)
  named, leftover = family.rename(tensors, found)
  model = family.MODEL(found)
  return model, restore.restore(
      named, native.abstract_params(model), str(source.path), restore.TORCH,
      leftover)


def load_first_stage(path: str, config: str | None = None
                     ) -> tuple[autoencoder.Autoencoder, Any]:
  """Loads the autoencoder of a latent diffusion model.

  Args:
    path: as of `load_pretrained`; also the checkpoint of a whole latent
      diffusion model, which holds its first stage.
    config: likewise.

  Returns:
    The Flax model (methods `encode` and `decode`) and its parameters.

  Raises:
    As `load_pretrained`.
  """
  source = _open(path, config, _FIRST_STAGE_PARTS)
  if not first_stage.detect(source.tensors):
    raise ValueError(f'{source.path} holds no autoencoder: {_some(source)}')
  tensors = first_stage.select(source.tensors)
  scale = source.tensors.get('scale_factor')
  model = autoencoder.Autoencoder(_configure(source, lambda: first_stage.config(
      tensors, source.config, None if scale is None else scale.read().item())))
  logging.info('%s: %s', source.path, model.config)
  named, leftover = first_stage.rename(tensors, model.config)
  return model, restore.restore(
      named, abstract_autoencoder(model), str(source.path), restore.TORCH,
      leftover)


def abstract_autoencoder(model: autoencoder.Autoencoder) -> Any:
  """The shapes of the autoencoder's parameters, without making any."""
  cfg = model.config
  image = jax.ShapeDtypeStruct(
      (1, cfg.stride, cfg.stride, cfg.in_channels), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)['params']


def family_of(source: source_lib.Source) -> str:
  """Tells a checkpoint's family by its tensors' names: a key of FAMILIES.

  Raises:
    ValueError: of none of them.
  """
  for name, family in FAMILIES.items():
    if family.detect(source.tensors):
      return name
  raise ValueError(f'{source.path} is of no family that is known '
                   f'({sorted(FAMILIES)}): {_some(source)}')


def _wants_ema(config):
  """Whether a CompVis yaml asks for the moving average; yes without one."""
  try:
    return bool(config['model']['params'].get('use_ema', True))
  except (KeyError, TypeError, AttributeError):
    return True


def _check_scheduler(path: pathlib.Path) -> None:
  """Raises ValueError if the pipeline's scheduler wants no noise predicted."""
  # A pipeline: PIPE/unet/WEIGHTS beside PIPE/scheduler. Models that predict v
  # have the same shapes, and would sample garbage here.
  file = path.parent.parent / 'scheduler' / 'scheduler_config.json'
  if file.is_file():
    kind = source_lib.read_config(file).get('prediction_type', 'epsilon')
    if kind != 'epsilon':
      raise ValueError(f'{file} has prediction_type={kind!r}: only models that '
                       "predict the noise ('epsilon') are supported")


def _some(source):
  names = sorted(source.tensors)
  return (f'{len(names)} tensors, such as {names[:3]}' if names
          else 'it holds no tensors')


def _open(path, config, parts):
  if isinstance(path, str | pathlib.Path):
    return source_lib.open_source(path, config, parts)
  raise TypeError(f'path must be a string or a Path, got {type(path).__name__}')


def _configure(source, make):
  """Calls make(), and adds the file's name to whatever error it raises."""
  try:
    return make()
  except KeyError as error:
    raise ValueError(f'{source.path} lacks {error}, without which its '
                     'configuration cannot be told') from error
  except IndexError as error:
    raise ValueError(f'{source.path} lacks the blocks that would tell its '
                     'configuration') from error
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(f'{source.path}: {error}') from error
