"""Pictures of samples, one row of images per method."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

_MARGIN = 8
_LINE = 20  # pixels from one line of text to the next
_LEAST_ACROSS = 480  # of lines, however narrow the images are


def labelled(rows: Mapping[str, np.ndarray], height: int = 48,
             texts: Sequence[str] = ()) -> np.ndarray:
  """Rows of images with their names on the left.

  Args:
    rows: {name: uint8 `[N, H, W, C]`}, all of one size; C = 1 or 3.
    height: of an image in pixels; images are enlarged by a whole factor to at
      least about this.
    texts: what the image of each column shows: listed below the rows, each
      text once.

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
  columns = {}
  for i, text in enumerate(texts[:count], 1):
    columns.setdefault(text, []).append(str(i))
  lines = [f'{", ".join(held)}: {text}' for text, held in columns.items()]
  end = len(rows) * (tall + 2)
  across = left + count * (wide + 2)
  lines = [part for line in lines for part in _wrapped(
      line, font, max(across, _LEAST_ACROSS) - 2 * _MARGIN)]
  across = max([across, *(
      round(font.getlength(line)) + 2 * _MARGIN for line in lines)])
  canvas = Image.new('RGB', (across, end + len(lines) * _LINE), 'white')
  draw = ImageDraw.Draw(canvas)
  for i, line in enumerate(lines):
    draw.text((_MARGIN, end + i * _LINE + _LINE // 2), line, 'black', font,
              anchor='lm')
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


def _wrapped(line: str, font: ImageFont.ImageFont, width: int) -> list[str]:
  """Parts of a line that are no wider than `width` pixels, where words allow.
  """
  found = ['']
  for word in line.split():
    longer = f'{found[-1]} {word}'.strip()
    if found[-1] and font.getlength(longer) > width:
      found.append(word)
    else:
      found[-1] = longer
  return found
