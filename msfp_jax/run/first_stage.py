"""What a config says of the first stage, and of the images that it makes."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import ml_collections

from msfp_jax.models import denoiser
from msfp_jax.models import flux
from msfp_jax.run import teacher

# Pixels along a token of transformers: 2 latents, of 8 pixels each.
_TOKEN = 16


def check(config: ml_collections.ConfigDict) -> None:
  """Looks at the fields of a config alone.

  Raises:
    ValueError: fields that contradict each other, or that none can have.
  """
  if config.first_stage and not config.pretrained:
    raise ValueError(
        f'config.first_stage={config.first_stage!r} without config.pretrained: '
        'a teacher that is trained here works on pixels')
  if config.first_stage_config and not config.first_stage:
    raise ValueError(
        f'config.first_stage_config={config.first_stage_config!r} without '
        'config.first_stage, which it would describe')
  if config.first_stage_rows < 0 or (
      config.first_stage_rows and not config.first_stage):
    raise ValueError(
        f'config.first_stage_rows={config.first_stage_rows}, first_stage='
        f'{config.first_stage!r}: must be the rows of a first stage\'s images '
        'that are decoded at a time, or 0 for all')
  _check_latents(config)
  if config.image_size and not config.pretrained:
    raise ValueError(
        f'config.image_size={tuple(config.image_size)} without '
        'config.pretrained: a teacher that is trained here has the size of '
        'its data')
  _check_size(config.image_size)


def _check_latents(config):
  """Raises ValueError for a scale of latents that none can have."""
  scale, shift = config.first_stage_scale, config.first_stage_shift
  if (scale, shift) == (None, None):
    return
  if config.first_stage in ('', teacher.RANDOM):
    raise ValueError(
        f'config.first_stage_scale={scale}, first_stage_shift={shift}, and '
        f'config.first_stage={config.first_stage!r}: only the first stage of a '
        'checkpoint has them')
  if scale is not None and not 0 < scale < math.inf:
    raise ValueError(f'config.first_stage_scale={scale}: must be a number '
                     'above 0')
  if shift is not None and not math.isfinite(shift):
    raise ValueError(f'config.first_stage_shift={shift}: must be a number')


def _check_size(size: Sequence[int]) -> None:
  """Raises ValueError unless config.image_size is () or fits a transformer."""
  if not size:
    return
  if len(size) != 2 or any(side < _TOKEN or side % _TOKEN for side in size):
    raise ValueError(
        f'config.image_size={tuple(size)}: must be height and width in pixels, '
        f'multiples of {_TOKEN}, as a token of the transformer is {_TOKEN} x '
        f'{_TOKEN} of them; or () for the model\'s own')


def resized(model: denoiser.Denoiser, image_shape: tuple[int, int, int],
            size: tuple[int, int]
            ) -> tuple[denoiser.Denoiser, tuple[int, int, int]]:
  """A transformer for images of another size, and their (H, W, C).

  Args:
    model: of any size.
    image_shape: (H, W, C) of what its samples become.
    size: (H, W) that they are to become.

  Raises:
    ValueError: a model of one size alone, or sides that it does not take.
  """
  if not isinstance(model, flux.Flux):
    raise ValueError(
        f'config.image_size={size}: this model has a size of its own, '
        f'{image_shape[0]} x {image_shape[1]}; leave it at (), as only '
        'transformers can be asked for another')
  stride = image_shape[0] // model.sample_shape[0]
  return flux.Flux(dataclasses.replace(
      model.config, image_size=size[0] // stride,
      image_width=size[1] // stride)), (*size, image_shape[-1])


def sampler_for(model: flux.Flux, sampler: Mapping[str, Any]
                ) -> dict[str, Any]:
  """Fields of config.sampler, with the tokens of a resized model's images.

  Args:
    model: of `resized`.
    sampler: the fields, in which `image_tokens` may be typed: then it stays.
  """
  height, width, _ = model.sample_shape
  return dict(sampler) | {'image_tokens': sampler['image_tokens'] or (
      height * width // flux.PATCH**2)}
