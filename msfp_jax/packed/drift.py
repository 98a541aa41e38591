"""Drift: by how much a quantized model's predictions err on average.

Errors of inputs whose scales are from calibration are not noise alone: at one
step of the sampler most images err in the same direction, and colours and
contrast move. What all images share is a number a step and channel, is known
beforehand, and can be subtracted, which costs nothing (PTQD, He et al., NeurIPS
2023, arXiv 2305.10657, corrects the mean of the noise so).

    drift_i = mean eps_Q(x_i, t_i) - mean eps_FP(y_i, t_i)

Means are over images and pixels; y is full precision's trajectory from some
noise, and x the quantized model's from the same noise, its predictions
corrected at the steps before. So means of the two trajectories stay together,
where those of x would else drift apart. (PTQD has both predictions at one x,
and before the mean takes away what goes with the prediction, by a factor.)
"""

import dataclasses
import functools
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import arguments
from msfp_jax.base import devices
from msfp_jax.diffusion import sampling
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import placing
from msfp_jax.quant import batches as batches_lib
from msfp_jax.quant import interception


def correct_drift(packed: packed_lib.PackedModel, params: Any,
                  noise: jax.Array, *condition: jax.Array,
                  key: jax.Array | None = None,
                  layout: devices.Layout | None = None
                  ) -> packed_lib.PackedModel:
  """The model with its drift measured, which it then subtracts.

  Samples once in full precision and once from the model, all images at once.
  Files keep the correction. It is of this plan, and, where there are
  conditions, a mean over those given.

  Args:
    packed: what `pack` or `load` returned; a correction that it has is
      measured anew.
    params: of the model in full precision that it was made of.
    noise: `[B, H, W, C]`; 64 images serve.
    *condition: what else the model takes.
    key: of samplers that add noise; key 0 by default.
    layout: where weights and images lie; None: where they do.

  Raises:
    ValueError: parameters of another model, or noise that it does not take; a
      model with LoRAs; predictions that are NaN or infinite.
  """
  arguments.check_type('packed', packed, packed_lib.PackedModel,
                       'msfp.pack(...) or msfp.load(...)')
  if any(layer.adapter is not None for layer in packed.layers.values()):
    raise ValueError('the model has LoRAs, whose effect would be taken for an '
                     'error: correct model.with_loras([]), and add them then')
  noise = batches_lib.check_noise(noise)
  batches_lib.check_inputs(packed.model, noise, condition)
  params = interception.parameters(params)
  teacher = packed_lib.full_precision(packed.model, params, packed.plan)
  if odd := teacher.layers.keys() ^ packed.layers.keys():
    raise ValueError(f'params are of another model: layers {sorted(odd)} are '
                     'in one of them only')
  bare = dataclasses.replace(packed, drift=None)
  arrays, given = (teacher.arrays, bare.arrays), (noise, condition)
  if layout is not None:
    bare = placing.on_devices(bare, layout)
    arrays, given = layout.put(arrays), layout.put(given, layout.batch)
  logging.info('measuring the drift of predictions on %d images', len(noise))
  run = jax.jit(functools.partial(_measure, teacher, bare),
                compiler_options=kernels.compiler_options())
  found = devices.fetch(run(
      arrays, *given, jax.random.key(0) if key is None else key))
  if not np.isfinite(found).all():
    raise ValueError('the drift of predictions is NaN or infinite: the model '
                     'is damaged')
  # Machines of a run may differ in a last bit: all take the first one's.
  return dataclasses.replace(packed, drift=devices.agreed(found))


def _measure(teacher: packed_lib.PackedModel, packed: packed_lib.PackedModel,
             arrays: Any, noise: jax.Array, condition: tuple[jax.Array, ...],
             key: jax.Array) -> jax.Array:
  """The drift `[S, C]`, float32.

  Args:
    teacher: in full precision.
    packed: without correction.
    arrays: of both.
    noise: `[B, H, W, C]`.
    condition: what else they take.
    key: of the sampler's noise.
  """
  teacher, packed = (model.with_arrays(part) for model, part in zip(
      (teacher, packed), arrays, strict=True))
  plan = packed.plan
  _, means = diffusion.trajectory(
      teacher.eps_fn_of(*condition), plan, noise, key,
      lambda x, eps, step: _mean(eps))

  def body(position, step, predict):
    x = position.x
    eps = predict(x, jnp.full((len(x),), step['t']), step['index'])
    drift = _mean(eps) - means[step['index']]
    return sampling.advance(plan, step, position, eps - drift, key), drift

  return sampling.walk(body, packed.eps_fn_of(*condition), plan, noise,
                       packed.memory(noise, *condition))[1]


def _mean(eps: jax.Array) -> jax.Array:
  """Of every channel, float32."""
  return jnp.mean(eps.astype(jnp.float32), tuple(range(eps.ndim - 1)))
