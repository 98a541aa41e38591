"""What is kept off the terminal, and what is not."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest

from msfp_jax.base import quiet

TPU = "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so"
BRIDGE = 'jax._src.xla_bridge'


def shown(message, name=BRIDGE, level=logging.INFO, path='xla_bridge.py',
          raised=None):
  return quiet.worth_showing(
      logging.LogRecord(name, level, path, 1, '%s', (message,), raised))


@pytest.mark.parametrize('installed', [False, True])
def test_a_missing_libtpu_is_told_to_those_who_have_installed_one(
    monkeypatch, installed):
  find = importlib.util.find_spec
  monkeypatch.setattr(
      quiet.importlib.util, 'find_spec',
      lambda name: installed or None if name == 'libtpu' else find(name))
  assert shown(TPU) == installed
  # Nothing else of JAX's is hidden, nor a warning.
  assert shown("Unable to initialize backend 'cuda': no driver")
  assert shown(TPU, level=logging.WARNING)
  assert shown(TPU, name='absl')


def test_remote_devices_are_missed_by_those_who_named_some():
  """JAX 0.12 looks for its backend `proxy` unless platforms are named."""
  line = "Unable to initialize backend 'proxy': "
  assert not shown(
      f"{line}The 'proxy' backend requires the address of an IFRT Proxy server")
  assert shown(f'{line}UNAVAILABLE: no answer from grpc://localhost:29000')


def test_what_orbax_does_is_hidden_but_not_what_went_wrong():
  path = 'site-packages/orbax/checkpoint.py'
  assert not shown('wrote', name='absl', path=path)
  assert shown('cannot write', name='absl', path=path, level=logging.WARNING)
  # What it raises as well, with a traceback from every thread of it.
  raised = OSError, OSError('full'), None
  for of, expected in ((path, False), ('ours.py', True)):
    assert shown('cannot write', name='absl', path=of, level=logging.ERROR,
                 raised=raised) == expected


# XLA evaluates a sum over windows of constants by itself, and slowly.
SLOW = '''
import msfp_jax, jax
jax.jit(lambda: jax.lax.reduce_window(
    jax.numpy.ones((150, 150)), 0., jax.lax.add, (13, 13), (1, 1), 'SAME')
        ).lower().compile()
'''


@pytest.mark.long
@pytest.mark.parametrize('environment, alarms', [
    ({}, False), ({'MSFP_TRACEBACK': '1'}, True)], ids=str)
def test_alarms_of_slow_compilation_are_hidden(environment, alarms):
  inherited = {key: value for key, value in os.environ.items()
               if key not in ('TF_CPP_MIN_LOG_LEVEL', 'MSFP_TRACEBACK')}
  finished = subprocess.run(
      [sys.executable, '-c', SLOW], text=True, capture_output=True,
      timeout=300, check=True,
      # What is kept from another run would not be compiled.
      env=inherited | {'JAX_PLATFORMS': 'cpu',
                       'JAX_ENABLE_COMPILATION_CACHE': 'false'} | environment)
  assert ('slow_operation_alarm' in finished.stderr) == alarms
