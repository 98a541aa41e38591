"""Times whole sampling by packed models and by other ways."""

from collections.abc import Callable, Iterator
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks import packed_models
from msfp_jax import kernels

# name -> (noise `[B, H, W, C]` -> samples, bytes of the weights)
Ways = dict[str, tuple[Callable[..., Any], int]]


def agreement(subject: packed_models.Subject, batch: int) -> float:
  """The relative L2 distance of packed and simulated first predictions."""
  x = jax.random.normal(
      jax.random.key(2), (batch, *packed_models.shape()))
  t = jnp.full(batch, float(subject.packed.plan.timesteps[0]))
  packed, simulated = (np.asarray(jax.jit(
      lambda arrays, model=model: model.with_arrays(arrays).eps_fn(x, t, 0),
      compiler_options=kernels.compiler_options())(model.arrays))
                       for model in (subject.packed, subject.simulated))
  return float(np.linalg.norm(packed - simulated) / np.linalg.norm(simulated))


def measure(ways: Ways, batch: int, num_steps: int, count: int, fell_back: int
            ) -> list[dict[str, Any]]:
  """Measures a row for each way; no speed-ups where layers fell back."""
  x = jax.random.normal(jax.random.key(1), (batch, *packed_models.shape()))
  noise = {name: np.array(x) if 'diffusers' in name else x for name in ways}
  times = machine.rounds({
      name: lambda name=name: ways[name][0](noise[name]) for name in ways},
      count)
  return [{
      'name': name, 'bytes': ways[name][1],
      'bytes_ratio': ways[name][1] / ways['packed'][1],
      'seconds': statistics.median(times[name]) / batch / num_steps,
      'packed_speedup': None if fell_back else machine.ratio(
          times[name], times['packed'])} for name in ways]


def table(rows: list[dict[str, Any]], floor: float | None, fell_back: int
          ) -> Iterator[str]:
  """Formats a Markdown table; `floor` is float32's least time of a step."""
  yield ('| sampling | MB of weights | times packed | ms an image and step | '
         'share of the roofline | packed is faster by |')
  yield '|---|---|---|---|---|---|'
  for row in rows:
    speed = f'{fell_back} layers fell back' if fell_back else (
        f'{row["packed_speedup"]:.2f}x')
    if row['name'] == 'packed':
      speed = ''
    share = '' if floor is None or 'bfloat16' in row['name'] else (
        f'{floor / row["seconds"]:.0%}')
    yield (f'| {row["name"]} | {row["bytes"] / 1e6:.1f} | '
           f'{row["bytes_ratio"]:.1f} | {row["seconds"] * 1e3:.2f} | {share} | '
           f'{speed} |')
