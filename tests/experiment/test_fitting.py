"""A run that its device has no room for, and the flags that make it fit."""

import re

import pytest
import runs

from msfp_jax.base import errors
from msfp_jax.run import train

CHANGES = {'stage': 'pretrain', 'pretrain.num_steps': 3, 'pretrain.warmup': 0,
           'pretrain.batch_size': 64, 'pretrain.sample_every': 3,
           'pretrain.remat': 'blocks'}


@pytest.mark.long
def test_it_is_refused_before_it_begins_and_told_how_it_fits(tmp_path, npz):
  begin = lambda changes: train.run(
      runs.config_of(npz, CHANGES | changes), str(tmp_path / 'w'))
  with pytest.raises(errors.MemoryLackError) as caught:
    begin({'mesh.memory': 0.006})
  said = re.fullmatch(
      r'pretrain: a step needs ([\d.]+) GB of each device: [\d.]+ GB of '
      r'weights, state and data, [\d.]+ GB while it runs, and 0.006 GB are '
      r'there. It fits with (.*) \(([\d.]+) GB\); another limit is .*',
      str(caught.value))
  needed, flags, less = said.groups()
  assert float(needed) > 0.006 >= float(less)
  assert not list((tmp_path / 'w').glob('pretrain/checkpoints/*'))
  # The flags as they are printed, in the same workdir.
  given = dict(re.findall(r'--config\.(\S+)=(\S+)', flags))
  given['pretrain.accumulate'] = int(given['pretrain.accumulate'])
  begin({'mesh.memory': 0.006} | given)
  assert (tmp_path / 'w/pretrain/model.safetensors').is_file()
