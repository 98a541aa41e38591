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

from concurrent import futures
import multiprocessing

from absl import flags
from absl import logging

from benchmarks import planned
from benchmarks import slices
from msfp_jax.base import markdown
from msfp_jax.base import progress as progress_lib
from msfp_jax.run import cli

_CHIPS = flags.DEFINE_list('chips', list(slices.CHIPS), 'Kinds of chips.')
_DEVICES = flags.DEFINE_list(
    'devices', [str(count) for count in slices.SHAPES], 'Chips of a slice.')
_ROWS = flags.DEFINE_list('rows', None, 'Only these of planned.STEPS.')
_JOBS = flags.DEFINE_integer(
    'jobs', 1, 'Steps that are compiled at once.', lower_bound=1)
_WHOLE = flags.DEFINE_bool('whole', False, 'Compile all blocks of FLUX.')


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  names = _ROWS.value or list(planned.STEPS)
  if unknown := set(names) - planned.STEPS.keys():
    raise ValueError(f'--rows={",".join(sorted(unknown))}: must be of '
                     f'{", ".join(planned.STEPS)}')
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
    for found in pool.map(
        planned.row, *zip(*todo, strict=True), [_WHOLE.value] * len(todo)):
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
