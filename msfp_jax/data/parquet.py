"""Images in parquet files, as dataset hubs keep them."""

import io
import pathlib

import numpy as np
from PIL import Image


def read(path: str) -> np.ndarray:
  """Images of one size, uint8 `[N, H, W, C]`.

  Args:
    path: a .parquet file, or a folder of them, taken in the order of names.
      The column is the first that holds encoded images: bytes, or records
      with a field `bytes`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no such column, images of several sizes, or no pyarrow, which
      only this needs.
  """
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError('parquet files need pyarrow, which is not installed: '
                     'pip install pyarrow') from error
  root = pathlib.Path(path).expanduser()
  files = sorted(root.rglob('*.parquet')) if root.is_dir() else [root]
  if not files or not files[0].is_file():
    raise FileNotFoundError(f'no .parquet at {root}')
  images = []
  for file in files:
    table = parquet.ParquetFile(file)
    name = _image_column(file, table.schema_arrow)
    for batch in table.iter_batches(columns=[name]):
      for value in batch.column(0).to_pylist():
        encoded = value['bytes'] if isinstance(value, dict) else value
        with Image.open(io.BytesIO(encoded)) as image:
          images.append(np.asarray(image.convert('RGB')))
        if images[-1].shape != images[0].shape:
          raise ValueError(f'{file}: image {len(images) - 1} is '
                           f'{images[-1].shape}, the first {images[0].shape}')
  return np.stack(images)


def _image_column(file, schema):
  for field in schema:
    kind = str(field.type)
    if kind in ('binary', 'large_binary') or 'bytes: binary' in kind:
      return field.name
  raise ValueError(f'{file} has no column of encoded images, only '
                   f'{schema.names}')
