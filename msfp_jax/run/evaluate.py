"""Sampling at scale, metrics, results.json: what quantization cost."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any

from absl import logging
import jax
import ml_collections

from msfp_jax import diffusion
from msfp_jax import report
from msfp_jax.base import devices
from msfp_jax.base import files
from msfp_jax.base import markdown
from msfp_jax.base import pictures
from msfp_jax.base import seal
from msfp_jax.metrics import results as results_lib
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.report import grid
from msfp_jax.run import cluster
from msfp_jax.run import draws
from msfp_jax.run import eval_settings
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import measure
from msfp_jax.run import methods as methods_lib
from msfp_jax.run import references
from msfp_jax.run import sample_store
from msfp_jax.run import workdir as workdir_lib
from msfp_jax.run.eval_settings import EvalSettings


def results_head(config: ml_collections.ConfigDict,
                 plan: diffusion.SamplerPlan,
                 sampler: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of results.json that hold for all rows.

  Args:
    config: of the run.
    plan: its sampler.
    sampler: {field: value} that the plan was made of.
  """
  # Options that do nothing are left out.
  more = {field: sampler[field] for field in (
      'offset', 'clip', 'shift_by_tokens', 'image_tokens', 'shift_terminal')
          if sampler.get(field)}
  if sampler.get('variance', 'small') != 'small':
    more['variance'] = sampler['variance']
  if sampler.get('shift', 1.0) != 1.0:
    more['shift'] = sampler['shift']
  if more.get('shift_by_tokens'):
    more['shift_type'] = sampler['shift_type']
  if config.quant.drift_images:
    more['drift_images'] = config.quant.drift_images
  return {
      'dataset': config.data.path or config.data.name or config.prompts,
      'num_samples': config.eval.num_samples,
      'sampler': sampler['name'],
      'steps': plan.num_steps,
      'eta': config.sampler.eta,
      'spacing': sampler['spacing'],
      'convention': sampler.get('convention', 'ddim'),
      **more,
      'guidance': config.guidance.scale,
      'seed': config.seed,
      'features': config.eval.features,
      'exceptions': str(config.quant.exceptions),
  }


# What an evaluation leaves while it runs, by which the next one goes on. A
# batch is drawn again only if its file is not there, a row only if its metrics
# are not:
#
#   WORKDIR/eval/samples.json       what the samples depend on
#                scores.json        what the metrics depend on beside these
#                reference.npz      statistics of the data
#                fp/000000.uint8    a batch of images, then 000001.uint8, ...
#                msfp/000000.uint8
#                msfp.row.json      a row that is done
#
# In the end results.json holds it all, and the folder is deleted.
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
    workdir: what `train.run` left.
    command: stands in the report.

  Returns:
    The content of results.json.

  Raises:
    ValueError: a row, a reference or a form of files that there is not.
  """
  cfg = EvalSettings(**config.eval)
  cfg = dataclasses.replace(cfg, rows=methods_lib.expand(cfg.rows))
  # All that can be refused comes first, the cheap before the dear, and the
  # claims last, which may delete an earlier evaluation's samples.
  experiment_lib.check(config)
  eval_settings.check(cfg, cluster.layout(config))
  workdir_lib.check(config, workdir)
  with workdir_lib.hold(workdir):
    # Held, so that no training ends in between.
    methods_lib.check_rows(cfg.rows, workdir, config.finetune.num_updates)
    return _run(config, cfg, workdir, command)


def _run(config: ml_collections.ConfigDict, cfg: EvalSettings, workdir: str,
         command: str) -> dict[str, Any]:
  """`run` with settings that were looked at."""
  fields = json.loads(config.to_json_best_effort())
  experiment = experiment_lib.load(config, workdir)
  experiment = experiment.looking_ahead(methods_lib.recipes_of(cfg.rows))
  meter = measure.Meter(experiment, cfg.layer_images, cfg.timing,
                        cfg.sensitivity_images)
  folder = pathlib.Path(workdir) / 'eval'
  scorer = _claim_and_score(
      experiment, cfg, (config.data.name, config.data.path), folder,
      lambda: workdir_lib.prepare(config, workdir, taken=experiment.taken))
  if cfg.num_samples < scorer.least_samples:
    raise ValueError(
        f'config.eval.num_samples={cfg.num_samples}: metrics of '
        f'{", ".join(cfg.networks)} need at least '
        f'{scorer.least_samples} images')
  # First, asked for or not: the scorer compares all later rows with these
  # images.
  names = [methods_lib.FULL_PRECISION] + [
      name for name in cfg.rows if name != methods_lib.FULL_PRECISION]
  results = results_head(config, experiment.plan, experiment.sampler)
  results |= {**scorer.provenance, 'rows': []}
  texts = []
  if experiment.prompts is not None:
    texts = experiment.prompts.texts_of(min(cfg.pictures, cfg.num_samples))
    results |= {'num_prompts': len(experiment.prompts),
                'prompts_digest': experiment.prompts.digest, 'prompts': texts}
  shown = {}
  if experiment.images is not None:
    shown['data'] = experiment.images[:cfg.pictures]
  for name in names:
    samples = _store(experiment, cfg, folder, name)
    content, last = _evaluate_row(
        experiment, cfg, workdir, name, samples, scorer, meter)
    results['rows'].append(content)
    shown[name] = samples[:cfg.pictures]
  if devices.is_first():
    pictures.save_png(f'{workdir}/samples/methods.png', grid.labelled(
        shown, texts=texts))
    files.write_json(f'{workdir}/results.json', results)
  if cfg.report:
    # Also where the last row was done by an earlier run, which kept its metrics
    # only.
    if name == methods_lib.PACKED or last is None:
      # Details are those of the simulation: the last row that is one.
      name = [n for n in names if n != methods_lib.PACKED][-1]
      last = methods_lib.make_row(experiment, name, workdir)
    report.write(
        workdir, experiment=_reported(experiment, cfg.batch_size, fields),
        results=results, pictures=shown, row=last.name, deployed=last.deployed,
        layers=last.spec.layers if last.spec else {}, command=command)
  # Only now that everything is written: until here a stop costs one batch.
  devices.wait('all have read what they show')
  devices.by_first(
      lambda: sample_store.discard(folder), 'the evaluation is complete')
  return results


def _reported(experiment: experiment_lib.Experiment, batch_size: int,
              fields: dict[str, Any]) -> report.Experiment:
  """The part of an experiment that the report reads."""
  return report.Experiment(
      config=fields, model=experiment.model, params=experiment.params,
      schedule=experiment.schedule, plan=experiment.plan,
      # Called by sections that show inputs: a run of the sampler that others
      # need not wait for.
      gather=lambda: experiment.activations, gamma=experiment.finetune.gamma,
      batch_size=batch_size, key=experiment.key(experiment_lib.SAMPLES),
      draw_condition=experiment.draw_condition)


def _claim_and_score(experiment: experiment_lib.Experiment, cfg: EvalSettings,
                     source: tuple[str, str], folder: pathlib.Path,
                     prepare: Callable[[], Any]) -> scorer_lib.Several:
  """The scorer; what can be refused is refused before samples are deleted.

  Args:
    experiment: what is evaluated.
    cfg: how.
    source: name and path of the data.
    folder: of this evaluation.
    prepare: claims the workdir.
  """
  images = experiment.images
  networks = eval_settings.feature_networks(cfg, experiment.image_shape)
  pair_network = eval_settings.pair_network(cfg, experiment.image_shape)
  name, path = source
  # A reference file may be of another network, and without data there may be
  # none: to be known before `claim`. Statistics of the data are measured after
  # it, into the folder that it may delete.
  given = references.read_given(
      cfg, networks, images, needed=experiment.prompts is None)
  samples = {
      # Not of the config alone: the rest is as the checkpoint has it.
      'plan': experiment.plan.to_dict(),
      'num_samples': cfg.num_samples, 'batch_size': cfg.batch_size,
      'devices': jax.device_count(), **_sharing(experiment.layout),
      'backend': jax.default_backend(), 'jax': jax.__version__}
  scores = {
      'pictures': cfg.pictures, 'keep': cfg.keep, 'vectors': cfg.vectors,
      'layer_images': cfg.layer_images, 'timing': cfg.timing,
      'sensitivity_images': cfg.sensitivity_images,
      'network': networks[0].provenance,
      'more': [network.provenance for network in networks[1:]],
      **({'pairs': pair_network.provenance} if pair_network else {}),
      'references': references.identities(cfg, networks, [
          *source, *(() if images is None else images.shape)])}
  prepare()
  devices.by_first(lambda: sample_store.claim(folder, samples, scores),
                   'the samples are claimed')
  return references.scorer_of(
      cfg, networks, pair_network, images, given, dataset=path or name,
      folder=folder)


def _sharing(layout: devices.Layout) -> dict[str, int]:
  """How many devices share weights, where some do: other programs."""
  count = layout.num_sharing
  return {} if count == 1 else {'sharing': count}


def _store(experiment: experiment_lib.Experiment, cfg: EvalSettings,
           folder: pathlib.Path, name: str) -> sample_store.SampleStore:
  return sample_store.SampleStore(
      folder / sample_store.folder_name(name), cfg.num_samples, cfg.batch_size,
      experiment.image_shape)


def _evaluate_row(experiment: experiment_lib.Experiment, cfg: EvalSettings,
                  workdir: str, name: str, samples: sample_store.SampleStore,
                  scorer: scorer_lib.Several, meter: measure.Meter
                  ) -> tuple[dict[str, Any], methods_lib.Row | None]:
  """The row of results.json; draws what is missing of the samples.

  A finished row keeps its metrics and the samples that are shown. All of the
  full-precision model's samples stay: the other rows are compared with them.

  Returns:
    Its content, and the model if it had to be made.
  """
  # Beside the folder of samples: its existence is the mark of a finished row.
  path = samples.folder.with_name(samples.folder.name + sample_store.ROW)
  if devices.agreed(path.is_file()):
    return seal.read_json(path, 'delete it, to draw and measure this row '
                          'again'), None
  row = methods_lib.make_row(experiment, name, workdir)
  draw = draws.drawer(experiment, cfg.batch_size, row.deployed)
  draws.fill(experiment, draw, samples, f'sample {name}')
  try:
    found = scorer.score(samples)
  except ValueError as error:
    raise ValueError(f'row {name!r}: {error}; its samples are in '
                     f'{samples.folder}') from error
  logging.info('%s: %s', name, ', '.join(
      f'{key} {value:.4g}' for key, value in found.items()))
  if cfg.keep and devices.is_first():
    suffix, save = sample_store.FORMS[cfg.keep]
    save(f'{workdir}/samples/{samples.folder.name}{suffix}', samples)
  content = {'name': name, 'weight_bits': row.weight_bits,
             'act_bits': row.act_bits, **found, **meter.measure(draw),
             **meter.sensitivity(row.deployed, row.spec, name)}
  # Full precision is scored anew by every run, from all its stored images: the
  # scorer has to have seen them.
  if name != methods_lib.FULL_PRECISION:
    devices.by_first(lambda: seal.write_json(path, content), f'{name} is done')
    if devices.is_first():
      samples.keep_first(cfg.pictures)
  return content, row


def table(results: dict[str, Any]) -> str:
  """results.json as an aligned Markdown table."""
  found = results_lib.table(results)
  return markdown.table(['name', *found.columns], [
      [name, *cells.values()]
      for name, cells in zip(found.names, found.cells, strict=True)])
