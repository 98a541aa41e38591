"""The stages of benchmarks/gpu, in order of worth, and how time is shared."""

import dataclasses
import sys

GRACE = 10.0  # seconds that a stage has to save and leave
RESERVE = 20.0  # of the budget, for what is written at the end


@dataclasses.dataclass(frozen=True)
class Stage:
  """A program of its own, which may die without harm to the others.

  Attributes:
    name: of its folder, its JSON and its log.
    about: what it answers.
    command: what is run, before the flags that `runner` adds.
    limit: seconds that it gets at most; 0: all that is left.
    least: seconds without which it is not begun.
  """

  name: str
  about: str
  command: tuple[str, ...]
  limit: float
  least: float


def _module(name: str) -> tuple[str, ...]:
  return (sys.executable, '-m', f'benchmarks.gpu.{name}')


STAGES = (
    Stage('tests', 'a. does it run: the tests marked gpu',
          _module('check'), 130, 40),
    Stage('kernels', 'b. products, right and then fast, against XLA',
          _module('products'), 270, 60),
    Stage('sampling', 'c. CIFAR-10-size sampling in every way',
          _module('sampling'), 140, 50),
    Stage('demo', "c. make demo's config, trained and evaluated",
          _module('demo'), 100, 40),
    Stage('tuning', 'c. a fine-tuning step, with and without quantization',
          _module('tuning'), 80, 40),
    Stage('teacher', 'd. a teacher of CIFAR-10, as far as it gets',
          _module('teacher'), 0, 60),
)


def choose(names: list[str] | None) -> tuple[Stage, ...]:
  """The stages of these names, in their order; all, without names.

  Raises:
    ValueError: a name that no stage has.
  """
  known = {stage.name for stage in STAGES}
  if unknown := set(names or ()) - known:
    raise ValueError(f'no stage {sorted(unknown)}: there are '
                     f'{[stage.name for stage in STAGES]}')
  return tuple(s for s in STAGES if not names or s.name in names)


def seconds(stage: Stage, left: float) -> float:
  """What a stage gets of the seconds that are left; 0: it is not begun."""
  left -= RESERVE
  given = min(left, stage.limit or left)
  return given if given >= stage.least else 0.0


def plan(stages: tuple[Stage, ...], done: set[str], budget: float) -> list[str]:
  """Says what a call would do, were every stage to take all that it gets."""
  lines, start = [], 0.0
  for stage in stages:
    if stage.name in done:
      said = 'is there'
    elif given := seconds(stage, budget - start):
      said = f'{start:4.0f} to {start + given:4.0f} s at the latest'
      start += given
    else:
      said = f'not begun: needs {stage.least:.0f} s'
    lines.append(f'{stage.name:9} {said:28} {stage.about}')
  return [*lines, f'{"":9} {start:4.0f} to {start + RESERVE:4.0f} s'
          f'{"":16} pieces are written']
