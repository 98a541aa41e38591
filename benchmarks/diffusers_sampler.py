"""DDIM by PyTorch and diffusers, for comparison."""

from collections.abc import Callable, Mapping
import os
import pathlib
import sys

import diffusers
import numpy as np
import torch

from msfp_jax.models.unet import UNetConfig

# The oracle that the parity tests use.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))
import diffusers_oracle  # noqa: E402


def make(config: UNetConfig, state: Mapping[str, np.ndarray], num_steps: int,
         betas: Mapping[str, float]) -> Callable[[np.ndarray], np.ndarray]:
  """Makes diffusers' sampler, noise `[B, H, W, C]` -> samples, in float32."""
  torch.set_num_threads(os.cpu_count())
  model = diffusers_oracle.unet(config, state)
  scheduler = diffusers.DDIMScheduler(
      beta_schedule='linear', clip_sample=False, **betas)
  scheduler.set_timesteps(num_steps)

  @torch.no_grad()
  def run(x):
    x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    for t in scheduler.timesteps:
      x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x.permute(0, 2, 3, 1).contiguous().numpy()

  return run
