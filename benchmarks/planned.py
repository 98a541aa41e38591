"""What steps of ImageNet's LDM and of FLUX take of chips; see `plan`."""

from collections.abc import Mapping
import dataclasses
import math

from benchmarks import collectives
from benchmarks import slices
from benchmarks import work as work_lib
from configs import flux_schnell
from configs import imagenet256

STEPS = {
    'LDM fine-tuning': work_lib.PlannedStep(
        imagenet256.get_config, work_lib.tuning, images=2),
    'LDM sampling': work_lib.PlannedStep(
        imagenet256.get_config, work_lib.sampling, images=8),
    'FLUX fine-tuning': work_lib.PlannedStep(
        flux_schnell.get_config, work_lib.tuning, images=1, sharing=8,
        finetune={'dtype': 'bfloat16', 'remat': 'blocks'},
        blocks={'num_layers': 19, 'num_single_layers': 38}),
    'FLUX sampling': work_lib.PlannedStep(
        flux_schnell.get_config, work_lib.sampling, images=1, sharing=8)}


@dataclasses.dataclass(frozen=True)
class Figures:
  """A row's numbers.

  Attributes:
    kept: bytes that a chip holds from step to step.
    temporary: beside them while a step runs; NaN where that is not known.
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


def cost(step: work_lib.PlannedStep, chip: str, count: int) -> slices.Cost:
  """What a step takes of each of so many chips, compiled."""
  layout = slices.layout(chip, count, min(step.sharing, count))
  return slices.cost(
      *step.make(work_lib.task_of(step, layout.num_parts), layout), count)


def figures(step: work_lib.PlannedStep, chip: str, count: int) -> Figures | str:
  """Its numbers, or what the compiler says that a chip lacks."""
  if step.blocks:
    return _by_blocks(step, chip, count)
  found = cost(step, chip, count)
  if found.need is None:
    return found.lacking
  return Figures(found.need.kept, found.need.temporary, found.flops, found.sent,
                 collectives.counts(found.exchanged))


def _by_blocks(step, chip, count):
  """Likewise, from compilations of some blocks of each kind.

  Blocks of a kind compute and hold the same: what one more adds is measured,
  and added as often as the model has one more. What is beside them for a while
  need not grow so, and is not known where it would shrink.
  """
  some = {field: 2 for field in step.blocks}
  of = lambda fields: figures(dataclasses.replace(
      step, fields=tuple(fields.items()), blocks={}), chip, count)
  base = of(some)
  if isinstance(base, str):
    return f'with 2 blocks of a kind: {base}'
  found, most = base, base.temporary
  for field, whole in step.blocks.items():
    more = of(some | {field: 3})
    if isinstance(more, str):
      return f'with 3 blocks of a kind: {more}'
    found = found.plus(more.plus(base, -1), whole - 2)
    most = max(most, more.temporary)
  return (found if found.temporary >= most else
          dataclasses.replace(found, temporary=math.nan))


def row(name: str, chip: str, count: int, whole: bool = False) -> list[str]:
  """One line of the table."""
  step = STEPS[name]
  if whole:
    step = dataclasses.replace(step, blocks={})
  found, sharing = figures(step, chip, count), min(step.sharing, count)
  head = [chip, name, f'{count} ({count // sharing} x {sharing})',
          f'{step.images * count // sharing}']
  if isinstance(found, str):
    return [*head, '', f'does not fit ({found})', '', '', '']
  kept = f'{found.kept / 1e9:.2f}'
  if found.kept + found.temporary > slices.capacity(chip):
    kept += ' (does not fit)'
  return [*head, f'{found.flops / 1e12:.1f}', kept,
          'not known' if math.isnan(found.temporary) else
          f'{found.temporary / 1e9:.2f}', f'{found.sent / 1e9:.3f}',
          collectives.summary(found.counts)]
