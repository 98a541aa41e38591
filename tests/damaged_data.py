"""Small files of images, tokenizers, prompts and statistics, and readers."""

import io

import cifar_files
from damage import Kind
import numpy as np
from PIL import Image
import text_files

from msfp_jax import data
from msfp_jax.data import cifar10
from msfp_jax.metrics import stats_file
from msfp_jax.text import prompts
from msfp_jax.text import tokenizer

RNG = np.random.default_rng(0)


def write_tokenizer(file, make, **options):
  def write(folder):
    make(folder, **options)
    return folder / file

  return write


def write_fast(folder):
  text_files.write_clip(folder)
  tokenizer.load_tokenizer(folder).backend.save(str(folder / 'tokenizer.json'))
  return folder / 'tokenizer.json'


def tokens(path):
  made = tokenizer.load_tokenizer(path.parent, 20)
  return made(['a cat, on a mat', '', '1234 it’s'])._asdict() | {
      'kind': made.kind}


def write_prompts(folder):
  (folder / 'p.jsonl').write_text(
      '{"prompt": "a cat", "seed": 3}\n'
      '{"prompt": "été", "negative_prompt": "rain"}\n', encoding='utf-8')
  return folder / 'p.jsonl'


def write_lines(folder):
  (folder / 'p.txt').write_text('a cat\nété\na dog\n', encoding='utf-8')
  return folder / 'p.txt'


def write_images(suffix, **options):
  def write(folder):
    for name in 'ab':
      Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).save(
          folder / f'{name}{suffix}', **options)
    return folder / f'b{suffix}'

  return write


def images(path):
  return np.asarray(data.load('images', str(
      path if path.suffix == '.npz' else path.parent))[:])


def write_npz(folder):
  np.savez_compressed(folder / 'i.npz', images=RNG.integers(
      0, 256, (3, 5, 6, 3), np.uint8))
  return folder / 'i.npz'


def write_parquet(folder):
  import pyarrow as arrow
  from pyarrow import parquet
  rows = []
  for image in RNG.integers(0, 256, (4, 5, 6, 3), np.uint8):
    out = io.BytesIO()
    Image.fromarray(image).save(out, 'PNG')
    rows.append({'bytes': out.getvalue(), 'path': ''})
  parquet.write_table(arrow.table({'label': [0, 1, 2, 3], 'img': rows}),
                      folder / 'i.parquet', row_group_size=2)
  return folder / 'i.parquet'


_BATCHES = 4  # images of a small file of CIFAR-10


def write_cifar(write, name):
  def write_small(folder):
    planes = RNG.integers(0, 256, (5, _BATCHES, 3, 32, 32), np.uint8)
    write(folder, planes)
    return folder / name

  return write_small


def cifar(path):
  full, cifar10._IMAGES = cifar10._IMAGES, _BATCHES
  try:
    return data.load('cifar10', str(path.parent))
  finally:
    cifar10._IMAGES = full


def stats(path):
  pool, spatial, provenance, vectors = stats_file.load(path)
  return [None if one is None else (one.mean, one.cov, one.num_samples)
          for one in (pool, spatial)], provenance, vectors


def write_their_stats(folder):
  np.savez(folder / 't.npz', mu=np.arange(3.0), sigma=np.eye(3))
  return folder / 't.npz'


DATA = {
    'statistics of others': Kind(write_their_stats, stats),
    **{f"CLIP's {file}": Kind(write_tokenizer(
        file, text_files.write_clip, form=form), tokens)
       for file, form in (
           ('vocab.json', 'old'), ('merges.txt', 'old'),
           ('special_tokens_map.json', 'old'),
           ('tokenizer_config.json', 'new'))},
    'tokenizer.json': Kind(write_fast, tokens),
    'spiece.model': Kind(
        write_tokenizer('spiece.model', text_files.write_t5), tokens),
    'prompts': Kind(write_prompts, prompts.read_prompts,
                    build=lambda found: None),
    'lines': Kind(write_lines, prompts.read_prompts, build=lambda found: None),
    'PNG': Kind(write_images('.png'), images),
    'JPEG': Kind(write_images('.jpg', quality=90), images),
    'TIFF': Kind(write_images('.tif'), images),
    'images, npz': Kind(write_npz, images),
    'parquet': Kind(write_parquet, lambda path: data.load(
        'parquet', str(path))[:]),
    'CIFAR-10': Kind(write_cifar(
        cifar_files.write_binary, 'data_batch_2.bin'), cifar),
    'CIFAR-10, Python 2': Kind(write_cifar(
        cifar_files.write_python2, 'data_batch_2'), cifar),
    'CIFAR-10, Python 3': Kind(write_cifar(
        cifar_files.write_python3, 'data_batch_2'), cifar),
}
