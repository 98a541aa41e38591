"""Sampling at scale, metrics, results.json: what quantization cost."""

import json
import os
import pathlib
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax import report
from msfp_jax.base import devices
from msfp_jax.base import files
from msfp_jax.base import pictures
from msfp_jax.base import progress as progress_lib
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import collect
from msfp_jax.metrics import features
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file
from msfp_jax.report import grid
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import generate
from msfp_jax.run import methods as rows_lib
from msfp_jax.run import sample_store
from msfp_jax.tune import student as student_lib


def draw(experiment: experiment_lib.Experiment,
         deployed: student_lib.Deployed, name: str) -> np.ndarray:
  """Samples as config.eval says; every model starts from the same noise."""
  return generate.generate(
      deployed, experiment.plan, experiment.config.eval.num_samples, name=name,
      **_how_to_sample(experiment))


def _how_to_sample(experiment: experiment_lib.Experiment) -> dict[str, Any]:
  """What `generate.generate` and `generate.batches` are given alike."""
  return {'batch_size': experiment.config.eval.batch_size,
          'shape': experiment.sample_shape,
          'key': experiment.key(experiment_lib.SAMPLES),
          'draw_condition': experiment.draw_condition,
          'decode': experiment.decode}


def fill(experiment: experiment_lib.Experiment,
         deployed: student_lib.Deployed, samples: sample_store.SampleStore,
         name: str) -> None:
  """As `draw`, into a store: only the batches that it misses."""
  size, missing = experiment.config.eval.batch_size, samples.missing
  batches = generate.batches(
      deployed, experiment.plan, missing, name=name,
      **_how_to_sample(experiment))
  total = len(samples)
  done = generate.num_batches(total, size) - len(missing)
  progress = progress_lib.Progress(
      name, total, min(done * size, total), unit='images')
  for number, batch in zip(missing, batches, strict=True):
    samples.write(number, batch)
    done += 1
    progress.update(min(done * size, total))


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


def run(config: ml_collections.ConfigDict, workdir: str,
        command: str = '') -> dict[str, Any]:
  """The whole of eval.py.

  All rows start from the same noise; the full-precision one comes first and
  is what the others are compared with. Writes results.json,
  samples/methods.png, one row of images per method, and where
  config.eval.keep says so all samples. Running it again after an interruption
  goes on with the batch that was missing. Where config.eval.report says so,
  report.html shows the last row in detail.

  Args:
    config: an experiment (configs/).
    workdir: what `finetune.run` left.
    command: stands in the report.

  Returns:
    The content of results.json.

  Raises:
    ValueError: a row, a reference or a form of files that there is not.
  """
  cfg = config.eval
  if jax.process_count() > 1:
    raise ValueError(f'{jax.process_count()} processes: eval.py runs in one, '
                     'on all devices of its machine')
  experiment_lib.prepare_workdir(config, workdir)
  experiment = experiment_lib.load(config, workdir)
  rows_lib.check_rows(config, workdir)
  if cfg.keep and cfg.keep not in sample_store.FORMS:
    raise ValueError(f'config.eval.keep={cfg.keep!r}: must be empty or one of '
                     f'{sorted(sample_store.FORMS)}')
  _check_counts(cfg)
  folder = pathlib.Path(workdir) / 'eval'
  scorer = _claim_and_score(experiment, folder)
  if cfg.num_samples < scorer.least_samples:
    raise ValueError(
        f'config.eval.num_samples={cfg.num_samples}: features '
        f'{cfg.features!r} need at least {scorer.least_samples} images')
  names = [rows_lib.FULL_PRECISION] + [
      name for name in cfg.rows if name != rows_lib.FULL_PRECISION]
  results = results_head(config, experiment.plan)
  results |= {**scorer.provenance, 'rows': []}
  shown = {}
  if experiment.images is not None:
    shown['data'] = experiment.images[:cfg.pictures]
  for name in names:
    samples = _store(experiment, folder, name)
    content, last = _evaluate_row(experiment, workdir, name, samples, scorer)
    results['rows'].append(content)
    shown[name] = samples[:cfg.pictures]
  pictures.save_png(f'{workdir}/samples/methods.png', grid.labelled(shown))
  files.write_json(f'{workdir}/results.json', results)
  if cfg.report:
    if name == rows_lib.PACKED or last is None:
      # Details are those of the simulation: the last row that is one.
      name = [n for n in names if n != rows_lib.PACKED][-1]
      last = rows_lib.make_row(experiment, name, workdir)
    report.write(workdir, experiment=experiment, results=results,
                 pictures=shown, row=last.name, deployed=last.deployed,
                 command=command)
  sample_store.discard(folder)
  return results


def _check_counts(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for counts that no evaluation can work with."""
  generate.num_batches(config.num_samples, config.batch_size)
  devices.check_batch('config.eval.batch_size', config.batch_size)
  if config.vectors and config.vectors < scorer_lib.LEAST_VECTORS:
    raise ValueError(f'config.eval.vectors={config.vectors}: must be 0 or at '
                     f'least {scorer_lib.LEAST_VECTORS}')
  if config.pictures < 1:
    raise ValueError(f'config.eval.pictures={config.pictures}: must be at '
                     'least 1')


def _claim_and_score(experiment: experiment_lib.Experiment,
                     folder: pathlib.Path) -> scorer_lib.Scorer:
  """The scorer; what can be refused is refused before samples are deleted."""
  config, images = experiment.config, experiment.images
  network = feature_network(experiment)
  make = lambda: scorer_lib.Scorer(network, reference_of(
      config, images, network, folder / 'reference.npz'))
  scorer = make() if config.eval.reference or images is None else None
  cfg = config.eval
  samples = {
      'num_samples': cfg.num_samples, 'batch_size': cfg.batch_size,
      'devices': jax.device_count(), 'backend': jax.default_backend(),
      'jax': jax.__version__}
  scores = {
      'pictures': cfg.pictures, 'keep': cfg.keep, 'vectors': cfg.vectors,
      'network': network.provenance,
      'reference': classifier_files.digest(cfg.reference) if cfg.reference
                   else [config.data.name, config.data.path, *images.shape]}
  sample_store.claim(folder, samples, scores)
  return scorer or make()


def feature_network(experiment: experiment_lib.Experiment
                    ) -> features.FeatureNetwork:
  """Of config.eval, for the images that the experiment makes."""
  cfg = experiment.config.eval
  return features.get(
      cfg.features, experiment.image_shape, weights=cfg.inception,
      preprocessing=cfg.preprocessing)


def reference_of(config: ml_collections.ConfigDict, images: data.Images | None,
                 network: features.FeatureNetwork,
                 path: pathlib.Path | None = None) -> stats_file.Reference:
  """Statistics of config.eval.reference, or of the data.

  Args:
    config: of the experiment.
    images: the data; None where there are none.
    network: the feature network.
    path: where those of the data are kept, and looked for.

  Raises:
    ValueError: neither a reference nor data, or no statistics file.
  """
  cfg = config.eval
  if cfg.reference:
    found = stats_file.load(cfg.reference)
    vectors = found.vectors if cfg.vectors else None
    if vectors is not None:
      vectors = collect.spread(vectors, cfg.vectors)
    elif cfg.vectors:
      logging.warning('%s holds no feature vectors: no kernel distance, '
                      'precision and recall', cfg.reference)
    return found._replace(vectors=vectors, provenance={
        **found.provenance, 'file': os.path.basename(cfg.reference),
        'file_sha256': classifier_files.digest(cfg.reference)})
  if images is None:
    raise ValueError('nothing to compare with: set config.eval.reference to a '
                     'file of statistics, or config.data.name to a data set')
  if path is not None and path.is_file():
    return stats_file.load(path)
  found = stats_file.measure(
      images, network, config.data.path or config.data.name, cfg.vectors)
  if path is not None:
    stats_file.save(path, found)
  return found


def _store(experiment: experiment_lib.Experiment, folder: pathlib.Path,
           name: str) -> sample_store.SampleStore:
  cfg = experiment.config.eval
  return sample_store.SampleStore(
      folder / name.replace(':', '_'), cfg.num_samples, cfg.batch_size,
      experiment.image_shape)


def _evaluate_row(experiment: experiment_lib.Experiment, workdir: str,
                  name: str, samples: sample_store.SampleStore,
                  scorer: scorer_lib.Scorer
                  ) -> tuple[dict[str, Any], rows_lib.Row | None]:
  """The row of results.json; draws what is missing of the samples.

  A finished row keeps its metrics and the samples that are shown. All of the
  full-precision model's samples stay: the other rows are compared with them.

  Returns:
    Its content, and the model if it had to be made.
  """
  cfg = experiment.config.eval
  path = samples.folder.with_name(samples.folder.name + sample_store.ROW)
  if path.is_file():
    return json.loads(path.read_text()), None
  row = rows_lib.make_row(experiment, name, workdir)
  fill(experiment, row.deployed, samples, f'sample {name}')
  try:
    found = scorer.score(samples)
  except ValueError as error:
    raise ValueError(f'row {name!r}: {error}; its samples are in '
                     f'{samples.folder}') from error
  logging.info('%s: %s', name, ', '.join(
      f'{key} {value:.4g}' for key, value in found.items()))
  if cfg.keep:
    suffix, save = sample_store.FORMS[cfg.keep]
    save(f'{workdir}/samples/{samples.folder.name}{suffix}', samples)
  content = {'name': name, 'weight_bits': row.weight_bits,
             'act_bits': row.act_bits, **found,
             'bytes': rows_lib.packed_bytes(row.deployed)}
  if name != rows_lib.FULL_PRECISION:
    files.write_json(path, content)
    samples.keep_first(cfg.pictures)
  return content, row


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
    if abs(value) >= 1000:
      return f'{value:.0f}'
    return f'{value:.3g}' if 0 < abs(value) < 0.1 else f'{value:.3f}'
  return f'{value:,}' if isinstance(value, int) else str(value)

