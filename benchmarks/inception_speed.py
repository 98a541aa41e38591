"""Speed of Inception's features on the CPU against torch-fidelity's network.

  make inception     # or: python -m benchmarks.inception_speed [--batch=32]

Both take the same uint8 images through the resize to the pool features, in
turn, in one process on the same cores, on random weights; what counts is the
median of the pairs' ratios. Needs the environment of `make parity`.
"""

from collections.abc import Sequence
import os
import pathlib
import statistics
import sys
import time

from absl import app
from absl import flags
import jax
import numpy as np
import torch

from msfp_jax.metrics import inception
from msfp_jax.metrics import inception_weights
from msfp_jax.metrics import preprocess

# The oracle that the parity tests use.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))
import inception_oracle  # noqa: E402
import unet_oracle  # noqa: E402

_BATCH = flags.DEFINE_integer('batch', 16, 'Images at once.')
_SIDE = flags.DEFINE_integer('side', 32, 'Pixels of an image, each way.')
_PAIRS = flags.DEFINE_integer('pairs', 5, 'Timed pairs.')


def ours(state):
  """Makes our network, uint8 images `[N, H, W, 3]` -> features `[N, 2048]`."""
  params = jax.device_put(inception_weights.fold(state))
  run = jax.jit(lambda params, images: inception.apply(
      params, preprocess.to_inception(images)).pool)
  return lambda images: np.asarray(run(params, images))


def theirs(state):
  """Makes torch-fidelity's network, called as ours."""
  model = inception_oracle.network(state, ['2048'])

  @torch.no_grad()
  def run(images):
    return model(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()

  return run


def main(unused_argv: Sequence[str]) -> None:
  cores = len(os.sched_getaffinity(0))
  torch.set_num_threads(cores)
  state = inception_oracle.random_state()
  images = inception_oracle.random_images(
      (_BATCH.value, _SIDE.value, _SIDE.value, 3))
  both = ours(state), theirs(state)
  error = unet_oracle.rel_l2(*(run(images) for run in both))
  pairs = []
  for _ in range(_PAIRS.value):
    times = []
    for run in both:
      start = time.perf_counter()
      run(images)
      times.append((time.perf_counter() - start) / _BATCH.value)
    pairs.append(times)
  a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
  ratios = [two / one for one, two in pairs]
  print(f'{cores} cores, batch {_BATCH.value}, {_PAIRS.value} pairs, relative '
        f'L2 {error:.1e}, ratios {min(ratios):.2f} to {max(ratios):.2f}\n'
        '| milliseconds an image | ours | torch-fidelity | speed-up |\n'
        '|---|---|---|---|\n'
        f'| Inception, {_SIDE.value} x {_SIDE.value}, float32 | {1e3 * a:.0f} '
        f'| {1e3 * b:.0f} | {statistics.median(ratios):.2f}x |')


if __name__ == '__main__':
  app.run(main)
