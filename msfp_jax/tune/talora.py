"""TALoRA: banks of updates, of low rank, and a router that picks by timestep.

A layer's weight at timestep t is Q_w(W + sum_i r_i A_i B_i), with r the
router's choice among the layer's h banks: banks are merged before
quantization, so inference costs h packed weight sets and no extra matmul.

Source: arXiv 2505.21591, section on TALoRA; what it leaves open is listed in
docs/method.md.
"""

from collections.abc import Mapping
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import timestep

# Timesteps that the embedding was made for (Ho et al. 2020).
_EMBEDDED_STEPS = 1000
# {layer: {'a': [h, ..., rank], 'b': [h, rank, out]}}; of rank 0
# {layer: {'offset': [h, ..., out]}}
Banks = dict[str, dict[str, jax.Array]]


def init_banks(key: jax.Array, kernels: Mapping[str, jax.Array],
               num_banks: int, rank: int) -> Banks:
  """Banks of zero effect.

  Of LoRA's products a is uniform (Kaiming, a = sqrt 5) and b 0; offsets are 0.

  Args:
    key: of a.
    kernels: {layer: `[..., in, out]`} of the layers that get banks.
    num_banks: h >= 1, of every layer.
    rank: of the updates; at most as much of a layer as its kernel has. 0: an
      offset of every weight, by which training decides on each where it is
      rounded to.
  """
  if num_banks < 1 or rank < 0:
    raise ValueError(f'num_banks={num_banks}, rank={rank}: must be >= 1, or 0 '
                     'of rank')
  banks = {}
  for i, (name, kernel) in enumerate(kernels.items()):
    *axes, out = kernel.shape
    if not rank:
      banks[name] = {'offset': jnp.zeros((num_banks, *kernel.shape))}
      continue
    # A convolution's kernel [kh, kw, I, O] counts as a matrix [kh kw I, O]: a
    # has its window, b is 1x1. Few channels bound the rank of any matrix.
    fan_in = math.prod(axes)
    width = min(rank, fan_in, out)
    bound = 1 / math.sqrt(fan_in)
    a = jax.random.uniform(jax.random.fold_in(key, i),
                           (num_banks, *axes, width), minval=-bound,
                           maxval=bound)
    banks[name] = {'a': a, 'b': jnp.zeros((num_banks, width, out))}
  return banks


def bank_updates(banks: Banks, gates: Mapping[str, jax.Array] | None = None
                 ) -> dict[str, jax.Array]:
  """Multiplies the banks out to the updates of the kernels.

  Args:
    banks: of every layer.
    gates: {layer: r `[h]`}; the updates are then summed with these weights.

  Returns:
    {layer: `[..., in, out]`}, or without gates `[h, ..., in, out]`.
  """
  out = {}
  for name, bank in banks.items():
    if 'offset' in bank:
      offset = bank['offset']
      out[name] = (offset if gates is None else
                   jnp.einsum('h...o,h->...o', offset, gates[name]))
      continue
    a, b = bank['a'], bank['b']
    if gates is None:
      out[name] = jnp.einsum('h...r,hro->h...o', a, b)
    else:
      out[name] = jnp.einsum('h...r,hro,h->...o', a, b, gates[name])
  return out


def merge(kernels: Mapping[str, jax.Array],
          updates: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Adds updates to their kernels, {layer: W + update}."""
  return {name: kernels[name] + update for name, update in updates.items()}


class Router(nn.Module):
  """The router: one score for each layer and bank from the timestep.

  A sinusoidal embedding of the timestep, one hidden layer, and one output for
  every layer and bank. To it a fixed prior is added that prefers bank i in
  the i-th of h equal spans of the timesteps: without one, all timesteps start
  in the same bank, which alone then learns, and the router never leaves it.

  Call with t `[]`; returns logits float32 `[num_layers, num_banks]`.
  """

  num_layers: int
  num_banks: int
  num_train_steps: int
  features: int = 64  # width of the sinusoidal embedding
  prior: float = 1.0  # how much more a span's own bank gets than the next
  # Timesteps are real, from 0 to num_train_steps, not whole and below it.
  continuous: bool = False

  @nn.compact
  def __call__(self, t):
    t = jnp.asarray(t, jnp.float32)
    # As parts of 0..1: a whole step is the middle of what it stands for.
    place = (t if self.continuous else t + 0.5) / self.num_train_steps
    if self.continuous:
      # Sines tell whole numbers apart, and sigma is below 1.
      t = _EMBEDDED_STEPS * place
    h = timestep.timestep_embedding(jnp.reshape(t, (1,)), self.features)
    h = nn.silu(nn.Dense(4 * self.features)(h))
    small = nn.initializers.normal(1e-3)
    logits = nn.Dense(self.num_layers * self.num_banks, kernel_init=small)(h)
    logits = logits.reshape(self.num_layers, self.num_banks)
    # The middles of the spans, likewise. From one span to the next the distance
    # grows by 1 / h, times h is 1: the logits differ by `prior`.
    centres = (jnp.arange(self.num_banks) + 0.5) / self.num_banks
    return logits - self.prior * self.num_banks * jnp.abs(place - centres)


def select(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Chooses the highest score, with a straight-through gradient.

  r = onehot(argmax p) + p - stop_gradient(p), p = softmax(logits / T).

  Args:
    logits: `[..., h]`.
    temperature: T > 0 of the softmax whose gradient is used.

  Returns:
    r like logits; exactly one-hot in value.
  """
  # p - stop_gradient(p) is 0 in value, and has the gradient of p.
  p = jax.nn.softmax(logits / temperature)
  hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return hard + (p - jax.lax.stop_gradient(p))


def plan_choices(router: Router, params: Any, timesteps: Any) -> jax.Array:
  """The banks that the router picks at every step, int32 `[S, num_layers]`.

  Args:
    router: the router.
    params: its parameters.
    timesteps: `[S]`.
  """
  # One step at a time in the formula, as in training; vmap makes it one
  # program.
  logits = jax.vmap(lambda t: router.apply({'params': params}, t))(
      jnp.asarray(timesteps, jnp.float32))
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)
