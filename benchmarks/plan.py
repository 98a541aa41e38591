"""A plan past one machine: what steps take of each chip of many.

  python -m benchmarks.plan [--chips=v5e,v6e] [--devices=1,8,64,256] \
      [--rows='LDM sampling,FLUX sampling'] [--whole] [--jobs=1]

Compiles steps of ImageNet's LDM-4 and of FLUX.1-schnell for slices of TPU chips
that are not there, and prints what each chip holds and sends to others, by the
compiler's own account. Needs libtpu (`make aot` installs it), no weights.

Sampling is one step of the packed model. Fine-tuning is one update of TALoRA
with DFA, whose teacher and student predict once each; of FLUX, whose config has
none, in bfloat16 and with rematerialised blocks. Each chip (of FLUX each 8
chips, which share the large weights) has as many images of its own, whatever
their number. Tables of prompts are left out.

Programs are compiled in a hurry (`slices.cost`). To fine-tune FLUX two or three
of its blocks of each kind are compiled, and what one more of them adds counts
for the rest; with --whole all are, which takes many minutes.
"""

from collections.abc import Mapping
from concurrent import futures
import dataclasses
import multiprocessing

from absl import flags
from absl import logging

from benchmarks import collectives
from benchmarks import slices
from benchmarks import work as work_lib
from configs import flux_schnell
from configs import imagenet256
from msfp_jax.base import markdown
from msfp_jax.base import progress as progress_lib
from msfp_jax.run import cli

_CHIPS = flags.DEFINE_list('chips', list(slices.CHIPS), 'Kinds of chips.')
_DEVICES = flags.DEFINE_list(
    'devices', [str(count) for count in slices.SHAPES], 'Chips of a slice.')
_ROWS = flags.DEFINE_list('rows', None, 'Only these of WORK.')
_JOBS = flags.DEFINE_integer(
    'jobs', 1, 'Steps that are compiled at once.', lower_bound=1)
_WHOLE = flags.DEFINE_bool('whole', False, 'Compile all blocks of FLUX.')
WORK = {
    'LDM fine-tuning': work_lib.Work(
        imagenet256.get_config, work_lib.tuning, images=2),
    'LDM sampling': work_lib.Work(
        imagenet256.get_config, work_lib.sampling, images=8),
    'FLUX fine-tuning': work_lib.Work(
        flux_schnell.get_config, work_lib.tuning, images=1, model=8,
        finetune={'dtype': 'bfloat16', 'remat': 'blocks'},
        blocks={'num_layers': 19, 'num_single_layers': 38}),
    'FLUX sampling': work_lib.Work(
        flux_schnell.get_config, work_lib.sampling, images=1, model=8)}


@dataclasses.dataclass(frozen=True)
class Figures:
  """A row's numbers.

  Attributes:
    kept: bytes that a chip holds from step to step.
    temporary: beside them while a step runs.
    flops: of the program, see `slices.Cost`.
    sent: bytes that a chip sends to others.
    counts: {kind of exchange: how often}.
  """

  kept: float
  temporary: float
  flops: float
  sent: float
  counts: Mapping[str, float]

  def plus(self, other: 'Figures', times: float) -> 'Figures':
    """The sum of these and of `times` the other ones."""
    counts = {kind: self.counts[kind] + times * other.counts[kind]
              for kind in self.counts}
    return Figures(*(
        getattr(self, field) + times * getattr(other, field)
        for field in ('kept', 'temporary', 'flops', 'sent')), counts)


def cost(work: work_lib.Work, chip: str, count: int) -> slices.Cost:
  """What the work takes of each of so many chips, compiled."""
  layout = slices.layout(chip, count, min(work.model, count))
  return slices.cost(
      *work.step(work_lib.task_of(work, layout.num_parts), layout), count)


def figures(work: work_lib.Work, chip: str, count: int) -> Figures | str:
  """Its numbers, or what the compiler says that a chip lacks."""
  if work.blocks:
    return _by_blocks(work, chip, count)
  found = cost(work, chip, count)
  if found.need is None:
    return found.lacking
  return Figures(found.need.kept, found.need.temporary, found.flops, found.sent,
                 collectives.counts(found.exchanged))


def _by_blocks(work, chip, count):
  """Likewise, from compilations of some blocks of each kind.

  Blocks of a kind compute and hold the same: what one more adds is measured,
  and added as often as the model has one more.
  """
  some = {field: 2 for field in work.blocks}
  base = figures(work_lib.with_model(work, some), chip, count)
  if isinstance(base, str):
    return f'with 2 blocks of a kind: {base}'
  found = base
  for field, whole in work.blocks.items():
    more = figures(work_lib.with_model(work, some | {field: 3}), chip, count)
    if isinstance(more, str):
      return f'with 3 blocks of a kind: {more}'
    found = found.plus(more.plus(base, -1), whole - 2)
  return found


def row(name: str, chip: str, count: int, whole: bool = False) -> list[str]:
  """One line of the table."""
  work = WORK[name]
  if whole:
    work = dataclasses.replace(work, blocks={})
  found, model = figures(work, chip, count), min(work.model, count)
  head = [chip, name, f'{count} ({count // model} x {model})',
          f'{work.images * count // model}']
  if isinstance(found, str):
    return [*head, '', f'does not fit ({found})', '', '', '']
  kept = f'{found.kept / 1e9:.2f}'
  if found.kept + found.temporary > slices.capacity(chip):
    kept += ' (does not fit)'
  return [*head, f'{found.flops / 1e12:.1f}', kept,
          f'{found.temporary / 1e9:.2f}', f'{found.sent / 1e9:.3f}',
          collectives.summary(found.counts)]


def _row(task: tuple[str, str, int], whole: bool) -> list[str]:
  """`row`, in a process that was started for it."""
  return row(*task, whole)


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  names = _ROWS.value or list(WORK)
  if unknown := set(names) - WORK.keys():
    raise ValueError(f'--rows={",".join(sorted(unknown))}: must be of '
                     f'{", ".join(WORK)}')
  todo = [(name, chip, int(count)) for chip in _CHIPS.value
          for name in names for count in _DEVICES.value]
  for _, chip, count in todo:
    slices.layout(chip, count)  # refused before minutes of compiling
  progress = progress_lib.Progress('steps compiled', len(todo), every_seconds=0)
  rows = []
  # Each in a process of its own: libtpu gives back no memory, gigabytes a step.
  with futures.ProcessPoolExecutor(
      _JOBS.value, multiprocessing.get_context('spawn'),
      max_tasks_per_child=1) as pool:
    for found in pool.map(_row, todo, [_WHOLE.value] * len(todo)):
      rows.append(found)
      # As they come: the last may take long, or be interrupted.
      logging.info('| %s |', ' | '.join(found))
      progress.update(len(rows))
  print(markdown.table(
      ['chip', 'step', 'chips (data x model)', 'images', 'TFLOP in all',
       'GB kept by a chip', 'GB beside it', 'GB sent by a chip', 'exchanges'],
      rows, aligned=False))


if __name__ == '__main__':
  cli.run(main)
