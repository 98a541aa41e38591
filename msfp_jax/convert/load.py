"""Loads any supported checkpoint as a model and its parameters."""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp

from msfp_jax import diffusion
from msfp_jax.convert import ddim
from msfp_jax.convert import diffusers_unet
from msfp_jax.convert import first_stage
from msfp_jax.convert import flow_scheduler
from msfp_jax.convert import flux
from msfp_jax.convert import hub
from msfp_jax.convert import ldm
from msfp_jax.convert import native
from msfp_jax.convert import restore
from msfp_jax.convert import scheduler
from msfp_jax.convert import source as source_lib
from msfp_jax.convert import tensors as tensors_lib
from msfp_jax.convert import training
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.models import autoencoder
from msfp_jax.models import denoiser
from msfp_jax.models import prediction

# Name -> module with MODEL, detect, select, config and rename; a new family is
# one module and one entry. The first that detects its landmark takes the file.
# One of flow matching has `flow` as well, its configuration -> a
# `flow_scheduler.FlowModel`. For LoRAs: `module_name`, (module, config) -> our
# name of it or None; or, where modules are fused, `rename_products`.
FAMILIES = {'ddim': ddim, 'ldm': ldm, 'diffusers': diffusers_unet, 'flux': flux}
# Those with a yaml of their own.
_BY_YAML = ('ddim', 'ldm')
# Sub-folders of a pipeline of diffusers.
_DENOISER_PARTS = ('unet', 'transformer')
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
      torch.save are read as data: nothing in them runs. Or one of those in
      the Hugging Face Hub, hf:OWNER/NAME[/PATH][@REVISION], see `hub`.
    config: a config.json or CompVis yaml that describes the model.
    ema: whether to take the moving average of the weights where the file has
      one; None: yes, unless the yaml says otherwise (`use_ema`).

  Returns:
    The Flax model and its parameters, float32. The model predicts the noise,
    also where the checkpoint predicts v or x_0 (`models.prediction`).

  Raises:
    FileNotFoundError: nothing there.
    ValueError: a damaged file, one of no known family or of another kind of
      model by its scheduler_config.json, or tensors that are
      missing, unexpected, misshapen or not finite: all are listed.
  """
  opened = open_pretrained(path, config, ema)
  return opened.model, opened.params()


def open_pretrained(path: str, config: str | None = None,
                    ema: bool | None = None) -> restore.Pretrained:
  """Likewise, with the parameters still in the file.

  Raises:
    As `load_pretrained`; what is wrong with tensors, when these are asked for.
  """
  ours, opened = _ours_or_opened(path, config, ema)
  if ours is not None:
    return native.open_pretrained(ours)
  source, family, found = opened.source, opened.family, opened.config
  logging.info('%s: %s, %s', source.path, opened.name, found)
  if why := opened.origin.refused.get(opened.origin.sampler):
    logging.warning('%s: %s', opened.origin.source, why)
  named, leftover = family.rename(opened.tensors, found)
  model = family.MODEL(found)
  if opened.origin.predicts != prediction.NOISE:
    native.check_prediction(model)
  return restore.Pretrained(
      _as_noise(model, opened.origin), source.path, named,
      native.abstract_params(model), restore.TORCH, leftover)


def load_origin(path: str, config: str | None = None,
                ema: bool | None = None) -> origin_lib.Origin:
  """The schedule and the sampler that a checkpoint was made for.

  They come from the scheduler_config.json beside the weights or in the
  pipeline's folder; else from the yaml, from the betas that the file holds, or
  from what is known of published models. Our own files keep what was found.

  Args:
    path: as of `load_pretrained`; no tensors of weights are read.
    config: likewise.
    ema: likewise: a moving average that does not fit is refused where it is
      wanted.

  Raises:
    As `load_pretrained`.
  """
  ours, opened = _ours_or_opened(path, config, ema)
  return opened.origin if ours is None else native.load_origin(ours)


def load_plan(path: str, config: str | None = None, num_steps: int = 20, *,
              ema: bool | None = None, **typed: Any) -> diffusion.SamplerPlan:
  """The sampler that a checkpoint was made for, on its own schedule.

  Args:
    path: as of `load_pretrained`.
    config: likewise.
    num_steps: of the sampler.
    ema: as of `load_origin`.
    **typed: options of `diffusion.make_plan` that go before the checkpoint's,
      also `name`.

  Raises:
    As `load_pretrained`; ValueError for a sampler that is none of ours where
    no name is given, and for options that it does not have.
  """
  return origin_lib.choose(load_origin(path, config, ema), {}, {
      'num_steps': num_steps} | typed).plan


def _ours_or_opened(path, config, ema):
  """(a file or a shipped name of ours, None), or (None, what is opened)."""
  ours, opened = path, None
  if str(path) not in native.SHIPPED:
    opened = _opened(path, config, ema)
    if opened.family is not None:
      return None, opened
    ours = opened.source.path
  if config is not None:
    raise ValueError(f'{ours} describes itself: leave out {config}, which '
                     'would describe it otherwise')
  return ours, None


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A checkpoint of which all but the weights is known.

  `family` and what follows is None of a file of our own.
  """

  source: source_lib.Source
  name: str = ''
  family: Any = None
  tensors: Mapping[str, tensors_lib.LazyTensor] | None = None
  config: Any = None
  origin: origin_lib.Origin | None = None


def _opened(path, config, ema):
  """Opens a checkpoint: names and shapes tell what it is."""
  # Only when all that is known are values read, one tensor at a time.
  try:
    source = _open(path, config, _DENOISER_PARTS, ema is not False)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{error}; give a file, a folder, or one of '
                            f'{sorted(native.SHIPPED)}') from error
  if source.metadata.get('format') == native.FORMAT:
    return _Opened(source)
  name = family_of(source)
  family = FAMILIES[name]
  # Before the weights are looked at: of a model of another kind these would
  # give reasons that lead astray.
  described = _scheduler(source, name)
  tensors = _configure(source, lambda: family.select(
      source.tensors, _wants_ema(source.config) if ema is None else ema))
  found = _configure(source, lambda: family.config(tensors, source.config))
  if hasattr(family, 'flow'):
    origin = _configure(source, lambda: flow_scheduler.of_model(
        described, family.flow(found), str(source.path)))
  else:
    origin = described or _configure(source, lambda: training.origin(
        name, str(source.path), source.config, source.tensors, found))
  return _Opened(source, name, family, tensors, found, origin)


def _scheduler(source, name):
  """What the scheduler's file of diffusers says, or None without one."""
  # CompVis' and ermongroup's own yaml says more of their files than a
  # scheduler's that lies beside them.
  if name in _BY_YAML and source.config:
    return None
  file = scheduler.find(source.path)
  return None if file is None else scheduler.read(file)


def _as_noise(model, origin):
  """The model, turned into one of the noise where it is none."""
  if origin.predicts == prediction.NOISE:
    return model
  logging.info('the model predicts %s; turned into one of the noise',
               origin.predicts)
  return prediction.AsNoise(
      model, origin.predicts, tuple(origin.noise_schedule().alphas_cumprod))


def load_first_stage(path: str, config: str | None = None,
                     scale: float | None = None, shift: float | None = None
                     ) -> tuple[autoencoder.Autoencoder, Any]:
  """Loads the autoencoder of a latent diffusion model.

  Args:
    path: as of `load_pretrained`; also the checkpoint of a whole latent
      diffusion model, which holds its first stage.
    config: likewise.
    scale: of the latents, where the files say none or a wrong one.
    shift: likewise.

  Returns:
    The Flax model (methods `encode` and `decode`) and its parameters.

  Raises:
    As `load_pretrained`; ValueError where nothing tells the scale.
  """
  source = _open(path, config, _FIRST_STAGE_PARTS)
  if not first_stage.detect(source.tensors):
    raise ValueError(f'{source.path} holds no autoencoder: {_some(source)}')
  tensors = first_stage.select(source.tensors)
  model = autoencoder.Autoencoder(_configure(source, lambda: first_stage.config(
      tensors, source.config, first_stage.held_scale(source.tensors), scale,
      shift)))
  logging.info('%s: %s', source.path, model.config)
  named, leftover = first_stage.rename(tensors, model.config)
  return model, restore.restore(
      named, abstract_autoencoder(model), str(source.path), restore.TORCH,
      leftover)


@functools.lru_cache(maxsize=16)
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


def _some(source):
  names = sorted(source.tensors)
  if not names:
    return 'it holds no tensors'
  kind = _class_beside(source)
  return (f'{len(names)} tensors, such as {names[:3]}'
          + (f'; beside them {source.beside}' if source.beside else '')
          + (f'; its config.json says {kind}' if kind else ''))


def _class_beside(source):
  """The class in diffusers' config.json beside a file; '' without one."""
  # Where the names are nobody's that is known, it was not looked for.
  try:
    found = source_lib.read_config(source.path.parent / 'config.json')
  except (OSError, ValueError):
    return ''
  return str(found.get('_class_name', ''))


def _open(path, config, parts, ema=True):
  if isinstance(path, str | pathlib.Path):
    if hub.is_reference(config):
      config = hub.fetch(str(config))
    if hub.is_reference(path):
      path = hub.fetch(str(path), parts, ema)
    return source_lib.open_source(path, config, parts, ema)
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
