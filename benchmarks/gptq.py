"""GPTQ against rounding to nearest: every layer of digits16, every format.

  python -m benchmarks.gptq

Prints a Markdown table with a row for the weights of each recipe: on how many
layers the output errs less by GPTQ, and its error as a share of that of
rounding to nearest, by the inputs that calibration sees.
"""

import statistics

import jax
import numpy as np

import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.base import markdown
from msfp_jax.base import progress as progress_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import gptq
from msfp_jax.quant import interception
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant.fit import Seen
from msfp_jax.run import cli

_BITS = 4
_STEPS = 20  # of DDIM, whose inputs are seen


def digits16(images: int = 64
             ) -> tuple[dict[str, np.ndarray], dict[str, Seen]]:
  """{layer: kernel} of the shipped model, and what its layers' inputs were."""
  model, params = msfp.load_pretrained('digits16')
  noise = jax.random.normal(
      jax.random.key(0), (images, *model.sample_shape))
  plan = diffusion.ddim_plan(diffusion.make_schedule(
      'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02), _STEPS)
  seen = observe.collect(model, params, plan, [noise], needs=('gram',),
                         key=jax.random.key(1))
  return jax.device_get(interception.leaves(params, 'kernel')), seen


def shares(of: fit_lib.Fit, kernels: dict[str, np.ndarray],
           seen: dict[str, Seen]) -> list[float]:
  """The output error by GPTQ, over that of rounding to nearest, by layer."""
  found = []
  for name, kernel in kernels.items():
    quantizer = fit_lib.fit(of, Seen.of_weights(kernel), _BITS, -2).quantizer
    nearest, better = (
        np.asarray(fit_lib.restored(quantizer, kernel, -2)),
        np.asarray(gptq.round_weights(
            kernel, quantizer, seen[name].gram).bank(0).dequantize()))
    before, after = (gptq.output_error(kernel, weights, seen[name].gram)
                     for weights in (nearest, better))
    found.append(after / before)
  return found


def main(argv):
  del argv
  kernels, seen = digits16()
  # Recipes that differ by their inputs alone have the same weights.
  fits = {}
  for name, recipe in recipes.RECIPES.items():
    fits.setdefault(recipe.weight, []).append(name)
  progress = progress_lib.Progress('GPTQ, recipes', len(fits))
  rows = []
  for done, (of, names) in enumerate(fits.items(), 1):
    found = shares(of, kernels, seen)
    rows.append([', '.join(names),
                 f'{sum(share < 1 for share in found)} of {len(found)}',
                 f'{statistics.median(found):.2f}', f'{min(found):.2f}',
                 f'{max(found):.3f}'])
    progress.update(done)
  print(markdown.table(
      ['recipes', 'layers that err less', 'median share', 'least', 'most'],
      rows))


if __name__ == '__main__':
  cli.run(main)
