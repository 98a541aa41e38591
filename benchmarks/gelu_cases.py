"""A small FLUX with weights as networks have them, and its layers' inputs.

The published weights were not at hand. What stands for them are three kinds of
random weights, from what others report of diffusion transformers:

- 'initial': as DiT starts its training (Peebles and Xie 2023): Xavier's uniform
  weights, no biases, adaLN at zero. What comes before GELU is normal.
- 'uneven': channels differ. adaLN's shifts, scales and gates are normal, and
  move with the step; before GELU every channel has its own width, log-normal,
  and a bias that is mostly negative. TaQ-DiT (arXiv 2411.14172) reports inputs
  behind GELU that differ by channel and step and are extremely asymmetric.
  Weights behind it have long tails (LRQ-DiT, arXiv 2508.03485: Gaussian-like
  with long tails): Student's t of 5.
- 'outliers': likewise, and the same 1 % of channels is 30 times as large at
  all tokens (as in `formats.distributions`; LRQ-DiT, on FLUX among others:
  outliers "of large magnitude concentrated in specific channels"). Their
  weights are smaller by the square root of it: extremes of inputs and of
  weights rarely meet in a channel (PTQ4DiT, NeurIPS 2024).

How wide and how large is ours. The figures are of these shapes, not of FLUX.1.
"""

import functools
import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import convert
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig
from msfp_jax.quant import interception
from msfp_jax.quant.fit import Seen

KINDS = INITIAL, UNEVEN, OUTLIERS = 'initial', 'uneven', 'outliers'
STEPS = (1.0, 0.75, 0.5, 0.25)  # FLUX.1-schnell's four
# The second block of each kind: adaLN and attention of one are before it.
FEED_FORWARD = 'transformer_blocks.1.ff.net.2'
GELU_HALF = 'single_transformer_blocks.1.proj_out.mlp'
ATTENTION_HALF = 'single_transformer_blocks.1.proj_out.attn'
LAYERS = (FEED_FORWARD, GELU_HALF, ATTENTION_HALF)

SHARE, FACTOR = 0.01, 30.0  # of outlier channels
_WIDTHS = 0.6  # of channels before GELU, standard deviation of the logarithm
_BIAS = (-0.5, 0.5)  # before GELU: mean and standard deviation
_MODULATION = 0.5  # standard deviation of adaLN's biases
_FREEDOM = 5  # of Student's t
_ROWS, _VALUES = 512, 65_536  # that calibration keeps, of a layer
_TEXT = 64  # tokens
_WIDENING = re.compile(r'.*\.(ff(_context)?\.net\.0\.proj|proj_mlp)')
_NARROWING = re.compile(r'.*\.(ff(_context)?\.net\.2|proj_out\.(mlp|attn))')
_ADALN = re.compile(r'(.*\.)?norm\w*\.linear')


class Case(NamedTuple):
  """One layer: its input in two batches, and its weights.

  Attributes:
    given: float32 `[B, N, I]`, what calibration sees; a step each.
    x: of other noise and other texts, what is measured.
    kernel: float32 `[I, O]`.
  """

  given: np.ndarray
  x: np.ndarray
  kernel: np.ndarray


def model_of(heads: int, side: int = 32) -> Flux:
  """FLUX with fewer heads and blocks, and narrow conditions.

  Args:
    heads: of 128 channels each; FLUX.1 has 24.
    side: of the latents, which make side^2 / 4 tokens.
  """
  return Flux(FluxConfig(
      image_size=side, num_layers=2, num_single_layers=2, num_heads=heads,
      text_dim=64, pooled_dim=64))


def params_of(model: Flux, kind: str, seed: int) -> Any:
  """Draws parameters of one of KINDS, float32, nested as the model has them."""
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r}: must be one of {KINDS}')
  rng = np.random.default_rng(seed)
  shapes = traverse_util.flatten_dict(convert.abstract_params(model))
  flat = {path: _drawn(rng, '.'.join(path[:-1]), path[-1], leaf.shape, kind)
          for path, leaf in shapes.items()}
  if kind == OUTLIERS:
    _stretch(rng, flat)
  return traverse_util.unflatten_dict(flat)


def _drawn(rng, layer, leaf, shape, kind):
  """One parameter."""
  zeros = np.zeros(shape, np.float32)
  if leaf == 'scale':  # of a norm
    return zeros + 1
  adaln, widens = _ADALN.fullmatch(layer), _WIDENING.fullmatch(layer)
  if leaf == 'bias':
    if kind == INITIAL or not (adaln or widens):
      return zeros
    mean, spread = _BIAS if widens else (0.0, _MODULATION)
    return np.float32(rng.normal(mean, spread, shape))
  if adaln and kind == INITIAL:
    return zeros
  deviation = np.sqrt(2 / sum(shape))  # Xavier's
  if kind != INITIAL and _NARROWING.fullmatch(layer):
    tails = rng.standard_t(_FREEDOM, shape)
    return np.float32(tails * deviation / np.sqrt(_FREEDOM / (_FREEDOM - 2)))
  found = rng.uniform(-1, 1, shape) * deviation * np.sqrt(3)
  if kind != INITIAL and widens:
    found *= rng.lognormal(0, _WIDTHS, shape[-1])
  return np.float32(found)


def _stretch(rng, flat):
  """Makes the same few channels behind every GELU large, in place."""
  for path in [*flat]:
    *block, layer, leaf = path
    if leaf != 'kernel' or not _WIDENING.fullmatch('.'.join(path[:-1])):
      continue
    channels = flat[path].shape[-1]
    large = rng.choice(channels, max(round(SHARE * channels), 1), False)
    flat[path][:, large] *= FACTOR
    # Centred, so that GELU lets half of their tokens through.
    flat[*block, layer, 'bias'][large] = 0
    behind = layer.replace('net.0.proj', 'net.2').replace(
        'proj_mlp', 'proj_out.mlp')
    flat[*block, behind, 'kernel'][large] /= np.sqrt(FACTOR)


def inputs_of(model: Flux, params: Any, seed: int) -> dict[str, np.ndarray]:
  """{layer of LAYERS: its input `[4, N, I]`}, one of STEPS each."""
  rng, config = np.random.default_rng(seed), model.config
  normal = lambda *shape: rng.standard_normal(
      (len(STEPS), *shape)).astype(np.float32)
  given = (normal(*model.sample_shape), np.float32(STEPS),
           normal(_TEXT, config.text_dim), normal(config.pooled_dim))
  return jax.device_get(_run(model)(params, *map(jnp.asarray, given)))


@functools.cache
def _run(model):
  return jax.jit(lambda params, *inputs: {
      name: call.input for name, call in interception.record(
          model, params, *inputs)[1].items() if name in LAYERS})


def seen_of(x: np.ndarray) -> Seen:
  """What calibration would keep of an input `[B, N, I]`."""
  rng, rows = np.random.default_rng(0), x.reshape(-1, x.shape[-1])
  return Seen(
      values=rng.choice(rows.ravel(), _VALUES), minimum=float(x.min()),
      maximum=float(x.max()), rows=rows[rng.permutation(len(rows))[:_ROWS]],
      channel_maxima=np.abs(rows).max(0))


def cases(heads: int, kind: str, seed: int, side: int = 32
          ) -> dict[str, Case]:
  """{layer of LAYERS: its case}, of one draw of weights."""
  model = model_of(heads, side)
  params = params_of(model, kind, seed)
  kernels = interception.leaves(params, 'kernel')
  given, x = (inputs_of(model, params, 2 * seed + i) for i in range(2))
  return {name: Case(given[name], x[name], kernels[name]) for name in LAYERS}


def joined(attention: Case, gelu: Case) -> Case:
  """The two halves of a single block as the one layer that files have."""
  both = lambda part: np.concatenate([part(attention), part(gelu)], -1)
  return Case(both(lambda case: case.given), both(lambda case: case.x),
              np.concatenate([attention.kernel, gelu.kernel]))


def statistics(case: Case) -> dict[str, float]:
  """How a layer's input is distributed: see the heads of its table."""
  x = np.float64(case.x.reshape(-1, case.x.shape[-1]))
  centred, energies = x - x.mean(), (x**2).sum(0)
  widths = np.sort(x.std(0))
  largest = widths[-max(round(SHARE * len(widths)), 1):]
  return {
      'minimum': x.min(), 'maximum': x.max(),
      'below 0, %': 100 * (x < 0).mean(),
      'kurtosis': (centred**4).mean() / (centred**2).mean()**2,
      'widest 1 % of channels over the median': (
          np.median(largest) / np.median(widths)),
      'their share of the energy, %': 100 * np.sort(energies)[
          -len(largest):].sum() / energies.sum()}
