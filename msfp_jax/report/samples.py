"""The section with images of every method, all from the same noise."""

import base64
import io
import math

import numpy as np
from PIL import Image

from msfp_jax.base import pictures as pictures_lib
from msfp_jax.metrics import registry
from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

# Of one method, embedded; larger images are fewer.
_MAX_IMAGES = 16
_MAX_PIXELS = 2**18
_GREY = 127  # between images
_CLOSENESS = 'psnr_to_fp'  # the metric told with each method
_PIXELATED = 64  # images up to this side are shown with hard pixels


def count_shown(num_images: int, height: int, width: int) -> int:
  """The number of images of a method on the page: a square, at least 1."""
  # All pictures are embedded in the page, which should stay a few megabytes.
  allowed = min(num_images, _MAX_IMAGES, _MAX_PIXELS // (height * width))
  return max(math.isqrt(max(allowed, 1))**2, 1)


def data_uri(image: np.ndarray) -> str:
  """Encodes uint8 `[H, W, C]`, C = 1 or 3, as a PNG inside an address."""
  image = pictures_lib.check_pixels('report', image, 'HWC')
  buffer = io.BytesIO()
  # Pillow takes grey without its axis of channels.
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
      buffer, format='PNG', optimize=True)
  return 'data:image/png;base64,' + base64.b64encode(
      buffer.getvalue()).decode()


def section(source: Source) -> Section | None:
  if not source.pictures:
    return None
  height, width = next(iter(source.pictures.values())).shape[1:3]
  # The same number and places for all methods: they are compared image by
  # image.
  count = count_shown(
      min(map(len, source.pictures.values())), height, width)
  rows = {row['name']: row for row in source.results['rows']}
  columns = math.isqrt(count)
  methods = []
  for name, images in source.pictures.items():
    grid = _spaced_grid(images[:count], columns)
    note = _note(name, rows.get(name, {}))
    methods.append({
        'name': name, 'src': data_uri(grid), 'note': note,
        'width': grid.shape[1], 'height': grid.shape[0],
        'alt': f'{count} images, {columns} a row: {name}, {note}'})
  return Section('samples', 'Samples', 'Samples', 'samples.html', {
      'methods': methods, 'count': count,
      # What `run.evaluate` writes of prompts, an image each.
      'texts': source.results.get('prompts', [])[:count],
      'left': 'fp' if 'fp' in source.pictures else methods[0]['name'],
      'right': source.row if source.row in source.pictures
      else methods[-1]['name'],
      'pixelated': max(height, width) <= _PIXELATED,
      'size': f'{width} x {height}'})


def _spaced_grid(images: np.ndarray, columns: int) -> np.ndarray:
  """Makes `pictures.image_grid` with grey lines between the images."""
  # Lines to the right and below each; those at the ends are cut off.
  width = max(images.shape[1] // 32, 1)
  padded = np.pad(images, ((0, 0), (0, width), (0, width), (0, 0)),
                  constant_values=_GREY)
  return pictures_lib.image_grid(padded, columns)[:-width, :-width]


def _note(name: str, row: dict) -> str:
  if name == 'data':
    return 'images of the data set'
  if _CLOSENESS in row:
    value = registry.METRICS[_CLOSENESS].format(row[_CLOSENESS])
    return f'PSNR to full precision {value} dB'
  return 'what the others are compared with' if name == 'fp' else 'samples'
