"""What a row of a table tells of a model beside its images."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.run import bits
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import generate
from msfp_jax.run import layer_error
from msfp_jax.run import sensitivity as sensitivity_lib

# Of a row: {part: {layer: dB}}, see `LayerErrors.sqnr`; and what
# `Sensitivity.of` finds.
SQNR, SENSITIVITY = 'sqnr', 'sensitivity'


class Meter:
  """Measures models of one experiment: bits, errors by layer, seconds."""

  def __init__(self, experiment: experiment_lib.Experiment,
               layer_images: int, timing: bool, sensitivity_images: int = 0):
    """Nothing runs before it is asked for.

    Args:
      experiment: whose teacher the models were made of.
      layer_images: by which every layer's error is measured; 0: it is not.
      timing: whether sampling is timed.
      sensitivity_images: by which `sensitivity` compares; 0: it does not.

    Raises:
      ValueError: layer_images below 0.
    """
    if layer_images < 0:
      raise ValueError(f'config.eval.layer_images={layer_images}: must be a '
                       'number of images, or 0 to measure no layer')
    self._experiment = experiment
    self._layer_images, self._timing = layer_images, timing
    self._sensitivity_images = sensitivity_images

  def measure(self, draw: generate.Drawer) -> dict[str, Any]:
    """Columns of a model's row, see `registry.FACTS`, and SQNR.

    Args:
      draw: has the model, and draws as its images were drawn.
    """
    model = draw.model
    found = {'bytes': model.stored_bytes,
             'bits_per_weight': bits.per_weight(model),
             'bits_per_act': bits.per_activation(model, self._shapes)}
    if model.differences:
      kept = jax.eval_shape(lambda: model.memory(*self._inputs(1)))
      found['bytes_kept'] = sum(
          math.prod(part.shape) * part.dtype.itemsize
          for part in jax.tree.leaves(kept))
    if self._layer_images:
      sqnr = self._errors.sqnr(model)
      if summary := layer_error.summary(sqnr):
        found |= summary | {SQNR: sqnr}
    if self._timing:
      found |= self._seconds(draw)
    return found

  def sensitivity(self, deployed: packed_lib.PackedModel,
                  spec: spec_lib.QuantSpec | None, name: str
                  ) -> dict[str, Any]:
    """What each part of a quantized model costs; {} where it is not asked for.

    Args:
      deployed: the model.
      spec: which knows the roles of its layers, or None.
      name: for progress lines.
    """
    count = self._sensitivity_images
    if not count or all(
        layer.weight is None and layer.input.is_full
        for layer in deployed.layers.values()):
      return {}
    roles = {} if spec is None else {
        layer: found.role for layer, found in spec.layers.items()}
    experiment = self._experiment
    found = sensitivity_lib.Sensitivity(
        experiment.model, experiment.params, experiment.plan,
        *self._inputs(count), decode=experiment.decode,
        key=jax.random.fold_in(experiment.key(experiment_lib.LAYERS), 2))
    return {SENSITIVITY: found.of(deployed, roles, name)}

  def _inputs(self, count: int) -> tuple[jax.Array, ...]:
    """Noise and condition."""
    # Of a key of their own: neither what calibration saw nor what is sampled.
    experiment = self._experiment
    key = experiment.key(experiment_lib.LAYERS)
    noise = jax.random.normal(
        jax.random.fold_in(key, 0), (count, *experiment.sample_shape))
    return noise, *experiment.draw_condition(
        jax.random.fold_in(key, 1), count)

  @functools.cached_property
  def _shapes(self) -> dict[str, tuple[int, ...]]:
    """{layer: of its input}, of one image."""
    noise, *condition = self._inputs(1)
    return bits.input_shapes(
        self._experiment.model, self._experiment.params, noise, jnp.zeros(1),
        *condition)

  @functools.cached_property
  def _errors(self) -> layer_error.LayerErrors:
    experiment = self._experiment
    return layer_error.LayerErrors(
        experiment.model, experiment.params, experiment.plan,
        *self._inputs(self._layer_images),
        key=jax.random.fold_in(experiment.key(experiment_lib.LAYERS), 2))

  def _seconds(self, draw: generate.Drawer) -> dict[str, float]:
    key = self._experiment.key(experiment_lib.LAYERS)
    weights = [layer.weight for layer in draw.model.layers.values()
               if layer.weight is not None]
    if weights and all(weight.is_packed for weight in weights):
      return {'seconds_packed': draw.seconds_per_image(key)}
    found = {'seconds': draw.seconds_per_image(key)}
    if weights:
      # Another program, as codes are decoded in it.
      found['seconds_packed'] = draw.of(
          draw.model.packed()).seconds_per_image(key)
    return found
