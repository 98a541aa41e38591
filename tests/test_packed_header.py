"""Headers of packed files that were written to do harm, or by mistake.

Found by changing them at random (benchmarks/fuzz.py); without a digest, which
would refuse all of them.
"""

import pathlib
import shutil
import time

from packed_files import rewrite
from packed_files import row_of
import pytest
import toy

from msfp_jax.packed import file as packed_file

GOLDEN = pathlib.Path(__file__).parent / 'golden'
STREAM = 'conv_out'  # of 3 bits, whose row has the shape of its codes


def change(name, *place, value):
  """Sets one value of a layer's row."""
  def set_value(header):
    part = row_of(header, name)
    for key in place[:-1]:
      part = part[key]
    part[place[-1]] = value

  return set_value


@pytest.mark.parametrize('changes, said', [
    (change('conv_in', 4, 1, value=1e300), 'of an input'),
    (change('conv_in', 4, 2, value=-1e300), 'of an input'),
    (change('conv_in', 4, 1, value=1e39), 'of an input'),
    # Codes of more bytes than there are, which would be made of zeros.
    (change(STREAM, 5, value={'shape': [1, 2**31, 4, 1]}), 'codes, in a file'),
    (change(STREAM, 5, value={'shape': [2**40, 3, 3, 2**40, 4, 1]}),
     'codes, in a file'),
    (change(STREAM, 5, value={'shape': [-1, -3, 4, 1]}), 'of shape'),
    (change('conv_in', 2, value=2**60), 'codes, in a file'),
    (change('conv_in', 2, value=-1), 'codes, in a file'),
    (change('conv_in', 2, value=1.5), 'codes, in a file'),
    (change('conv_in', 2, value='1'), 'codes, in a file')])
def test_sizes_and_scales_that_cannot_be(tmp_path, changes, said):
  path = tmp_path / 'p.safetensors'
  packed_file.save(path, toy.deployed().packed())
  rewrite(path, change_header=changes)
  start = time.monotonic()
  with pytest.raises(ValueError, match=f'p.safetensors: .*{said}'):
    packed_file.load(path, model=toy.Toy())
  assert time.monotonic() - start < 2


@pytest.mark.parametrize('changes', [
    {'ch': 'x'}, {'in_channels': 1.5}, {'norm_groups': 0},
    {'out_channels': -1}, {'in_channels': 10**30}])
def test_sizes_that_no_model_has(tmp_path, changes):
  path = pathlib.Path(shutil.copy(GOLDEN / 'packed_1.safetensors', tmp_path))
  rewrite(path, change_header=lambda header: header['model']['unet'].update(
      changes))
  with pytest.raises(ValueError, match='packed_1.safetensors'):
    packed_file.load(path)


@pytest.mark.parametrize('channels', [10**10, 10**30])
def test_a_drift_of_more_channels_than_memory_holds(tmp_path, channels):
  path = pathlib.Path(shutil.copy(GOLDEN / 'packed_1.safetensors', tmp_path))

  def change(header):
    # Of version 4, which has a drift, with rows as those of version 2.
    header['format'] = 'msfp-jax/packed/4'
    header['model']['unet']['in_channels'] = channels
    header['layers'] = [[*row[:4], row[4:]] for row in header['layers']]

  rewrite(path, change_header=change)
  start = time.monotonic()
  with pytest.raises(ValueError, match='packed_1.safetensors'):
    packed_file.load(path)
  assert time.monotonic() - start < 2
