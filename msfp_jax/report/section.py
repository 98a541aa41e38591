"""The parts of a report: the run that it tells of, sections and figures."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import markupsafe
import numpy as np

from msfp_jax import diffusion
from msfp_jax.diffusion import conditions
from msfp_jax.models import denoiser
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.fit import Seen


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The part of an experiment that its report reads.

  Attributes:
    config: all its fields, as plain values.
    model: the full-precision teacher.
    params: its parameters.
    schedule: of the forward process.
    plan: the sampler.
    gather: () -> {layer: what calibration saw of its input}; called by the
      sections that show it.
    gamma: the loss' denoising factor, see `losses.denoising_factors`.
    batch_size: images that the device takes at once.
    key: of the samples' noise.
    draw_condition: what a conditional model is asked for.
  """

  config: Mapping[str, Any]
  model: denoiser.Denoiser
  params: Any
  schedule: diffusion.Schedule
  plan: diffusion.SamplerPlan
  gather: Callable[[], Mapping[str, Seen]]
  gamma: str
  batch_size: int
  key: jax.Array
  draw_condition: conditions.Draw = conditions.none

  # Called late: to gather may mean to run the sampler.
  @property
  def activations(self) -> Mapping[str, Seen]:
    return self.gather()


@dataclasses.dataclass(frozen=True)
class Source:
  """The run that a report tells of, with all that its sections need.

  Attributes:
    workdir: where metrics.jsonl and pretrain/metrics.jsonl may lie.
    experiment: what was evaluated.
    results: the content of results.json.
    pictures: {row: uint8 `[N, H, W, C]`}, 'data' and 'fp' first.
    row: the name of the model that is shown in detail.
    deployed: that model.
    layers: {layer: how it is quantized}; empty in full precision.
    command: that made the evaluation; '' if unknown.
  """

  workdir: str
  experiment: Experiment
  results: Mapping[str, Any]
  pictures: Mapping[str, np.ndarray]
  row: str
  deployed: packed_lib.PackedModel
  layers: Mapping[str, spec_lib.LayerSpec]
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
