"""Many runs, one table: mean and spread over seeds.

  python -m msfp_jax.run.study --config=configs/digits.py:table \
      --workdir=runs/table

A study is data, an entry of STUDIES in the config's file: its seeds, its
groups (tables) and its rows, each a variant of that config; and perhaps its
`base`, the variant whose other fields all rows share. The same command again
resumes; --seeds=1,2, --groups=skip-8 and --rows=MSFP do a part, so that parts
can run side by side. With --more_features=squeezenet:FILE distances on another
network stand beside the study's own.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import math
import pathlib
import runpy
import statistics
from typing import Any

from absl import flags
from absl import logging
import jax
import ml_collections

from msfp_jax.base import files
from msfp_jax.base import markdown
from msfp_jax.base import progress as progress_lib
from msfp_jax.metrics import results as results_lib
from msfp_jax.run import cli
from msfp_jax.run import config_files
from msfp_jax.run import draws
from msfp_jax.run import eval_settings
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import measure
from msfp_jax.run import methods as methods_lib
from msfp_jax.run import references
from msfp_jax.run import train
from msfp_jax.run import workdir as workdir_lib
from msfp_jax.tune import finetune

_DISTANCE = 'fd_'  # what their metrics begin with, before the network's name
GetConfig = Callable[[str], ml_collections.ConfigDict]

_CONFIG = flags.DEFINE_string(
    'config', None, 'configs/NAME.py:STUDY, a key of STUDIES in that file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for all runs.')
_SEEDS = flags.DEFINE_list('seeds', None, 'Only these of the study.')
_GROUPS = flags.DEFINE_list('groups', None, 'Only these of the study.')
_ROWS = flags.DEFINE_list('rows', None, 'Only these of every group.')
_MORE = {name: flags.DEFINE_list(
    name, None, f'In place of config.eval.{name} of all rows.')
         for name in ('more_features', 'more_references')}


def load_study(text: str) -> tuple[GetConfig, dict[str, Any]]:
  """'configs/NAME.py:STUDY' -> (get_config, the study).

  Raises:
    ValueError: the file has no such study; those it has are listed.
    FileNotFoundError: no such file.
  """
  path, _, name = config_files.find(text).partition(':')
  # By path, as --config is given: a config need not be importable.
  module = runpy.run_path(path)
  studies = module.get('STUDIES', {})
  if name not in studies:
    raise ValueError(f'{path} has no study {name!r}, only {sorted(studies)}')
  return module['get_config'], studies[name]


def run_seed(get_config: GetConfig, study: dict[str, Any], seed: int,
             workdir: str, groups: Sequence[str] | None = None,
             rows: Sequence[str] | None = None) -> None:
  """Runs every (or the given) row of every (or the given) group for one seed.

  Rows that are done are skipped. Writes `workdir`/<seed>/<group>/<row>.json
  beside the row's own workdir.

  Raises:
    errors.WorkdirError: a row was begun with another config.
    ValueError: a row has another model, data, sampler or evaluation.
  """
  #   WORKDIR/0/ends-8/MSFP/        a row's own workdir: spec, checkpoints
  #             ends-8/MSFP.json    its metrics: the row is done
  #             ends-8/fp.json
  #           table.json, table.md
  #
  # Rows of a seed share the teacher, the data, their statistics and the images
  # of full precision: only quantization is done for each.
  base = get_config(study.get('base', ''))
  base.seed = seed
  wanted = {
      pathlib.Path(workdir) / str(seed) / group / label: variant
      for group in groups or study['groups']
      for label, variant in study['groups'][group].items()
      if rows is None or label in rows}
  # All rows are claimed before the first is run: a config that differs ends the
  # study now, and not after a night.
  cfg = eval_settings.EvalSettings(**base.eval)
  eval_settings.check(cfg)
  if cfg.sensitivity_images:
    raise ValueError(
        f'config.eval.sensitivity_images={cfg.sensitivity_images}: a study '
        'has one number in a cell; eval.py measures it')
  todo = _not_done(get_config, base, wanted)
  if not todo:
    return
  with contextlib.ExitStack() as stack:
    # By rows, as parts of a study may run side by side.
    for folder in todo:
      stack.enter_context(workdir_lib.hold(str(folder)))
    # Another part may have finished some before they were held.
    todo = {folder: config for folder, config in todo.items()
            if not _result(folder).is_file()}
    _run_rows(study, base, cfg, todo, seed, workdir)


def _run_rows(study: dict[str, Any], base: ml_collections.ConfigDict,
              cfg: eval_settings.EvalSettings,
              todo: Mapping[pathlib.Path, ml_collections.ConfigDict],
              seed: int, workdir: str) -> None:
  """Runs those rows of a seed that have no result yet."""
  experiment = experiment_lib.load(base, workdir)
  networks = eval_settings.feature_networks(cfg, experiment.image_shape)
  scorer = references.scorer_of(
      cfg, networks, eval_settings.pair_network(cfg, experiment.image_shape),
      experiment.images,
      references.read_given(cfg, networks, experiment.images),
      dataset=base.data.path or base.data.name)
  experiment = experiment.looking_ahead(
      config.quant.recipe for config in todo.values())
  # How long a model takes does not depend on the seed.
  meter = measure.Meter(
      experiment, cfg.layer_images,
      cfg.timing and seed == study['seeds'][0])

  def evaluated(deployed, name, weight_bits, act_bits):
    draw = draws.drawer(experiment, cfg.batch_size, deployed)
    images = draws.draw(experiment, cfg.num_samples, draw, name)
    return {'weight_bits': weight_bits, 'act_bits': act_bits,
            **meter.measure(draw), **scorer.score(images)}

  full = methods_lib.full_precision(experiment)
  # The scorer's first images: all others are compared with these.
  reference = evaluated(full.deployed, f'seed {seed}, fp', full.weight_bits,
                        full.act_bits)
  for group in {folder.parent for folder in todo}:
    files.write_json(group / 'fp.json', reference)
  progress = progress_lib.Progress(
      f'study, seed {seed}', len(todo), every_seconds=0)
  for done, (folder, config) in enumerate(todo.items(), 1):
    logging.info('seed %d, %s, %s', seed, folder.parent.name, folder.name)
    # A variant keeps what calibration saw, so the sampler runs once a seed for
    # it.
    variant = experiment.variant(
        experiment_lib.QuantSettings(**config.quant),
        finetune.FinetuneSettings(**config.finetune))
    deployed = train.quantized(
        variant, train.calibrated_spec(variant, str(folder)), str(folder))
    files.write_json(_result(folder), evaluated(
        deployed, folder.name, config.quant.weight_bits,
        config.quant.act_bits))
    # A row's programs are of no use to the next: kept, those of dozens of rows
    # would fill the memory.
    del deployed
    jax.clear_caches()
    progress.update(done)


def _not_done(get_config: GetConfig, base: ml_collections.ConfigDict,
              wanted: Mapping[pathlib.Path, str]
              ) -> dict[pathlib.Path, ml_collections.ConfigDict]:
  """{workdir: config} of the rows that have no result yet.

  Args:
    get_config: of the study's file.
    base: the study's config, with the seed.
    wanted: {workdir of a row: its variant}; all are claimed.
  """
  todo = {}
  for folder, variant in wanted.items():
    config = get_config(variant)
    config.seed = base.seed
    _check_shared(config, base, folder.name)
    experiment_lib.check(config)
    workdir_lib.prepare(config, str(folder), free=())
    if not _result(folder).is_file():
      todo[folder] = config
  return todo


def _check_shared(config: ml_collections.ConfigDict,
                  base: ml_collections.ConfigDict, label: str) -> None:
  """Rows are measured side by side, so they may differ in two parts only."""
  free = ('quant', 'finetune', 'eval')
  odd = sorted(part for part in base
               if part not in free and config[part] != base[part])
  odd += sorted(f'eval.{field}' for field in base.eval
                if field != 'rows' and config.eval[field] != base.eval[field])
  if odd:
    raise ValueError(f'row {label!r} differs from the study in {odd}: rows may '
                     'differ in quant and finetune only')


def _result(folder: pathlib.Path) -> pathlib.Path:
  """Where the metrics of the row with this workdir go."""
  return folder.with_name(f'{folder.name}.json')


def collect(study: dict[str, Any], seeds: Sequence[int], workdir: str
            ) -> dict[str, dict[str, dict[str, list[float]]]]:
  """{group: {row: {metric: values, one of each seed that is done}}}."""
  found = {}
  for group, rows in study['groups'].items():
    found[group] = {}
    for label in ('fp', *rows):
      values = {}
      for seed in seeds:
        path = pathlib.Path(workdir) / str(seed) / group / f'{label}.json'
        if path.is_file():
          for key, value in results_lib.numbers(files.read_json(
              path, 'delete it, to measure this row again')).items():
            values.setdefault(key, []).append(value)
      found[group][label] = values
  return found


def table(found: dict[str, dict[str, dict[str, list[float]]]],
          metrics: Sequence[str]) -> str:
  """Markdown, a table per group: mean +- standard deviation over seeds.

  Where rows have different numbers of seeds, a column tells how many. Distances
  have columns where they were measured, listed or not.
  """
  there = dict.fromkeys(metric for rows in found.values()
                        for values in rows.values() for metric in values)
  # Distances on other networks than the study lists, and without those on
  # networks that nobody asked for.
  metrics = [
      *(metric for metric in metrics
        if metric in there or not there or not metric.startswith(_DISTANCE)),
      *(metric for metric in there
        if metric.startswith(_DISTANCE) and metric not in metrics)]
  lines = []
  for group, rows in found.items():
    seeds = {label: max(map(len, values.values()), default=0)
             for label, values in rows.items()}
    uneven = len(set(seeds.values())) > 1
    cells = [[label, *(_spread(values.get(metric, [])) for metric in metrics),
              *([str(seeds[label])] if uneven else [])]
             for label, values in rows.items()]
    lines += [f'**{group}**', '', markdown.table(
        ['', *metrics, *(['seeds'] if uneven else [])], cells, aligned=False),
              '']
  return '\n'.join(lines)


def _spread(values: Sequence[float]) -> str:
  if not values:
    return ''
  mean = statistics.fmean(values)
  # Of whole numbers (bits, bytes) the mean alone, of one seed no deviation.
  if isinstance(values[0], int):
    return f'{mean:,.0f}'
  # Small numbers, such as seconds, with three digits.
  digits = 2 if abs(mean) >= 0.1 or not mean else (
      2 - math.floor(math.log10(abs(mean))))
  spread = (f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1
            else '')
  return f'{mean:.{digits}f}{spread}'


def run(text: str, workdir: str, seeds: Sequence[int] | None = None,
        groups: Sequence[str] | None = None,
        rows: Sequence[str] | None = None,
        measured: Mapping[str, Any] | None = None) -> str:
  """Runs a study, or a part of it; returns the table of all that is done.

  Args:
    text: 'configs/NAME.py:STUDY'.
    workdir: of all runs.
    seeds: only these of the study.
    groups: likewise.
    rows: only these of every group.
    measured: fields of config.eval that differ from the study's.

  Raises:
    ValueError: an unknown study, seed, group or row.
  """
  configured, study = load_study(text)

  def get_config(variant: str) -> ml_collections.ConfigDict:
    config = configured(variant)
    config.eval.update(measured or {})
    return config

  labels = dict.fromkeys(label for group in study['groups'].values()
                         for label in group)
  for name, part, known in (('seeds', seeds, study['seeds']),
                            ('groups', groups, study['groups']),
                            ('rows', rows, labels)):
    if part is not None and not part:
      raise ValueError(f'{name}: none is named; leave it out for all')
    if unknown := set(part or ()) - set(known):
      raise ValueError(f'{name} {sorted(unknown)} are not in the study, which '
                       f'has {list(known)}')
  for seed in seeds or study['seeds']:
    run_seed(get_config, study, seed, workdir, groups, rows)
  found = collect(study, study['seeds'], workdir)
  files.write_json(f'{workdir}/table.json', found)
  text = table(found, study['metrics'])
  files.write_text(f'{workdir}/table.md', text)
  return text


def main(unused_argv: Sequence[str]) -> None:
  print(cli.guard(lambda: run(
      _CONFIG.value, _WORKDIR.value, _parse_seeds(_SEEDS.value),
      _GROUPS.value, _ROWS.value,
      {name: tuple(flag.value) for name, flag in _MORE.items()
       if flag.value is not None})))


def _parse_seeds(texts: Sequence[str] | None) -> list[int] | None:
  if not all(text.strip().isdecimal() for text in texts or ()):
    raise ValueError(f'--seeds={texts}: must be whole numbers such as 0,1,2')
  return texts and [int(text) for text in texts]


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
