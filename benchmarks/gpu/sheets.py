"""Images as lossless WebP sheets, half the size of an .npz, for an upload.

  python -m benchmarks.gpu.sheets cifar10:cifar-10-batches-bin 20000 sheets

writes a random choice of that many into a folder. 20,000 of CIFAR-10's have
some 30 MB.
"""

import math
import pathlib

from absl import app
import numpy as np
from PIL import Image

COLUMNS, ROWS = 40, 25  # of a sheet


def pack(images: np.ndarray, folder: pathlib.Path) -> None:
  """Writes uint8 images `[N, H, W, 3]` into sheets.

  Raises:
    ValueError: images of other channels.
  """
  if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
    raise ValueError(f'sheets hold uint8 [N, H, W, 3], got {images.dtype} '
                     f'{images.shape}')
  folder.mkdir(parents=True, exist_ok=True)
  _, height, width, _ = images.shape
  size = COLUMNS * ROWS
  for number in range(math.ceil(len(images) / size)):
    part = images[number * size:(number + 1) * size]
    sheet = np.zeros((size, height, width, 3), np.uint8)
    sheet[:len(part)] = part
    sheet = sheet.reshape(ROWS, COLUMNS, height, width, 3).transpose(
        0, 2, 1, 3, 4).reshape(ROWS * height, COLUMNS * width, 3)
    Image.fromarray(sheet).save(
        folder / f'{number:03d}_{len(part)}.webp', lossless=True, quality=100,
        method=6)


def unpack(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the images of sheets to an .npz, as data set 'images' reads it.

  Raises:
    FileNotFoundError: there are no sheets.
  """
  found = []
  for file in sorted(folder.glob('*_*.webp')):
    sheet = np.asarray(Image.open(file).convert('RGB'))
    height, width = sheet.shape[0] // ROWS, sheet.shape[1] // COLUMNS
    found.append(sheet.reshape(ROWS, height, COLUMNS, width, 3).transpose(
        0, 2, 1, 3, 4).reshape(-1, height, width, 3)[
            :int(file.stem.split('_')[1])])
  if not found:
    raise FileNotFoundError(f'no sheets in {folder}')
  np.savez(path, images=np.concatenate(found))


def main(argv: list[str]) -> None:
  from msfp_jax import data
  if len(argv) != 4:
    raise app.UsageError('give NAME:PATH, how many, and a folder')
  _, source, count, folder = argv
  name, _, path = source.partition(':')
  images = data.load(name, path)
  chosen = np.random.default_rng(0).permutation(len(images))[:int(count)]
  # In their order, as similar ones then stand together.
  pack(np.asarray(images[np.sort(chosen)]), pathlib.Path(folder))


if __name__ == '__main__':
  app.run(main)
