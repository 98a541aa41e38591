"""What every part of a quantized model costs its images, in dB.

    alone      this part quantized, all else in full precision
    restored   this part in full precision, all else quantized

Both are PSNR to full precision's images from the same noise. Parts are layers,
steps of the sampler, and groups: roles of layers, and of these and of all
layers the weights (with biases that were trained) and the inputs. Nothing is
corrected here of the drift of the whole (`packed.drift`). Unlike
`layer_error`, which looks at a layer's output, this is what arrives in the end:
errors that later layers and steps forgive cost nothing, and those that they
amplify cost more.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import progress as progress_lib
from msfp_jax.diffusion import sampling
from msfp_jax.kernels import apply as apply_lib
from msfp_jax.kernels import differences
from msfp_jax.metrics import similarity
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full

# Which of a layer's two sides are quantized: the last axis of a mask, and the
# bits of its number, by which a layer chooses how it runs.
INPUT, WEIGHT = range(2)
SIDES = {'inputs': INPUT, 'weights': WEIGHT}


class Sensitivity:
  """Measures quantized models against the teacher that they were made of."""

  def __init__(self, model: nn.Module, params: Any,
               plan: diffusion.SamplerPlan, noise: jax.Array,
               *condition: jax.Array, key: jax.Array,
               decode: Callable[[jax.Array], jax.Array] | None = None):
    """Nothing runs yet.

    Args:
      model: in full precision.
      params: its parameters.
      plan: the sampler.
      noise: `[B, H, W, C]`; B images are compared.
      *condition: what else the model takes.
      key: of the sampler's noise.
      decode: latents -> images in [-1, 1]; None where samples are images.
    """
    self._model, self._params = model, interception.parameters(params)
    self._plan, self._noise, self._condition = plan, noise, condition
    self._key, self._decode = key, decode

  def of(self, deployed: packed_lib.PackedModel,
         roles: Mapping[str, str] | None = None, name: str = ''
         ) -> dict[str, Any]:
    """What each part of a model costs.

    Args:
      deployed: the quantized model.
      roles: {layer: role}, where they are known.
      name: of the model, for progress lines.

    Returns:
      {'images': B, 'quantized': dB with all of it quantized, and 'layers',
      'steps', 'groups': {part: {'alone': dB, 'restored': dB}}}; steps are named
      by their timesteps. Layers that are the teacher's are left out, and what
      would be of samples that are NaN or infinite, as mixtures may be.

    Raises:
      ValueError: the model's own samples are.
    """
    layers = [layer for layer, found in deployed.layers.items()
              if found.weight is not None or not found.input.is_full
              or self._is_moved(deployed, layer)]
    parts = {kind: _masks(kind, layers, self._plan, roles or {})
             for kind in ('layers', 'steps', 'groups')}
    run = self._images_of(deployed, layers)
    nothing = np.zeros((self._plan.num_steps, len(layers), len(SIDES)), bool)
    full, whole = run(nothing), run(~nothing)
    if full is None or whole is None:
      raise ValueError(f'sensitivity {name}: samples are NaN or infinite; the '
                       'model is damaged')
    progress = progress_lib.Progress(
        f'sensitivity {name}'.rstrip() + ', parts',
        sum(map(len, parts.values())), unit='parts', compiles=True)
    found = {'images': len(self._noise), 'quantized': _psnr(whole, full)}
    done = 0
    for kind, masks in parts.items():
      found[kind] = {}
      for part, mask in masks.items():
        images = {'alone': run(mask), 'restored': run(~mask)}
        found[kind][part] = {
            way: _psnr(made, full) for way, made in images.items()
            if made is not None}
        progress.update(done := done + 1)
    return found

  def _is_moved(self, deployed: packed_lib.PackedModel, name: str) -> bool:
    """Whether a layer in full precision has another bias than the teacher's.
    """
    own = interception.leaves(self._params, 'bias').get(name)
    there = interception.leaves(deployed.params, 'bias').get(name)
    return there is not None and not np.array_equal(own, there)

  def _images_of(self, deployed: packed_lib.PackedModel, layers: list[str]
                 ) -> Callable[[np.ndarray], np.ndarray | None]:
    """A mask `[S, layers, SIDES]` of what is quantized -> uint8 images.

    None of samples that are NaN or infinite, which bytes would hide.
    """
    # One program for all masks, which are an argument of it: to compile
    # hundreds would take longer than to run them.
    @functools.partial(jax.jit, compiler_options=kernels.compiler_options())
    def draw(arrays, params, codes, noise, condition, key):
      model = deployed.with_arrays(arrays)

      def predict(x, t, index):
        visit = functools.partial(_visit, model, params, layers, codes, index)
        return interception.call(
            self._model, params, visit, x, t, *condition)

      def remember(x, t, index, memory):  # what `predict` is for differences
        visit = functools.partial(
            _visit_differences, model, params, layers, codes, index)
        return interception.call_remembering(
            self._model, params, visit, memory, x, t, *condition)

      if not model.differences:
        return diffusion.sample(predict, self._plan, noise, key)
      return diffusion.sample(remember, self._plan, noise, key,
                              sampling.no_memory(remember, noise))

    def run(mask: np.ndarray) -> np.ndarray | None:
      codes = np.int32(mask @ (1 << np.arange(len(SIDES))))
      x = draw(deployed.arrays, self._params, codes, self._noise,
               self._condition, self._key)
      x = x if self._decode is None else self._decode(x)
      return np.asarray(data.to_uint8(x)) if np.isfinite(x).all() else None

    return run


def _psnr(images: np.ndarray, full: np.ndarray) -> float:
  return round(float(np.mean(similarity.decibels(images, full))), 3)


def _masks(kind: str, layers: list[str], plan: diffusion.SamplerPlan,
           roles: Mapping[str, str]) -> dict[str, np.ndarray]:
  """{part: which sides of which layers at which steps it is}."""
  shape = plan.num_steps, len(layers), len(SIDES)

  def mask(step=slice(None), layer=slice(None), side=slice(None)):
    found = np.zeros(shape, bool)
    found[step, layer, side] = True
    return found

  if kind == 'layers':
    return {name: mask(layer=i) for i, name in enumerate(layers)}
  if kind == 'steps':
    # Spacings may visit a timestep twice; each visit has a name of its own.
    return {f'{i}: t = {t:g}': mask(step=i)
            for i, t in enumerate(plan.timesteps.tolist())}
  found = {name: mask(side=side) for name, side in SIDES.items()}
  for role in dict.fromkeys(roles[name] for name in layers if name in roles):
    its = np.array([roles.get(name) == role for name in layers])
    found[role] = mask(layer=its)
    found |= {f'{role}, {name}': mask(layer=its, side=side)
              for name, side in SIDES.items()}
  return found


def _visit(model: packed_lib.PackedModel, params: Any, layers: list[str],
           codes: jax.Array, index: jax.Array, module: nn.Module, x: jax.Array,
           compute: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """A layer's output as its code at this step says; see `interception.Visit`.
  """
  name = interception.layer_name(module)
  if name not in layers:
    return compute(x)
  layer = model.layer_at(name, index)
  own = _own(params, name)
  # By one product all of them, as that of the module itself cannot be called in
  # a branch: a program of its own, in which Flax's modules do not run.
  bias = interception.leaves(model.params, 'bias').get(name)
  branches = [functools.partial(apply_lib.run_layer, module, layer=way)
              for way in _ways(layer, own, bias)]
  return jax.lax.switch(codes[index, layers.index(name)], branches, x)


def _visit_differences(
    model: packed_lib.PackedModel, params: Any, layers: list[str],
    codes: jax.Array, index: jax.Array, module: nn.Module, x: jax.Array,
    compute: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Likewise of a model that quantizes differences between steps.

  The product is of the whole x^, as parts of sums over steps would be of other
  weights where a step's code differs from the one before.
  """
  name = interception.layer_name(module)
  if name not in layers:
    return compute(x)
  layer, own = model.layer_at(name, index), _own(params, name)
  code = codes[index, layers.index(name)]
  if layer.input.is_full:
    now = layer.around.input(x)
  else:
    now = differences.restored(module, x, layer, code & (1 << INPUT) > 0)
  teachers = layer.replace(
      weight=Latent(layer.around.residual(own['kernel']), Full()),
      bias=own.get('bias'), prepared=None)
  trained = teachers.replace(
      bias=interception.leaves(model.params, 'bias').get(name, teachers.bias))
  branches = [functools.partial(_complete, module, side) for side in (
      teachers, trained if layer.weight is None else layer)]
  return jax.lax.switch(code >> WEIGHT, branches, now, x)


def _complete(module, layer, now, x):
  """A layer's output for x^."""
  return differences.complete(
      differences.whole(layer, module, now), module, x, layer
  ).astype(apply_lib.dtype_of(module, x))


def _own(params, name):
  """The teacher's kernel and bias of a layer."""
  return {kind: found[name] for kind in ('kernel', 'bias')
          if name in (found := interception.leaves(params, kind))}


def _ways(layer: QLayer, own: Mapping[str, jax.Array],
          trained: jax.Array | None) -> list[QLayer]:
  """The layer with neither side quantized, its input, its weights, both.

  Args:
    layer: with one set of weights.
    own: the teacher's kernel and bias.
    trained: the model's bias, of a layer that has none with its weights.
  """
  kernel, bias = own['kernel'], own.get('bias')
  neither = QLayer(Latent(kernel, Full()), bias=bias)
  if layer.weight is None:
    moved = neither.replace(bias=bias if trained is None else trained)
    return [neither, neither.replace(input=layer.input), moved,
            moved.replace(input=layer.input)]
  # The teacher's weights as the product sees them.
  alone = layer.replace(
      weight=Latent(layer.around.residual(kernel), Full()), bias=bias,
      prepared=None)
  return [neither, alone, layer.replace(input=Full()), layer]
