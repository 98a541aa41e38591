"""The parts of a report: the run that it tells of, sections and figures."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import markupsafe
import numpy as np

from msfp_jax.run import experiment as experiment_lib
from msfp_jax.tune import student as student_lib


@dataclasses.dataclass(frozen=True)
class Source:
  """The run that a report tells of, with all that its sections need.

  Attributes:
    workdir: where metrics.jsonl and pretrain/metrics.jsonl may lie.
    experiment: the teacher, its sampler and its calibration activations.
    results: the content of results.json.
    pictures: {row: uint8 `[N, H, W, C]`}, 'data' and 'fp' first.
    row: the name of the model that is shown in detail.
    deployed: that model.
    command: that made the evaluation; '' if unknown.
  """

  workdir: str
  experiment: experiment_lib.Experiment
  results: Mapping[str, Any]
  pictures: Mapping[str, np.ndarray]
  row: str
  deployed: student_lib.Deployed
  command: str = ''


@dataclasses.dataclass(frozen=True)
class Figure:
  """A drawing and the sentences below it."""

  svg: markupsafe.Markup
  caption: str


@dataclasses.dataclass(frozen=True)
class Section:
  """One part of the page.

  Attributes:
    id: of its HTML element.
    title: its heading.
    template: the file in templates/ that lays it out.
    content: what that file shows.
    short: its name in the navigation.
  """

  id: str
  title: str
  short: str
  template: str
  content: Mapping[str, Any]


def figures(id: str, title: str, short: str, text: str,
            drawn: list[Figure]) -> Section:
  """A section of a paragraph and figures."""
  return Section(id, title, short, 'figures.html',
                 {'text': text, 'figures': drawn})
