"""A process of a run on several devices, for tests/test_mesh.py.

  python mesh_child.py JSON

JSON: `devices` of this process, `npz`, `changes` of the config, `workdir`,
`stop` ({module: step} in which it gets SIGTERM), `large`: the least size of
what is split over the axis `model`; `eval`: whether an evaluation follows.
Prints at its end how many arrays of a saved state were not whole on every
device.
"""

import importlib
import json
import sys

import jax
import pytest

given = json.loads(sys.argv[1])
jax.config.update('jax_num_cpu_devices', given['devices'])

# Only now: what follows may ask for devices.
import runs  # noqa: E402

from msfp_jax.base import devices  # noqa: E402
from msfp_jax.run import cli  # noqa: E402
from msfp_jax.run import cluster  # noqa: E402
from msfp_jax.run import evaluate  # noqa: E402
from msfp_jax.run import train  # noqa: E402
from msfp_jax.tune import checkpoint  # noqa: E402


def main():
  config = runs.config_of(given['npz'], given['changes'])
  cluster.join(config)
  split = []
  save = checkpoint.Checkpointer.save

  def noting(self, step, state):
    split.append(sum(not leaf.is_fully_replicated
                     for leaf in jax.tree.leaves(state)))
    save(self, step, state)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'save', noting)
    patch.setattr(devices, '_LARGE', given.get('large', devices._LARGE))
    for name, step in given.get('stop', {}).items():
      module = importlib.import_module(f'msfp_jax.tune.{name}')
      runs.interrupt(patch, module, step)
    cli.guard(lambda: train.run(config, given['workdir']))
  if given.get('eval'):
    cli.guard(lambda: evaluate.run(config, given['workdir']))
  print('devices', jax.device_count(), 'of', jax.process_count(), 'processes,',
        'arrays split', min(split, default=0), 'to', max(split, default=0))


if __name__ == '__main__':
  main()
