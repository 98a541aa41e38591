"""The full-precision model of a run: loaded, untrained, or with guidance."""

from collections.abc import Callable, Mapping, Sequence
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import convert
from msfp_jax import data
from msfp_jax.base import arguments
from msfp_jax.base import errors
from msfp_jax.convert import hub
from msfp_jax.diffusion import conditions
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.models import autoencoder
from msfp_jax.models import decode_rows
from msfp_jax.models import denoiser
from msfp_jax.models import guided
from msfp_jax.models import registry
from msfp_jax.models import unet

# In place of a checkpoint: an untrained model.
RANDOM = 'random'


def load(path: str, workdir: str, *, described_by: str, ema: bool | None,
         fields: Mapping[str, Any], seed: int,
         loras: Sequence[tuple[str, float]] = ()
         ) -> tuple[denoiser.Denoiser, Any]:
  """The teacher and its parameters.

  Args:
    path: of a checkpoint, or a shipped one's name; RANDOM; or '' for the one
      that `train.run` left in the workdir.
    workdir: of the run.
    described_by: the file that tells a checkpoint's configuration, or ''.
    ema: whether to take the moving average where a checkpoint has one.
    fields: of a random model, see `new_model`.
    seed: of a random model.
    loras: (file, strength) of those that are merged into it.

  Raises:
    errors.WorkdirError: the workdir holds none.
    FileNotFoundError, ValueError: see `convert.load_pretrained` and
      `convert.load_lora`; ValueError too for a model that no sampler steps, see
      `convert.check_prediction`.
  """
  if path == RANDOM:
    model = new_model(fields)
    convert.check_prediction(model)
    read_params = lambda: random_params(convert.abstract_params(model), seed)
  else:
    opened = convert.open_pretrained(
        path or _trained(workdir), described_by or None, ema)
    model, read_params = opened.model, opened.params
    convert.check_prediction(model)
  # Before weights are read, which of large models takes minutes.
  read = [(convert.load_lora(file, model), strength)
          for file, strength in loras]
  return model, convert.merge_loras(read_params(), read)


def check_loras(loras: Any) -> None:
  """Looks at config.loras, before anything is loaded.

  Raises:
    ValueError: it is not pairs of a file and a strength.
    FileNotFoundError: a file is not there.
  """
  for entry in loras:
    if not (isinstance(entry, tuple | list) and len(entry) == 2
            and isinstance(entry[0], str) and entry[0]
            and arguments.NUMBER[0](entry[1])):
      raise ValueError(
          f'config.loras={loras!r}: must be pairs of a file and a strength, '
          "such as (('style.safetensors', 0.8),)")
    if not hub.is_reference(entry[0]) and not pathlib.Path(
        entry[0]).expanduser().exists():
      raise FileNotFoundError(
          f'no file at {entry[0]}, which config.loras names')


def load_origin(path: str, workdir: str, *, described_by: str, ema: bool | None
                ) -> origin_lib.Origin:
  """The schedule and the sampler that the teacher of `load` was made for."""
  if path == RANDOM:
    return origin_lib.Origin()
  return convert.load_origin(
      path or _trained(workdir), described_by or None, ema)


def _trained(workdir: str) -> str:
  """The file of the teacher that `train.run` left in the workdir."""
  path = f'{workdir}/pretrain/model.safetensors'
  if not pathlib.Path(path).is_file():
    raise errors.WorkdirError(
        f'no trained model at {path}: run train.py with this config and '
        'workdir first, or set config.pretrained')
  return path


def new_model(fields: Mapping[str, Any]) -> denoiser.Denoiser:
  """The model of config.model: its fields, and its `family`, a UNet if none."""
  fields = dict(fields)
  return registry.from_dict({fields.pop('family', 'unet'): fields})


def untrained(fields: Mapping[str, Any], images: data.Images) -> unet.UNet:
  """The model of config.model, to be trained on images.

  Args:
    fields: of `new_model`; sizes and channels of 0 are the images'.
    images: the data.

  Raises:
    ValueError: the images do not fit it, or it is none that is trained here.
  """
  height, width, channels = images.shape[1:]
  # Of 0, so that one config serves data sets of several sizes.
  sizes = {'image_size': height, 'in_channels': channels,
           'out_channels': channels}
  given = {name: value if value != 0 else sizes.get(name, value)
           for name, value in fields.items()}
  if fields.get('image_size') == 0 and width != height:
    given.setdefault('image_width', width)
  model = new_model(given)
  if not isinstance(model, unet.UNet) or model.conditions:
    raise ValueError(
        f'config.model is {registry.to_dict(model)}: only UNets that take no '
        'labels and no context are trained here; set config.pretrained')
  convert.check_prediction(model)
  check_images(images, model.sample_shape)
  return model


def random_params(abstract: Any, seed: int) -> Any:
  """Parameters that keep activations near 1, none of them neutral."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    # Vectors are biases and scales of normalizations. Near 1 but all different:
    # at 0 or 1 exactly, a test would not notice one that is lost or mixed up.
    noise = rng.standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) == 1:
      return jnp.asarray(0.2 * noise + 1)
    # Variance 1 / fan-in keeps a product's variance that of its input.
    return jnp.asarray(noise / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

  return jax.tree.map(draw, abstract)


def load_decoder(path: str, latent_shape: tuple[int, int, int], *,
                 described_by: str, scale: float | None, shift: float | None,
                 fields: Mapping[str, Any], seed: int, rows: int = 0
                 ) -> tuple[Callable[[jax.Array], jax.Array],
                            tuple[int, int, int]]:
  """The decoder of a first stage, jitted, and the (H, W, C) that it makes.

  Args:
    path: of a checkpoint, or RANDOM.
    latent_shape: (h, w, c) of what the model denoises.
    described_by: the file that tells the checkpoint's configuration, or ''.
    scale: of the latents; None: as the checkpoint says.
    shift: likewise.
    fields: of a random one's `AutoencoderConfig`.
    seed: of a random one.
    rows: of an image that are decoded at a time, see `decode_rows`; 0: whole
      batches.

  Raises:
    ValueError: its latents are not what the model denoises.
  """
  if path == RANDOM:
    stage = autoencoder.Autoencoder(autoencoder.AutoencoderConfig(**fields))
    params = random_params(convert.abstract_autoencoder(stage), seed)
  else:
    stage, params = convert.load_first_stage(
        path, described_by or None, scale, shift)
  height, width, channels = latent_shape
  if stage.config.embed_dim != channels:
    raise ValueError(
        f'{path}: its latents have {stage.config.embed_dim} channels, the '
        f'model of config.pretrained takes {channels}: they do not belong '
        'together')
  # Parameters are an argument: as constants they would be folded.
  decode = jax.jit(
      functools.partial(decode_rows.decode, stage, rows=rows) if rows else
      lambda params, z: stage.apply({'params': params}, z, method='decode'))
  stride = stage.config.stride
  return functools.partial(decode, params), (
      height * stride, width * stride, stage.config.out_channels)


def conditional(model: denoiser.Denoiser, scale: float, has_null_class: bool
                ) -> tuple[denoiser.Denoiser, conditions.Draw]:
  """The model with guidance, and what it is asked for.

  Args:
    model: unconditional, or of labels; of a text, see `run.prompts`.
    scale: of the guidance; 1 for none.
    has_null_class: whether the last class stands for none.

  Raises:
    ValueError: the model takes what cannot be drawn at random, or has no class
      that guidance could leave out, or takes nothing that could guide it.
  """
  if not model.conditions:
    if scale != 1.0 or has_null_class:
      raise ValueError(
          f'config.guidance.scale={scale}, null_class={has_null_class}: the '
          'model takes no labels, and nothing can guide it; leave them at 1.0 '
          'and False')
    return model, conditions.none
  # Classes can be drawn at random; a text cannot.
  first, *others = model.conditions
  for condition in (first, *others):
    if condition.classes is None:
      raise ValueError(
          f'the model takes a {condition.name}, which cannot be drawn at '
          'random: that of a text comes from config.prompts')
  if others:
    raise ValueError(
        f'the model takes {[c.name for c in model.conditions]}: experiments '
        'draw one set of labels')
  # The class that stands for none is not among those drawn.
  count = first.classes - has_null_class
  if scale == 1.0:
    return model, conditions.classes(count)
  if not has_null_class:
    raise ValueError(
        f'config.guidance.scale={scale}: guidance needs a class that stands '
        'for none; set config.guidance.null_class if the last one does')
  return guided.Guided(model, scale, count), conditions.classes(count)


def check_images(images: data.Images, image_shape: tuple[int, int, int]
                 ) -> None:
  """Raises ValueError unless images are what the model's samples become.

  Args:
    images: the data.
    image_shape: (H, W, C) of those samples.
  """
  *sides, channels = image_shape
  if images.shape[-1] != channels:
    raise ValueError(
        f'the images have {images.shape[-1]} channels, the model makes '
        f'{channels}; convert the images, or train a model on them: '
        'config.pretrained empty, config.model.in_channels and out_channels '
        f'{images.shape[-1]}')
  if list(images.shape[1:3]) != sides:
    height, width = images.shape[1:3]
    raise ValueError(
        f'the images are {height} x {width} pixels, the model makes '
        f'{sides[0]} x {sides[1]}: resize the images, or choose a model of '
        'their size')
