"""Rows of a table: the ways of running a model that are compared."""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from msfp_jax.packed import file as export
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception as layers_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import train
from msfp_jax.run import workdir as workdir_lib
from msfp_jax.tune import student as student_lib

FULL_PRECISION, TUNED, PACKED = 'fp', 'tuned', 'packed'


@dataclasses.dataclass(frozen=True)
class Row:
  """One way of running the model.

  Attributes:
    name: as it stands in results.json.
    weight_bits: of the layers that are no exception.
    act_bits: likewise.
    deployed: the model.
  """

  name: str
  weight_bits: int
  act_bits: int
  deployed: student_lib.Deployed | packed_lib.PackedModel


def untuned(experiment: experiment_lib.Experiment,
            spec: spec_lib.QuantSpec | None) -> student_lib.Deployed:
  """The calibrated model as it is; without a spec, the full-precision one."""
  params = experiment.params
  if spec is None:
    none = spec_lib.LayerSpec('', '', None, None)
    spec = spec_lib.QuantSpec(
        'fp', {name: none for name in layers_lib.leaves(params, 'kernel')})
  return student_lib.calibrated(
      experiment.model, params, spec, experiment.plan.timesteps)


def make_row(experiment: experiment_lib.Experiment, name: str,
             workdir: str) -> Row:
  """The row of a name: 'fp', 'tuned', 'packed', or a recipe, calibrated here.

  'packed' is the file that train.py left, run from its packed weights. A
  recipe may carry its bits: 'msfp:w6a6'.

  Raises:
    errors.WorkdirError: 'tuned' or 'packed', and the workdir's run is not
      complete.
    ValueError: an unknown name.
  """
  cfg = experiment.quant
  if name == FULL_PRECISION:
    full = spec_lib.FULL_PRECISION
    return Row(name, full, full, untuned(experiment, None))
  if name == TUNED:
    workdir_lib.check_trained(workdir, experiment.finetune.num_updates)
    spec = train.calibrated_spec(experiment, workdir)
    return Row(name, cfg.weight_bits, cfg.act_bits,
               train.fit(experiment, spec, workdir))
  if name == PACKED:
    workdir_lib.check_packed(workdir)
    return Row(name, cfg.weight_bits, cfg.act_bits,
               export.load(f'{workdir}/{workdir_lib.PACKED_FILE}'))
  recipe, _, bits = name.partition(':')
  weight_bits, act_bits = (spec_lib.parse_bits(bits) if bits
                           else (cfg.weight_bits, cfg.act_bits))
  spec = experiment.calibrate(recipe, weight_bits, act_bits)
  return Row(name, weight_bits, act_bits, untuned(experiment, spec))


def check_rows(names: Sequence[str], workdir: str, num_updates: int) -> None:
  """Refuses what `make_row` would, before any row is made.

  Args:
    names: config.eval.rows.
    workdir: of the run.
    num_updates: of the run's fine-tuning.

  Raises:
    errors.WorkdirError, ValueError: see `make_row`; or a name twice.
  """
  names = list(names)
  if twice := {name for name in names if names.count(name) > 1}:
    raise ValueError(f'config.eval.rows names {sorted(twice)} more than once')
  for name in names:
    recipe, colon, bits = name.partition(':')
    if name == TUNED:
      workdir_lib.check_trained(workdir, num_updates)
    elif name == PACKED:
      workdir_lib.check_packed(workdir)
    elif name != FULL_PRECISION and recipe not in spec_lib.RECIPES:
      raise ValueError(
          f'config.eval.rows names {name!r}: must be {FULL_PRECISION!r}, '
          f'{TUNED!r}, {PACKED!r} or one of {sorted(spec_lib.RECIPES)}, these '
          "also with bits as in 'msfp:w6a6'")
    elif colon:
      spec_lib.parse_bits(bits)


def packed_bytes(deployed: student_lib.Deployed | packed_lib.PackedModel
                 ) -> int:
  """Size of the model with its kernels packed; everything counted.

  Codes of every bank's weights, scales and zero points in float32, and all
  other parameters in float32. Of a model that was not packed this is computed.
  """
  if isinstance(deployed, packed_lib.PackedModel):
    return deployed.stored_bytes
  total = 4 * sum(leaf.size for leaf in jax.tree.leaves(deployed.params))
  for name, weight in deployed.weights.items():
    quantizer = deployed.spec.layers[name].weight
    if quantizer is not None:
      total -= 4 * weight[0].size
      total += -(-weight.size * quantizer.bits // 8)
      total += 4 * sum(leaf.size for leaf in jax.tree.leaves(quantizer))
    acts = deployed.spec.layers[name].act
    total += 4 * sum(np.size(leaf) for leaf in jax.tree.leaves(acts))
  return total
