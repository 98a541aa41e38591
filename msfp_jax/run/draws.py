"""Samples of an experiment from one model, in memory or in a store."""

import numpy as np

from msfp_jax.base import devices
from msfp_jax.base import progress as progress_lib
from msfp_jax.packed import model as packed_lib
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import generate
from msfp_jax.run import sample_store


def drawer(experiment: experiment_lib.Experiment, batch_size: int,
           deployed: packed_lib.PackedModel) -> generate.Drawer:
  """Draws samples of an experiment from one model."""
  return generate.Drawer(
      deployed, experiment.plan, batch_size, experiment.sample_shape,
      experiment.draw_condition, experiment.prompts, experiment.layout)


def draw(experiment: experiment_lib.Experiment, num_samples: int,
         drawer: generate.Drawer, name: str) -> np.ndarray:
  """Samples, all in memory; every model starts from the same noise."""
  return generate.generate(
      drawer, num_samples, experiment.key(experiment_lib.SAMPLES), name,
      decode=experiment.decode)


def fill(experiment: experiment_lib.Experiment, drawer: generate.Drawer,
         samples: sample_store.SampleStore, name: str) -> None:
  """Draws those batches of samples that a store lacks."""
  size, total = drawer.batch_size, len(samples)
  # What the first process sees on the disk: all draw the same batches, each its
  # part of them.
  lacks = np.zeros(generate.num_batches(total, size), bool)
  lacks[samples.missing] = True
  missing = np.flatnonzero(devices.agreed(lacks)).tolist()
  # The same key for every model: image i of all rows starts from one noise.
  batches = generate.batches(
      drawer, missing, experiment.key(experiment_lib.SAMPLES), name,
      decode=experiment.decode)
  # Progress counts what an earlier run drew.
  done = generate.num_batches(total, size) - len(missing)
  progress = progress_lib.Progress(
      name, total, min(done * size, total), unit='images', compiles=True)
  for number, batch in zip(missing, batches, strict=True):
    if devices.is_first():
      samples.write(number, batch)
    done += 1
    progress.update(min(done * size, total))
  devices.wait('the samples are written')
