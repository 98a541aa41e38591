"""Pictures of samples, one row of images per method."""

from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

_MARGIN = 8


def labelled(rows: Mapping[str, np.ndarray], height: int = 48) -> np.ndarray:
  """Rows of images with their names on the left.

  Args:
    rows: {name: uint8 `[N, H, W, C]`}, all of one size; C = 1 or 3.
    height: of an image in pixels; images are enlarged by a whole factor to at
      least about this.

  Returns:
    uint8 `[H', W', 3]`, white background.
  """
  if not rows:
    raise ValueError('no rows to draw')
  font = ImageFont.load_default(size=16)
  first = next(iter(rows.values()))
  # Whole, so that every pixel of a small image is a square of one size.
  factor = max(round(height / first.shape[1]), 1)
  tall, wide = first.shape[1] * factor, first.shape[2] * factor
  left = max(round(font.getlength(name)) for name in rows) + 2 * _MARGIN
  count = max(len(images) for images in rows.values())
  canvas = Image.new(
      'RGB', (left + count * (wide + 2), len(rows) * (tall + 2)), 'white')
  draw = ImageDraw.Draw(canvas)
  for i, (name, images) in enumerate(rows.items()):
    top = i * (tall + 2)
    draw.text((_MARGIN, top + tall // 2), name, 'black', font, anchor='lm')
    for j, image in enumerate(images):
      # Grey becomes three equal channels.
      pixels = np.broadcast_to(image, (*image.shape[:2], 3))
      picture = Image.fromarray(np.ascontiguousarray(pixels)).resize(
          (wide, tall), Image.NEAREST)
      canvas.paste(picture, (left + j * (wide + 2), top))
  return np.asarray(canvas)
