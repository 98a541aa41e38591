"""The model that benchmarks/packed.py measures, in all the ways it runs."""

from collections.abc import Callable
import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import calibrate

# The oracle that the parity tests use.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))
import unet_oracle  # noqa: E402

# Full precision as the package samples by it.
BEST = "float32 with the package's options"
BETAS = {'beta_start': 1e-4, 'beta_end': 0.02}


@dataclasses.dataclass(frozen=True)
class Subject:
  """The CIFAR-10 UNet of 35.7 million random weights, calibrated by MSFP.

  Attributes:
    state: its weights under PyTorch's names.
    params: the same for Flax.
    simulated: its simulation.
    packed: the same, packed.
    spec: what calibration found.
  """

  state: dict[str, np.ndarray]
  params: Any
  simulated: packed_lib.PackedModel
  packed: packed_lib.PackedModel
  spec: spec_lib.QuantSpec


CONFIG = UNetConfig(dropout=0.0)


def make(num_steps: int, spec: spec_lib.QuantSpec | None = None) -> Subject:
  """Calibrates on one image: only time and agreement are measured.

  Args:
    num_steps: of the sampler.
    spec: of an earlier call, in place of calibrating.
  """
  model = UNet(CONFIG)
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(CONFIG), seed=0)
  params = unet_oracle.from_state_dict(CONFIG, state)
  schedule = diffusion.make_schedule('linear', num_train_steps=1000, **BETAS)
  plan = diffusion.make_plan(schedule, 'ddim', num_steps=num_steps)
  spec = spec or calibrate(
      model, params, recipe='msfp', bits=4, plan=plan,
      batches=[jax.random.normal(jax.random.key(0), (1, *shape()))])
  simulated = packed_lib.simulate(model, params, spec, plan)
  return Subject(state, params, simulated, simulated.packed(), spec)


def shape() -> tuple[int, ...]:
  """The shape of an image."""
  return (CONFIG.image_size, CONFIG.image_size, CONFIG.in_channels)


def inputs(batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """The shapes of x and t."""
  return (jax.ShapeDtypeStruct((batch, *shape()), jnp.float32),
          jax.ShapeDtypeStruct((batch,), jnp.float32))


def full_precision(subject: Subject) -> Callable[..., Any]:
  """(parameters of any dtype, noise) -> samples, by the model as it is."""
  plan, model = subject.packed.plan, subject.packed.model

  def run(params, x):
    # The sampler's own sums are in float32 always.
    dtype = jax.tree.leaves(params)[0].dtype
    return diffusion.sample(
        lambda x, t, index: model.apply(
            {'params': params}, x.astype(dtype), t).astype(jnp.float32),
        plan, x)

  return run


def samplers(subject: Subject) -> dict[str, tuple[Callable[..., Any], int]]:
  """The samplers, {name: (noise -> samples, bytes of the weights)}."""
  plan, run = subject.packed.plan, full_precision(subject)
  sample = jax.jit(run)
  best = jax.jit(
      run, compiler_options=kernels.compiler_options())
  simulate = jax.jit(lambda arrays, x: diffusion.sample(
      lambda x, t, index: subject.simulated.with_arrays(arrays).eps_fn(
          x, t, index), plan, x),
                     compiler_options=kernels.compiler_options())
  halves = jax.tree.map(lambda w: w.astype(jnp.bfloat16), subject.params)
  size = sum(w.nbytes for w in jax.tree.leaves(subject.params))
  return {
      'float32': (lambda x: sample(subject.params, x), size),
      BEST: (lambda x: best(subject.params, x), size),
      'bfloat16': (lambda x: sample(halves, x), size // 2),
      'simulated': (lambda x: simulate(subject.simulated.arrays, x), size),
      'packed': (subject.packed.sample, subject.packed.memory_bytes),
  }
