"""Rows of a table: the ways of running a model that are compared."""

from collections.abc import Sequence
import dataclasses
import re

from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import recipes
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import train
from msfp_jax.run import workdir as workdir_lib

FULL_PRECISION, TUNED, PACKED = 'fp', 'tuned', 'packed'
ALL = 'all'  # stands for every registered recipe


@dataclasses.dataclass(frozen=True)
class Row:
  """One way of running the model.

  Attributes:
    name: as it stands in results.json.
    weight_bits: of the layers that are no exception.
    act_bits: likewise.
    deployed: the model.
    spec: how its layers are quantized; None in full precision, and of a packed
      file, which keeps no statistics.
  """

  name: str
  weight_bits: int
  act_bits: int
  deployed: packed_lib.PackedModel
  spec: spec_lib.QuantSpec | None = None


def full_precision(experiment: experiment_lib.Experiment) -> Row:
  """The model as it is."""
  return Row(FULL_PRECISION, FULL_BITS, FULL_BITS, packed_lib.full_precision(
      experiment.model, experiment.params, experiment.plan))


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
  # Simulated rows are calibrated here, while 'tuned' and 'packed' go by what
  # train.py left, so that they are what a user gets.
  cfg = experiment.quant
  if name == FULL_PRECISION:
    return full_precision(experiment)
  if name == TUNED:
    workdir_lib.check_trained(workdir, experiment.finetune.num_updates)
    # Read from the workdir, and `fit` only restores: its updates are complete.
    spec = train.calibrated_spec(experiment, workdir)
    return Row(name, cfg.weight_bits, cfg.act_bits,
               *train.fit(experiment, spec, workdir))
  if name == PACKED:
    workdir_lib.check_packed(workdir)
    return Row(name, cfg.weight_bits, cfg.act_bits,
               packed_file.load(f'{workdir}/{workdir_lib.PACKED_FILE}'))
  recipe, _, bits = name.partition(':')
  weight_bits, act_bits = (recipes.parse_bits(bits) if bits
                           else (cfg.weight_bits, cfg.act_bits))
  spec = experiment.calibrate(recipe, weight_bits, act_bits)
  return Row(name, weight_bits, act_bits, train.simulated(experiment, spec),
             spec)


def expand(names: str | Sequence[str]) -> tuple[str, ...]:
  """Names of rows, with every recipe there is in place of 'all'.

  What is behind 'all' goes to each of them, 'all:w6a6', or to those that can
  have it, 'all+differences'. Recipes that are named beside it are rows once.

  Args:
    names: of rows; each may be several with commas between, as a command line
      gives them: 'fp,msfp'.
  """
  # No name has a comma in it. A string would otherwise be read by its letters.
  names = [name.strip() for text in
           ([names] if isinstance(names, str) else names)
           for name in text.split(',') if name.strip()]
  found = []
  for name in names:
    every = re.fullmatch(rf'{ALL}([:+].*)?', name)
    if every is None:
      found.append(name)
      continue
    rows = [f'{recipe}{every[1] or ""}' for recipe in recipes.RECIPES]
    # But those that cannot have what is behind it; of all, none of them can.
    rows = list(filter(_is_recipe, rows)) or rows
    found += [row for row in rows if row not in names and row not in found]
  return tuple(found)


def _is_recipe(name: str) -> bool:
  try:
    recipes.get(name.partition(':')[0])
  except ValueError:
    return False
  return True


def recipes_of(names: Sequence[str]) -> list[str]:
  """The recipes among rows, without their bits."""
  return [name.partition(':')[0] for name in names
          if name not in (FULL_PRECISION, TUNED, PACKED)]


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
    elif name != FULL_PRECISION:
      try:
        recipes.get(recipe)
      except ValueError as error:
        raise ValueError(
            f'config.eval.rows names {name!r}: must be {FULL_PRECISION!r}, '
            f"{TUNED!r}, {PACKED!r} or a recipe, also with bits as in "
            f"'msfp:w6a6'; {error}") from error
      if colon:
        recipes.parse_bits(bits)
