"""The section that compares losses with the quality gap by step (figure 3)."""

import dataclasses

import jax
import numpy as np

from msfp_jax import diffusion
from msfp_jax.diffusion import conditions
from msfp_jax.packed import model as packed_lib
from msfp_jax.report import gap
from msfp_jax.report import numbers
from msfp_jax.report import section as section_lib
from msfp_jax.report import svg
from msfp_jax.report.section import Source
from msfp_jax.tune import losses

_MAX_IMAGES = 32


def measure(experiment: section_lib.Experiment,
            deployed: packed_lib.PackedModel) -> gap.Gaps:
  """The gaps of a model on one batch of noise of its own, float64 `[S]`."""
  count = min(experiment.batch_size, _MAX_IMAGES)
  # No batch of samples has this number, so these images are others than the
  # table's.
  key = jax.random.fold_in(experiment.key, 2**31 - 1)

  # Weights are arguments: constants would be folded at compile time.
  @jax.jit
  def run(params, arrays, key, draw):
    # Its drift is of its own trajectories, and not of the teacher's.
    model = dataclasses.replace(deployed.with_arrays(arrays), drift=None)
    noise = jax.random.normal(
        jax.random.fold_in(key, 0), (count, *experiment.model.sample_shape))
    condition = draw(jax.random.fold_in(key, 2), count)
    return gap.along_trajectory(
        lambda x, t, index: experiment.model.apply(
            {'params': params}, x, t, *condition),
        model.eps_fn_of(*condition), experiment.plan, noise,
        jax.random.fold_in(key, 1), model.memory(noise, *condition))

  return jax.tree.map(lambda a: np.asarray(a, np.float64), run(
      experiment.params, deployed.arrays, key,
      conditions.as_argument(experiment.draw_condition)))


def shares(values: np.ndarray) -> np.ndarray:
  """Scales values `[S]` to percent of their sum; zeros where all are 0."""
  total = values.sum()
  return 100 * values / total if total > 0 else np.zeros(len(values))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
  """The percentage that two distributions over steps have in common."""
  return float(np.minimum(shares(a), shares(b)).sum())


def section(source: Source) -> section_lib.Section | None:
  layers = source.layers.values()
  if not any(layer.quantized for layer in layers):
    return None
  experiment = source.experiment
  # A run without factors still shows what they would have been.
  variant = experiment.gamma
  if variant == 'none':
    variant = 'sampler'
  gamma = losses.denoising_factors(
      experiment.schedule, experiment.plan, variant)
  found = measure(experiment, source.deployed)
  t = experiment.plan.timesteps
  # What a sampler's step multiplies with gamma_t.
  what = ('velocity' if isinstance(experiment.schedule, diffusion.FlowSchedule)
          else 'noise')
  text = (
      f'The model {source.row} and full precision, step by step: both predict '
      f'the {what} at the x_t of trajectories that full precision drives. The '
      'quality gap of a step is the mean squared difference between the two '
      f'samples that these predictions step to: the MSE of the {what} times '
      f'the square of the factor that the step multiplies into the {what} (our '
      'measure, after figure 3 of the paper). A loss that says where the gap '
      'is made has the gap\'s shape; what the two shapes share is given with '
      f'each drawing. gamma_t, the {variant!r} denoising factor, weights with '
      'the factor itself, scaled to mean 1.')
  drawn = [
      # Three views: what the plain loss sees, what the weighted one sees, and
      # both in their own units.
      _shape('timesteps-plain', t, f'MSE of the {what}', found.eps,
             found.step),
      _shape('timesteps-gamma', t, 'MSE times gamma_t', gamma * found.eps,
             found.step),
      _absolute('timesteps-absolute', t, what, gamma, found)]
  return section_lib.figures(
      'timesteps', 'Loss and quality gap over timesteps', 'Timesteps', text,
      drawn)


def _axes(figure, t):
  """Makes axes over timesteps in the order of sampling: noise on the left."""
  axes = figure.add_subplot()
  axes.set_xlabel('timestep t (sampling goes from left to right)')
  margin = 0.02 * t.max() or 1
  axes.set_xlim(t.max() + margin, -margin)
  return axes


def _shape(id: str, t: np.ndarray, name: str, loss: np.ndarray,
           step: np.ndarray) -> section_lib.Figure:
  common = f'{overlap(loss, step):.0f}%'
  tops = [_at(t[np.argmax(values)]) for values in (loss, step)]
  label = (f'Share of {name} and of the quality gap by timestep. {name} is '
           f'largest at {tops[0]}, the gap at {tops[1]}; the two shapes '
           f'share {common}.')
  caption = (f'{name} and quality gap, each in percent of its sum over the '
             f'{len(t)} steps. Largest at {tops[0]} and {tops[1]}; they share '
             f'{common}.')

  def paint(figure):
    axes = _axes(figure, t)
    for values, text, colour, dash, marker in (
        (loss, name, svg.BLUE, *_line(0)),
        (step, 'quality gap', svg.ORANGE, *_line(1))):
      axes.plot(t, shares(values), color=colour, linestyle=dash, label=text,
                marker=marker, markersize=4)
    axes.set_ylabel('% of the sum')
    axes.set_ylim(-2)
    svg.legend_above(axes)

  return section_lib.Figure(svg.draw(id, 250, label, paint), caption)


def _absolute(id: str, t: np.ndarray, what: str, gamma: np.ndarray,
              found: gap.Gaps) -> section_lib.Figure:
  series = {f'MSE of the {what}': found.eps,
            'MSE times gamma_t': gamma * found.eps,
            'quality gap': found.step}
  ends = '; '.join(
      f'{name} {numbers.significant(values[0])} at {_at(t[0])}, '
      f'{numbers.significant(values[-1])} at {_at(t[-1])}'
      for name, values in series.items())
  label = f'The same three quantities by timestep, as they are: {ends}.'
  caption = (f'The same as they are: squared units of the {what} and of x, '
             f'logarithmic. {ends}.')

  def paint(figure):
    axes = _axes(figure, t)
    for i, (name, colour) in enumerate(zip(
        series, (svg.BLUE, svg.GREEN, svg.ORANGE), strict=True)):
      # A logarithmic axis has no place for 0: the line is broken there.
      values = np.where(series[name] > 0, series[name], np.nan)
      dash, marker = _line(i)
      axes.plot(t, values, color=colour, linestyle=dash, label=name,
                marker=marker, markersize=4)
    svg.log_axis(axes, 'y')
    axes.set_ylabel('mean squared difference')
    svg.legend_above(axes, 1)

  return section_lib.Figure(svg.draw(id, 280, label, paint), caption)


def _at(t: float) -> str:
  return f't\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{numbers.timestep(t)}'


def _line(i: int):
  return svg.DASHES[i], svg.MARKERS[i]
