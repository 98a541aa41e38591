"""What INT, signed FP and MSFP lose, layer by layer, on the shipped digits.

  python -m benchmarks.errors

Calibrates `digits16` for W4A4 by each recipe, and compares the mean squared
errors of weights and of inputs in the layers of 4 bits: a line for each role,
geometric means over its layers. Prints a Markdown table, and how many of these
layers have weights on the uniform grid.
"""

from collections.abc import Mapping, Sequence
import statistics

from configs import digits
from msfp_jax.base import markdown
from msfp_jax.quant.spec import LayerSpec
from msfp_jax.run import cli
from msfp_jax.run import experiment as experiment_lib

# (column, statistic, recipe, the recipe that it is compared with).
_COLUMNS = (
    ('weights, INT / signed FP', 'weight_mse', 'int', 'signed_fp'),
    ('inputs, INT / signed FP', 'act_mse', 'int', 'signed_fp'),
    ('inputs, INT / MSFP', 'act_mse', 'int', 'msfp'))
_BITS = 4

Layers = Mapping[str, LayerSpec]


def ratios(layers: Mapping[str, Layers]) -> list[list[str]]:
  """A row for each role: its name, how many layers it has, the ratios.

  Args:
    layers: {recipe: the layers of its spec}.
  """
  roles: dict[str, list[str]] = {}
  for name, layer in layers['msfp'].items():
    if layer.weight.bits == _BITS:
      roles.setdefault(layer.role, []).append(name)
  return [[role, str(len(names)), *(
      f'{_ratio(layers, names, *column[1:]):.2f}' for column in _COLUMNS)]
          for role, names in roles.items()]


def _ratio(layers: Mapping[str, Layers], names: Sequence[str], statistic: str,
           recipe: str, other: str) -> float:
  return statistics.geometric_mean(
      layers[recipe][name].stats[statistic]
      / layers[other][name].stats[statistic] for name in names)


def main(argv):
  del argv
  experiment = experiment_lib.load(digits.get_config(), '')
  layers = {recipe: experiment.calibrate(recipe).layers
            for recipe in ('int', 'signed_fp', 'msfp')}
  heads = ['role', 'layers', *(column[0] for column in _COLUMNS)]
  print(markdown.table(heads, ratios(layers)))
  formats = [layer.weight.fmt for layer in layers['msfp'].values()
             if layer.weight.bits == _BITS]
  uniform = sum(fmt.exponent_bits == 1 for fmt in formats)
  print(f'MSFP: weights on the uniform grid in {uniform} of {len(formats)} '
        'layers')


if __name__ == '__main__':
  cli.run(main)
