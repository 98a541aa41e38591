"""Whether a packed model draws the images of its simulation.

  python train.py --config=configs/digits.py:demo --workdir=runs/demo
  python -m benchmarks.agreement --workdir=runs/demo [--output=agreement.json]

Both models of a finished run draw the same noise, for several seeds. Prints the
peak signal-to-noise ratio between their images (of [-1, 1], before they are
rounded to 8 bits; float32 sums differ by roundings, and where one moves an
input across the border of two levels the difference grows along a trajectory)
and each model's Frechet distance to the data, beside its spread over the seeds.
"""

from collections.abc import Sequence
import functools
import json
import pathlib
from typing import Any

from absl import flags
import jax
import ml_collections
import numpy as np

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import files
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import similarity
from msfp_jax.run import cli
from msfp_jax.run import eval_settings
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import methods as methods_lib
from msfp_jax.run import references

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a finished train.py.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds of the noise.')
_IMAGES = flags.DEFINE_integer('images', 512, 'Images for each seed.')
_BATCH = flags.DEFINE_integer('batch', 128, 'Images at once.')
_OUTPUT = flags.DEFINE_string('output', 'agreement.json', 'Where figures go.')

_CAP = 150.0  # dB; what equal floats count as


def draw(model: Any, plan: diffusion.SamplerPlan, shape: tuple[int, ...],
         seed: int) -> np.ndarray:
  """Samples images `[N, H, W, C]` from the noise of a seed."""
  @functools.partial(jax.jit, compiler_options=kernels.compiler_options())
  def sample(arrays, noise):
    ours = model.with_arrays(arrays)
    return diffusion.sample(
        ours.eps_fn_of(), plan, noise, memory=ours.memory(noise))

  key, images = jax.random.key(seed), []
  for i in range(-(-_IMAGES.value // _BATCH.value)):
    noise = jax.random.normal(
        jax.random.fold_in(key, i), (_BATCH.value, *shape))
    images.append(np.asarray(sample(model.arrays, noise)))
  return np.concatenate(images)[:_IMAGES.value]


def distance(scorer: scorer_lib.Scorer, images: np.ndarray) -> float:
  """The Frechet distance of images of [-1, 1] to the data."""
  return scorer.score(np.asarray(data.to_uint8(images)))[scorer.metric]


def main(unused_argv: Sequence[str]) -> None:
  cli.need(workdir=_WORKDIR.value)
  workdir = pathlib.Path(_WORKDIR.value)
  config = ml_collections.ConfigDict(
      json.loads((workdir / 'config.json').read_text()))
  experiment = experiment_lib.load(config, str(workdir))
  cfg = eval_settings.EvalSettings(**config.eval)
  network, *_ = eval_settings.feature_networks(cfg, experiment.image_shape)
  scorer = scorer_lib.Scorer(network, references.reference_of(
      experiment.images, network, dataset=config.data.path or config.data.name,
      file=cfg.reference, num_vectors=cfg.vectors))
  models = [methods_lib.make_row(experiment, name, str(workdir)).deployed
            for name in (methods_lib.TUNED, methods_lib.PACKED)]
  rows = []
  print('| seed | mean PSNR, dB | lowest | below 40 dB | of all images | '
        'distance, simulated | packed |\n' + '|---' * 7 + '|')
  for seed in range(_SEEDS.value):
    drawn = [draw(model, experiment.plan, experiment.image_shape, seed)
             for model in models]
    shown = [np.clip(x, -1, 1) for x in drawn]
    decibels = similarity.decibels(*shown, peak=2, cap=_CAP)
    everything = similarity.decibels(
        *(x[None] for x in shown), peak=2, cap=_CAP)
    row = {
        'seed': seed, 'psnr_mean': float(decibels.mean()),
        'psnr_min': float(decibels.min()),
        'below_40_db': int((decibels < 40).sum()),
        'psnr_of_all': float(everything[0]),
        'distances': [distance(scorer, x) for x in drawn]}
    rows.append(row)
    print(f'| {seed} | {row["psnr_mean"]:.1f} | {row["psnr_min"]:.1f} | '
          f'{row["below_40_db"]} of {len(decibels)} | {row["psnr_of_all"]:.1f} '
          '| ' + ' | '.join(f'{d:.3f}' for d in row['distances']) + ' |',
          flush=True)
  simulated, packed = np.array([row['distances'] for row in rows]).T
  print(f'Distances of packed and simulated differ by up to '
        f'{np.abs(simulated - packed).max():.3f}, over the seeds by '
        f'{np.ptp(simulated):.3f}.')
  files.write_json(_OUTPUT.value, rows)


if __name__ == '__main__':
  cli.run(main)
