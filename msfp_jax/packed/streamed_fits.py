"""Quantizers of a checkpoint's layers, found one layer at a time (`streamed`).
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import pathlib
from typing import Any

from flax import traverse_util
import numpy as np
import threadpoolctl

from msfp_jax import diffusion
from msfp_jax.base import journal as journal_lib
from msfp_jax.base import progress as progress_lib
from msfp_jax.convert import piecewise
from msfp_jax.convert import restore
from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import interception
from msfp_jax.quant import recipes
from msfp_jax.quant import roles as roles_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant import widths as widths_lib
from msfp_jax.quant.fit import Dynamic
from msfp_jax.quant.fit import EXTREMES
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.quant.spec import LayerSpec
from msfp_jax.quant.spec import QuantSpec

# In the folder of what is needed meanwhile: fits that searched, by layer.
FITS = 'fits.jsonl'


@dataclasses.dataclass(frozen=True)
class Job:
  """What is packed.

  Attributes:
    model: the linen model.
    plan: the sampler.
    places: {path: where the parameter lies}.
    about: what else the header says.
  """

  model: Any
  plan: diffusion.SamplerPlan
  places: Mapping[tuple[str, ...], restore.Place]
  about: Mapping[str, str]

  @functools.cached_property
  def kernels(self) -> dict[str, restore.Place]:
    """{layer: where its kernel lies}."""
    return self._leaves('kernel')

  @functools.cached_property
  def biases(self) -> dict[str, restore.Place]:
    """{layer: where its bias lies} of the layers that have one."""
    return self._leaves('bias')

  def _leaves(self, kind):
    return interception.leaves(
        traverse_util.unflatten_dict(self.places), kind)

  def params_of(self, layer: str) -> Any:
    """A layer's parameters alone, read, in their places in the model's."""
    return traverse_util.unflatten_dict({
        path: place.read() for path, place in self.places.items()
        if '.'.join(path[:-1]) == layer})


@dataclasses.dataclass(frozen=True)
class Fits:
  """Finds how layers are quantized; fields are arguments of `calibrate`."""

  recipe: str
  bits: int
  act_bits: int | None
  exceptions: str | Mapping[str, int] | None
  roles: Mapping[str, str] | None

  def check(self) -> None:
    """Raises ValueError for a recipe that has to see inputs."""
    act_bits = self.bits if self.act_bits is None else self.act_bits
    needs = set(recipes.get(self.recipe).needs_at(self.bits, act_bits))
    if self.roles is None:
      # Extremes tell what follows SiLU or GELU, and so does the structure of
      # the models that are known.
      needs.discard(EXTREMES)
    if needs:
      raise ValueError(
          f'recipe {self.recipe!r} looks at {sorted(needs)} of the inputs, for '
          'which the model must run: pass a spec that calibrate made, '
          'act_bits=32 to quantize weights alone, or a recipe without data '
          "such as 'nvfp4'")

  def fit(self, job: Job, order: list[str], folder: pathlib.Path,
          identity: Any) -> QuantSpec:
    """What `calibrate` finds, layer by layer, but for errors (`stats`)."""
    of, kernels = recipes.get(self.recipe), job.kernels
    act_bits = self.bits if self.act_bits is None else self.act_bits
    differences = of.differences and act_bits < FULL_BITS
    widths_of = widths_lib.layer_widths(
        self.bits, act_bits, self.exceptions, self.roles)
    widths = {name: widths_of(name) for name in kernels}
    kind = lambda unused_name: ''
    if EXTREMES in of.needs_at(self.bits, act_bits):
      # Calibration would run the model, and have its layers in this order.
      kernels = {name: kernels[name] for name in order}
      kind = lambda name: (spec_lib.AAL if roles_lib.follows_activation(name)
                           else spec_lib.NAL)
    one = lambda name, kernel: calibrate_lib.fit_layer(
        of, widths[name][0], Seen(), kernel, *widths[name][1:], measured=False,
        kind=kind(name))
    if (type(of.weight) is Dynamic and of.around is None
        or self.bits == FULL_BITS):
      # Their quantizers are the same whatever the weights are.
      return QuantSpec(self.recipe, {
          name: one(name, np.zeros((1,) * len(place.shape), np.float32))
          for name, place in kernels.items()}, differences)
    # Scales and what stays come on top; how large these are, formats tell.
    least = sum(math.prod(place.shape) * widths[name][1] // 8
                for name, place in kernels.items())
    piecewise.check_room(folder.with_suffix(''), least, folder)
    return QuantSpec(self.recipe, _searched(
        kernels, self.recipe, one, folder, identity), differences)


def _searched(kernels: Mapping[str, restore.Place], recipe: str,
              one: Callable[[str, np.ndarray], LayerSpec],
              folder: pathlib.Path, identity: Any) -> dict[str, LayerSpec]:
  """Fits that look at the weights; those that are found stay found."""
  # A first pass of its own: a format's bits say where the tensors lie.
  with (threadpoolctl.threadpool_limits(1, 'blas'), journal_lib.Journal(
      folder / FITS, identity,
      f'delete {folder} to begin anew, or ask for what it was begun with'
  ) as journal):
    found = {entry['layer']: entry['spec']
             for entry in journal.of('layer', 'spec')}
    progress = progress_lib.Progress(
        f'search {recipe}, layers', len(kernels), len(found), unit='layers')
    for name in [name for name in kernels if name not in found]:
      kernel = kernels[name].read()
      interception.check_finite({name: kernel})
      found[name] = QuantSpec(recipe, {name: one(name, kernel)}).to_json()
      journal.add({'layer': name, 'spec': found[name]})
      progress.update(len(found))
  # Also those of this process from their JSON: resumed or not, it is the same.
  return {name: QuantSpec.from_json(found[name]).layers[name]
          for name in kernels}
