"""Small files of our own, and their readers."""

import dataclasses
import json
import pathlib
import shutil
from unittest import mock

from damage import Kind
from damaged_checkpoints import params_of
from damaged_checkpoints import pretrained
from damaged_data import stats
import jax
import numpy as np
import toy

from configs import common
from msfp_jax import convert
from msfp_jax.base import files
from msfp_jax.base import journal
from msfp_jax.base import seal
from msfp_jax.base import writer
from msfp_jax.convert import native
from msfp_jax.convert import piecewise
from msfp_jax.convert import source
from msfp_jax.diffusion.origin import Origin
from msfp_jax.metrics import digits_classifier
from msfp_jax.metrics import frechet
from msfp_jax.metrics import lpips
from msfp_jax.metrics import stats_file
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.packed import file as packed_file
from msfp_jax.quant.spec import QuantSpec
from msfp_jax.run import sample_store
from msfp_jax.run import workdir
from msfp_jax.text import embeddings

GOLDEN = pathlib.Path(__file__).parent / 'golden'
RNG = np.random.default_rng(0)


def write_embeddings(folder):
  embeddings.save_embeddings(folder / 'e.npz', embeddings.Embeddings(
      'flux', {'text': np.ones((2, 3, 4), np.float32),
               'pooled': np.ones((2, 5), np.float32)}))
  return folder / 'e.npz'


def write_packed(folder):
  model = dataclasses.replace(
      toy.deployed(), drift=np.full((2, 1), 0.25, np.float32))
  packed_file.save(folder / 'p.safetensors', model.packed())
  return folder / 'p.safetensors'


def packed(path, model=None):
  found = packed_file.load(path, model=model)
  return {'params': found.params, 'choices': found.choices,
          'drift': found.drift,
          'arrays': found.arrays, 'plan': found.plan.to_dict(),
          'layers': {name: str(layer.input.fmt if hasattr(
              layer.input, 'fmt') else '') for name, layer
                     in found.layers.items()}}


def copied(name):
  def write(folder):
    return pathlib.Path(shutil.copy(GOLDEN / name, folder))

  return write


def write_spec(folder):
  toy.spec().save(folder / 's.json')
  return folder / 's.json'


def write_native(folder):
  config = UNetConfig(
      image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1,),
      num_res_blocks=0, attn_resolutions=(), norm_groups=4, dropout=0.0)
  params = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32),
                        native.abstract_params(UNet(config)))
  native.save_pretrained(folder / 'n.safetensors', UNet(config), params,
                         Origin('a', {'name': 'linear', 'beta_end': 0.02}))
  return folder / 'n.safetensors'


def write_stats(folder):
  gaussian = lambda size: frechet.Gaussian(
      RNG.standard_normal(size), np.eye(size), 7)
  stats_file.save(folder / 's.npz', stats_file.Reference(
      gaussian(4), gaussian(3), {'features': 'digits'},
      np.float32(RNG.standard_normal((5, 4)))))
  return folder / 's.npz'


def write_shipped(file):
  return lambda folder: pathlib.Path(shutil.copy(file, folder))


def shipped(path):
  with mock.patch.dict(native.SHIPPED, digits16=path):
    return pretrained('digits16')


def classifier(path):
  with mock.patch.object(digits_classifier, 'WEIGHTS', path):
    return digits_classifier.load(path)[0]


def linear(path):
  shapes = lpips.TRUNKS['alex'].state_shapes
  with mock.patch.object(lpips, 'LINEAR', path):
    return lpips.params_of('alex', {
        name: np.zeros(shape, np.float32)
        for name, shape in shapes.items()})['linear']


# Files of runs.


def write_journal(folder):
  with journal.Journal(folder / 'j.jsonl', {'job': 1}, 'begin anew') as opened:
    for i in range(4):
      opened.add({'piece': i})
  return folder / 'j.jsonl'


def entries(path):
  """Goes on with what is done, which are the lines before the damage."""
  content = path.read_bytes()
  try:
    with journal.Journal(path, {'job': 1}, 'begin anew') as opened:
      for i in range(len(opened.entries), 4):
        opened.add({'piece': i})
      return list(opened.entries)
  finally:
    path.write_bytes(content)


_PIECES = {'a': np.arange(5, dtype=np.uint8),
           'b': np.arange(6, dtype=np.float32).reshape(2, 3),
           'shared': np.arange(7, dtype=np.float32)}


def in_pieces(folder):
  return piecewise.PiecewiseFile(
      folder / 'f.safetensors', folder / 'work', {'format': 'x'}, _PIECES,
      {'job': 1})


def write_pieces(name):
  def write(folder):
    with in_pieces(folder) as file:
      file.write('1', {'a': _PIECES['a']}, {('shared', 0): _PIECES['shared'][
          :4]})
    # For the reader, which goes on with it, to begin from.
    shutil.copytree(folder / 'work', folder / 'begun')
    return folder / 'work' / name

  return write


def pieces(path):
  """Goes on with a file in pieces, and reads what comes of it."""
  damaged, folder = path.read_bytes(), path.parents[1]
  begun = folder / 'begun'
  shutil.rmtree(folder / 'work')
  shutil.copytree(begun, folder / 'work')
  path.write_bytes(damaged)
  (folder / 'f.safetensors').unlink(missing_ok=True)
  try:
    with in_pieces(folder) as file:
      if '1' not in file.done:
        file.write('1', {'a': _PIECES['a']},
                   {('shared', 0): _PIECES['shared'][:4]})
      file.write('2', {'b': _PIECES['b']},
                 {('shared', 4): _PIECES['shared'][4:]})
      file.finish()
    tensors, metadata = source.read_safetensors(folder / 'f.safetensors')
    native.check_seal(folder / 'f.safetensors', tensors, metadata, 'again')
    return {name: tensor.read() for name, tensor in tensors.items()}
  finally:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged)


def write_metrics(folder):
  (folder / 'metrics.jsonl').write_text(''.join(
      f'{{"step": {i}, "loss": {i / 7}}}\n' for i in range(5)))
  return folder / 'metrics.jsonl'


def metrics(path):
  content = path.read_bytes()
  try:
    with writer.MetricWriter(path.parent) as opened:
      opened.truncate_after(3)
    return [sorted(json.loads(line)) for line in path.read_text(
        errors='surrogateescape').splitlines()]
  finally:
    path.write_bytes(content)


def write_config(folder):
  config = common.get_config()
  (folder / 'spec.json').write_text('')  # what makes it somebody's
  files.write_json(folder / 'config.json', workdir.check(
      config, str(folder), taken={'schedule': {'name': 'linear'}}))
  return folder / 'config.json'


def claimed(path):
  new = workdir.check(common.get_config(), str(path.parent), taken={
      'schedule': {'name': 'linear'}})
  return {key: value for key, value in new.items() if key != 'eval'}


def write_samples(folder):
  store = sample_store.SampleStore(folder, 5, 3, (4, 4, 1))
  for i in range(2):
    store.write(i, RNG.integers(0, 256, (3, 4, 4, 1), np.uint8))
  return folder / '000001.uint8'


def samples(path):
  return sample_store.SampleStore(path.parent, 5, 3, (4, 4, 1))[:]


def write_claim(folder):
  sample_store.claim(folder, {'num_samples': 5, 'plan': [1, 2]}, {'keep': ''})
  return folder / 'samples.json'


def claim(path):
  content = path.read_bytes()
  sample_store.claim(path.parent, {'num_samples': 5, 'plan': [1, 2]},
                     {'keep': ''})
  found = json.loads(path.read_text())
  path.write_bytes(content)
  return found


def write_row(folder):
  seal.write_json(folder / 'msfp.row.json', {
      'name': 'msfp', 'fid': 3.25, 'layer_error': {'conv_in': 30.5}})
  return folder / 'msfp.row.json'


def row(path):
  return seal.read_json(path, 'delete it')


OURS = {
    'packed': Kind(write_packed, lambda path: packed(path, toy.Toy()), True),
    'packed of version 1': Kind(
        copied('packed_1.safetensors'), packed, build=params_of),
    'spec': Kind(write_spec, lambda path: QuantSpec.load(path).to_json(), True),
    'spec of version 1': Kind(
        copied('spec_1.json'), lambda path: QuantSpec.load(path).to_json()),
    'teacher': Kind(write_native, pretrained, True),
    'origin': Kind(write_native, lambda path: convert.load_origin(
        str(path)).to_json(), True),
    'statistics': Kind(write_stats, stats, True),
    'embeddings': Kind(write_embeddings, embeddings.load_embeddings, True),
    'shipped model': Kind(
        write_shipped(native.SHIPPED['digits16']), shipped, True),
    "shipped digits' classifier": Kind(
        write_shipped(digits_classifier.WEIGHTS), classifier, True),
    'shipped weights of LPIPS': Kind(write_shipped(lpips.LINEAR), linear, True),
    'journal': Kind(write_journal, entries, True),
    'file in pieces, its journal': Kind(
        write_pieces('journal.jsonl'), pieces, True),
    'file in pieces, its data': Kind(write_pieces('data'), pieces, True),
    'metrics': Kind(write_metrics, metrics, build=lambda found: None),
    'config.json': Kind(write_config, claimed, True),
    'samples': Kind(write_samples, samples),
    'claim of samples': Kind(write_claim, claim, True),
    'finished row': Kind(write_row, row, True),
}
