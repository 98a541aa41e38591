"""Writes report.html: one self-contained page about an evaluation."""

from collections.abc import Mapping
import importlib.resources
import pathlib
from typing import Any

import jinja2
import numpy as np

from msfp_jax.base import devices
from msfp_jax.base import files
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.report import curves
from msfp_jax.report import heat_map
from msfp_jax.report import histograms
from msfp_jax.report import layers_table
from msfp_jax.report import overview
from msfp_jax.report import results_table
from msfp_jax.report import routing
from msfp_jax.report import samples
from msfp_jax.report import sensitivity
from msfp_jax.report import strategies
from msfp_jax.report import timesteps
from msfp_jax.report.section import Experiment
from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

# In the order of the page. Each makes a Section, or None without its data.
SECTIONS = (
    overview.section, results_table.section, heat_map.section, samples.section,
    sensitivity.section, layers_table.section, histograms.section,
    strategies.section, timesteps.section, routing.section, curves.section)


def write(workdir: str, *, experiment: Experiment,
          results: Mapping[str, Any], pictures: Mapping[str, np.ndarray],
          row: str, deployed: packed_lib.PackedModel,
          layers: Mapping[str, spec_lib.LayerSpec], command: str = '') -> None:
  """Writes `workdir`/report.html, whole or not at all.

  Args:
    workdir: of the run; its metrics.jsonl are read.
    experiment: what was evaluated.
    results: the content of results.json.
    pictures: {row: uint8 `[N, H, W, C]`}, 'data' and 'fp' first.
    row: the name of the model that is shown in detail.
    deployed: that model.
    layers: {layer: how it is quantized}; empty in full precision.
    command: that made the evaluation.
  """
  source = Source(workdir, experiment, results, pictures, row, deployed,
                  layers, command)
  sections = [made for make in SECTIONS if (made := make(source)) is not None]
  html = render(title(source), sections)
  devices.by_first(
      lambda: files.write_text(pathlib.Path(workdir) / 'report.html', html),
      'the report is written')


def title(source: Source) -> str:
  """The page's title: the data set, the bits and the recipe shown in detail."""
  dataset = pathlib.PurePath(str(source.results['dataset'])).name
  found = next((row for row in source.results['rows']
                if row['name'] == source.row), None)
  bits = f', W{found["weight_bits"]}A{found["act_bits"]}' if found else ''
  return f'{dataset or "Samples"}{bits}: {source.row}'


def render(heading: str, sections: list[Section]) -> str:
  """Renders the page with everything inline; what sections hold is escaped."""
  # A name that a template misspells is an error, not an empty string.
  # Escaped everywhere: names of layers and commands come from elsewhere.
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader('msfp_jax.report', 'templates'),
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
      lstrip_blocks=True)
  # Style and script stand in the page, which so needs no other file and no
  # network.
  folder = importlib.resources.files('msfp_jax.report') / 'templates'
  return environment.get_template('page.html').render(
      title=heading, sections=sections,
      style=(folder / 'style.css').read_text(encoding='utf-8'),
      script=(folder / 'script.js').read_text(encoding='utf-8'))
