"""One training and one evaluation, which serve most tests of this folder."""

import pathlib
import shutil

import numpy as np
import pytest
import runs

from msfp_jax.run import evaluate
from msfp_jax.run import train


@pytest.fixture(scope='session')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'smooth.npz'
  np.savez(path, runs.smooth(200, 8, 8, 1))
  return str(path)


@pytest.fixture(scope='session')
def trained(tmp_path_factory, npz):
  """The workdir of one training and evaluation, never changed by tests."""
  workdir = tmp_path_factory.mktemp('trained')
  train.run(runs.config_of(npz), str(workdir))
  evaluate.run(runs.config_of(npz), str(workdir))
  return workdir


@pytest.fixture(scope='session')
def reported(tmp_path_factory, trained, npz):
  """A copy of the trained workdir with report.html; never changed by tests."""
  workdir = tmp_path_factory.mktemp('reported') / 'run'
  shutil.copytree(trained, workdir)
  evaluate.run(runs.config_of(npz, {'eval.report': True}), str(workdir),
               'python eval.py --workdir=<run> & more')
  return workdir


@pytest.fixture
def copy(tmp_path, trained):
  """A copy of the trained workdir that a test may change."""
  return pathlib.Path(shutil.copytree(trained, tmp_path / 'copy'))
