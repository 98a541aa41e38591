"""A process of a run on several devices, for tests/test_mesh.py.

  python mesh_child.py JSON

JSON: `devices` of this process, `npz`, `changes` of the config, `workdir`,
`stop` ({module: step} in which it gets SIGTERM), `eval`: whether eval.py's run
follows.
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

from msfp_jax.run import cluster  # noqa: E402
from msfp_jax.run import evaluate  # noqa: E402
from msfp_jax.run import train  # noqa: E402


def main():
  config = runs.config_of(given['npz'], given['changes'])
  cluster.join(config)
  with pytest.MonkeyPatch.context() as patch:
    for module, step in given.get('stop', {}).items():
      runs.interrupt(
          patch, importlib.import_module(f'msfp_jax.tune.{module}'), step)
    train.run(config, given['workdir'])
  if given.get('eval'):
    evaluate.run(config, given['workdir'])
  print('devices', jax.device_count(), 'of', jax.process_count(), 'processes')


if __name__ == '__main__':
  main()
