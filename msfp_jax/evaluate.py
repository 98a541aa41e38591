"""Sampling at scale, metrics, results.json: what quantization cost."""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from msfp_jax import conditions
from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax import experiment as experiment_lib
from msfp_jax import files
from msfp_jax import finetune
from msfp_jax import layers as layers_lib
from msfp_jax import pictures
from msfp_jax import progress as progress_lib
from msfp_jax import spec as spec_lib
from msfp_jax import student as student_lib
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.report import grid

FULL_PRECISION, TUNED = 'fp', 'tuned'


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
  deployed: student_lib.Deployed


def generate(deployed: student_lib.Deployed, plan: diffusion.SamplerPlan,
             num_samples: int, batch_size: int, shape: tuple[int, ...],
             key: jax.Array, name: str = 'sample', *,
             draw_condition: conditions.Draw = conditions.none,
             decode: Callable[[jax.Array], jax.Array] | None = None
             ) -> np.ndarray:
  """Draws images; image i depends on the key and i's batch alone.

  Args:
    deployed: the model.
    plan: the sampler.
    num_samples: how many; the last batch may be partial.
    batch_size: images at once.
    shape: of a sample, `[H, W, C]`.
    key: of the noise.
    name: for progress lines.
    draw_condition: of every batch, for conditional models.
    decode: latents -> images in [-1, 1]; None where samples are images.

  Returns:
    uint8 images `[num_samples, H, W, C]`.

  Raises:
    ValueError: num_samples < 1, or samples that are NaN or infinite.
  """
  if num_samples < 1 or batch_size < 1:
    raise ValueError(f'num_samples={num_samples}, batch_size={batch_size}: '
                     'must be at least 1')

  # Weights are arguments: constants would be folded at compile time.
  @jax.jit
  def draw(params, weights, key):
    model = dataclasses.replace(deployed, params=params, weights=weights)
    noise = jax.random.normal(
        jax.random.fold_in(key, 0), (batch_size, *shape))
    condition = draw_condition(jax.random.fold_in(key, 2), batch_size)
    return diffusion.sample(
        lambda x, t, index: model.eps_fn(x, t, index, *condition), plan, noise,
        jax.random.fold_in(key, 1))

  images = []
  progress = progress_lib.Progress(name, num_samples)
  for i in range(-(-num_samples // batch_size)):
    x = _finite(np.asarray(draw(
        deployed.params, deployed.weights, jax.random.fold_in(key, i))),
                name, i)
    if decode is not None:
      x = _finite(np.asarray(decode(x)), name, i)
    images.append(np.asarray(data.to_uint8(x)))
    progress.update(min((i + 1) * batch_size, num_samples))
  return np.concatenate(images)[:num_samples]


def _finite(x: np.ndarray, name: str, batch: int) -> np.ndarray:
  if bad := np.count_nonzero(~np.isfinite(x)):
    raise ValueError(f'{name}: {bad} of {x.size} values of batch {batch} are '
                     'NaN or infinite; the model is damaged')
  return x


def draw(experiment: experiment_lib.Experiment,
         deployed: student_lib.Deployed, name: str) -> np.ndarray:
  """`generate` as config.eval says; every model starts from the same noise."""
  cfg = experiment.config.eval
  return generate(
      deployed, experiment.plan, cfg.num_samples, cfg.batch_size,
      experiment.sample_shape, experiment.key(experiment_lib.SAMPLES), name,
      draw_condition=experiment.draw_condition, decode=experiment.decode)


def untuned(experiment: experiment_lib.Experiment,
            spec: spec_lib.QuantSpec | None) -> student_lib.Deployed:
  """The calibrated model as it is; without a spec, the full-precision one."""
  params = experiment.params
  if spec is None:
    none = spec_lib.LayerSpec('', '', None, None)
    spec = spec_lib.QuantSpec(
        'fp', {name: none for name in layers_lib.leaves(params, 'kernel')})
  return student_lib.Student(experiment.model, params, spec, None, ()).deploy(
      {'banks': {}, 'ranges': {'act': {}, 'weight': {}}, 'biases': {}},
      experiment.plan.timesteps)


def make_row(experiment: experiment_lib.Experiment, name: str,
             workdir: str) -> Row:
  """The row of a name: 'fp', 'tuned', or a recipe, calibrated here.

  A recipe may carry its bits: 'msfp:w6a6'.

  Raises:
    experiment.WorkdirError: 'tuned', and the workdir's run is not complete.
    ValueError: an unknown name.
  """
  cfg = experiment.config.quant
  if name == FULL_PRECISION:
    full = spec_lib.FULL_PRECISION
    return Row(name, full, full, untuned(experiment, None))
  if name == TUNED:
    check_trained(experiment.config, workdir)
    spec = finetune.calibrated_spec(experiment, workdir)
    return Row(name, cfg.weight_bits, cfg.act_bits,
               finetune.fit(experiment, spec, workdir))
  recipe, _, bits = name.partition(':')
  weight_bits, act_bits = (spec_lib.parse_bits(bits) if bits
                           else (cfg.weight_bits, cfg.act_bits))
  spec = experiment.calibrate(recipe, weight_bits, act_bits)
  return Row(name, weight_bits, act_bits, untuned(experiment, spec))


def check_rows(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Raises ValueError unless `make_row` knows every row of config.eval."""
  for name in config.eval.rows:
    recipe, _, bits = name.partition(':')
    if name == TUNED:
      check_trained(config, workdir)
    elif name != FULL_PRECISION and recipe not in spec_lib.RECIPES:
      raise ValueError(
          f'config.eval.rows names {name!r}: must be {FULL_PRECISION!r}, '
          f'{TUNED!r} or one of {sorted(spec_lib.RECIPES)}, these also with '
          "bits as in 'msfp:w6a6'")
    elif bits:
      spec_lib.parse_bits(bits)


def check_trained(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Raises WorkdirError unless the workdir's fine-tuning is complete."""
  last = pathlib.Path(workdir) / 'checkpoints' / str(
      config.finetune.num_updates)
  if not config.finetune.num_updates or not last.is_dir():
    raise experiment_lib.WorkdirError(
        f"no finished fine-tuning in {workdir} ({last} is not there): run "
        "train.py with the same config and workdir first, or leave 'tuned' "
        'out of config.eval.rows')


def packed_bytes(deployed: student_lib.Deployed) -> int:
  """Size of the model with its kernels packed; everything counted.

  Codes of every bank's weights, scales and zero points in float32, and all
  other parameters in float32.
  """
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


def results_head(config: ml_collections.ConfigDict,
                 plan: diffusion.SamplerPlan) -> dict[str, Any]:
  """The fields of results.json that hold for all rows."""
  return {
      'dataset': config.data.path or config.data.name,
      'num_samples': config.eval.num_samples,
      'sampler': config.sampler.name,
      'steps': plan.num_steps,
      'eta': config.sampler.eta,
      'spacing': config.sampler.spacing,
      'convention': config.sampler.convention,
      'guidance': config.guidance.scale,
      'seed': config.seed,
      'features': config.eval.features,
      'exceptions': str(config.quant.exceptions),
  }


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """The whole of eval.py.

  All rows start from the same noise; the full-precision one comes first and
  is what the others are compared with. Writes results.json and
  samples/methods.png, one row of images per method.

  Returns:
    The content of results.json.
  """
  experiment_lib.prepare_workdir(config, workdir)
  experiment = experiment_lib.load(config, workdir)
  check_rows(config, workdir)
  scorer = scorer_lib.Scorer(
      experiment.images, config.eval.features, inception=config.eval.inception,
      preprocessing=config.eval.preprocessing)
  names = [FULL_PRECISION] + [
      name for name in config.eval.rows if name != FULL_PRECISION]
  results = results_head(config, experiment.plan)
  results |= {**scorer.provenance, 'rows': []}
  shown = {}
  for name in names:
    row = make_row(experiment, name, workdir)
    images = draw(experiment, row.deployed, f'sample {row.name}')
    found = scorer.score(images)
    results['rows'].append({
        'name': row.name, 'weight_bits': row.weight_bits,
        'act_bits': row.act_bits, **found,
        'bytes': packed_bytes(row.deployed)})
    # A copy: a view would keep all images of the row.
    shown[row.name] = images[:config.eval.pictures].copy()
    logging.info('%s: %s', row.name, ', '.join(
        f'{key} {value:.4g}' for key, value in found.items()))
  shown = {'data': experiment.images[:config.eval.pictures]} | shown
  pictures.save_png(f'{workdir}/samples/methods.png', grid.labelled(shown))
  files.write_json(f'{workdir}/results.json', results)
  return results


def table(results: dict[str, Any]) -> str:
  """results.json as an aligned Markdown table."""
  rows = results['rows']
  columns = list(dict.fromkeys(key for row in rows for key in row))
  lines = [[_cell(row.get(column)) for column in columns] for row in rows]
  widths = [max(len(line[i]) for line in [columns, *lines])
            for i in range(len(columns))]
  join = lambda cells: '| ' + ' | '.join(
      cell.ljust(width) for cell, width in zip(
          cells, widths, strict=True)) + ' |'
  rule = '|' + '|'.join('-' * (width + 2) for width in widths) + '|'
  return '\n'.join([join(columns), rule, *map(join, lines)])


def _cell(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, float):
    return f'{value:.3f}' if abs(value) < 1000 else f'{value:.0f}'
  return f'{value:,}' if isinstance(value, int) else str(value)

