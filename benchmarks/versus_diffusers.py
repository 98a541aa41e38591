"""Full-precision sampling speed against PyTorch and diffusers.

  make versus     # or: python -m benchmarks.versus_diffusers [--batch=32]

The CIFAR-10 UNet (35.7 million parameters, random weights) predicts the noise
of the same batch in both, in turn, in one process on the same cores; what
counts is the median of the pairs' ratios. Needs the environment of `make
parity`.
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
import jax.numpy as jnp
import numpy as np
import torch

from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

# The oracle that the parity tests use.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))
import diffusers_oracle  # noqa: E402
import unet_oracle  # noqa: E402

_BATCH = flags.DEFINE_integer('batch', 32, 'Images at once.')
_PAIRS = flags.DEFINE_integer('pairs', 10, 'Timed pairs.')


def main(unused_argv: Sequence[str]) -> None:
  torch.set_num_threads(os.cpu_count())
  config = UNetConfig(dropout=0.0)
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=0)
  params = unet_oracle.from_state_dict(config, state)
  x = np.random.default_rng(0).normal(
      size=(_BATCH.value, 32, 32, 3)).astype(np.float32)
  t = np.full(_BATCH.value, 500)
  ours = jax.jit(UNet(config).apply)
  theirs = diffusers_oracle.unet(config, state)
  image, step = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)

  def run_ours():
    return np.asarray(ours({'params': params}, jnp.asarray(x), jnp.asarray(t)))

  @torch.no_grad()
  def run_theirs():
    return theirs(image, step).sample.permute(0, 2, 3, 1).numpy()

  error = unet_oracle.rel_l2(run_ours(), run_theirs())
  pairs = []
  for _ in range(_PAIRS.value):
    times = []
    for run in (run_ours, run_theirs):
      start = time.perf_counter()
      run()
      times.append((time.perf_counter() - start) / _BATCH.value)
    pairs.append(times)
  a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
  ratio = statistics.median(two / one for one, two in pairs)
  print(f'{os.cpu_count()} cores, batch {_BATCH.value}, {_PAIRS.value} pairs, '
        f'relative L2 {error:.1e}\n'
        '| seconds an image and step | ours | diffusers | speed-up |\n'
        '|---|---|---|---|\n'
        f'| CIFAR-10 UNet, float32 | {a:.4f} | {b:.4f} | {ratio:.2f}x |')


if __name__ == '__main__':
  app.run(main)
