"""A plan past one machine: what steps take of each chip of many.

  python -m benchmarks.plan [--chips=v5e,v6e] [--devices=1,8,64,256] \
      [--rows='LDM sampling,FLUX sampling']

Compiles steps of ImageNet's LDM-4 and of FLUX.1-schnell, as their configs have
them and with all their layers, for slices of TPU chips that are not there, and
prints what each chip holds and sends to others, by the compiler's own account.
Needs libtpu (`make aot` installs it), no weights.

Every chip, or every group of chips that share the weights, has as many images
of its own, whatever their number. FLUX's large weights are shared by 8 chips
where there are so many. Fine-tuning is one update of TALoRA with DFA, whose
teacher and student predict once each; sampling is one step of the packed model.
"""

from absl import flags

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
WORK = {
    'LDM fine-tuning': work_lib.Work(
        imagenet256.get_config, work_lib.tuning, images=2),
    'LDM sampling': work_lib.Work(
        imagenet256.get_config, work_lib.sampling, images=8),
    'FLUX fine-tuning': work_lib.Work(
        flux_schnell.get_config, work_lib.tuning, images=1, model=8,
        finetune={'dtype': 'bfloat16', 'remat': 'blocks'}),
    'FLUX sampling': work_lib.Work(
        flux_schnell.get_config, work_lib.sampling, images=1, model=8)}


def cost(work: work_lib.Work, chip: str, count: int) -> slices.Cost:
  """What the work takes of each of so many chips."""
  layout = slices.layout(chip, count, min(work.model, count))
  return slices.cost(
      *work.step(work_lib.task_of(work, layout.num_parts), layout), count)


def row(name: str, chip: str, count: int) -> list[str]:
  """One line of the table."""
  work, found = WORK[name], cost(WORK[name], chip, count)
  model = min(work.model, count)
  head = [chip, name, f'{count} ({count // model} x {model})',
          f'{work.images * count // model}']
  if found.need is None:
    return [*head, f'{found.flops / 1e12:.1f}', found.lacking, '', '', '']
  return [*head, f'{found.flops / 1e12:.1f}', f'{found.need.kept / 1e9:.2f}',
          f'{found.need.temporary / 1e9:.2f}', f'{found.sent / 1e9:.3f}',
          collectives.summary(found.exchanged)]


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
  for done, one in enumerate(todo, 1):
    rows.append(row(*one))
    progress.update(done)
  print(markdown.table(
      ['chip', 'step', 'chips (data x model)', 'images', 'TFLOP of all',
       'GB kept by a chip', 'GB beside it', 'GB sent by a chip', 'exchanges'],
      rows, aligned=False))


if __name__ == '__main__':
  cli.run(main)
