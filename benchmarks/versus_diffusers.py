"""Full-precision sampling speed against PyTorch and diffusers.

  make versus     # or: python -m benchmarks.versus_diffusers [--batch=32]

The CIFAR-10 UNet (35.7 million parameters, random weights) samples the same
batch by DDIM in both, in turn, in one process on the same cores; what counts is
the median of the pairs' ratios. Needs the environment of `make parity`.
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

from benchmarks import diffusers_sampler
from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

# The oracle that the parity tests use.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))
import unet_oracle  # noqa: E402

_BETAS = {'beta_start': 1e-4, 'beta_end': 0.02}
_BATCH = flags.DEFINE_integer('batch', 32, 'Images at once.')
_STEPS = flags.DEFINE_integer('steps', 4, 'Steps of a trajectory.')
_PAIRS = flags.DEFINE_integer('pairs', 5, 'Timed pairs.')


def sampler(config: UNetConfig, params):
  """Makes our sampler, noise `[B, H, W, C]` -> samples.

  With the options for XLA by which the package samples in full precision.
  """
  schedule = diffusion.make_schedule('linear', num_train_steps=1000, **_BETAS)
  plan = diffusion.make_plan(schedule, 'ddim', num_steps=_STEPS.value)
  model = UNet(config)
  run = jax.jit(lambda params, x: diffusion.sample(
      lambda x, t, step: model.apply({'params': params}, x, t), plan, x),
                compiler_options=kernels.compiler_options())
  return lambda x: np.asarray(run(params, x))


def main(unused_argv: Sequence[str]) -> None:
  config = UNetConfig(dropout=0.0)
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=0)
  x = np.random.default_rng(0).normal(
      size=(_BATCH.value, 32, 32, 3)).astype(np.float32)
  both = (sampler(config, unet_oracle.from_state_dict(config, state)),
          diffusers_sampler.make(config, state, _STEPS.value, _BETAS))
  error = unet_oracle.rel_l2(*(run(x) for run in both))
  pairs = []
  for _ in range(_PAIRS.value):
    times = []
    for run in both:
      start = time.perf_counter()
      run(x)
      times.append((time.perf_counter() - start)
                   / _BATCH.value / _STEPS.value)
    pairs.append(times)
  a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
  ratio = statistics.median(two / one for one, two in pairs)
  print(f'{os.cpu_count()} cores, batch {_BATCH.value}, {_STEPS.value} steps, '
        f'{_PAIRS.value} pairs, relative L2 {error:.1e}\n'
        '| seconds an image and step | ours | diffusers | speed-up |\n'
        '|---|---|---|---|\n'
        f'| CIFAR-10 UNet, float32 | {a:.4f} | {b:.4f} | {ratio:.2f}x |')


if __name__ == '__main__':
  app.run(main)
