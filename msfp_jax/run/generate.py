"""Images from a model, batch by batch, on all devices."""

from collections.abc import Callable, Iterable, Iterator
import functools

import jax
import numpy as np

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import devices
from msfp_jax.base import progress as progress_lib
from msfp_jax.diffusion import conditions
from msfp_jax.packed import model as packed_lib


def batches(deployed: packed_lib.PackedModel, plan: diffusion.SamplerPlan,
            numbers: Iterable[int], batch_size: int, shape: tuple[int, ...],
            key: jax.Array, name: str = 'sample', *,
            draw_condition: conditions.Draw = conditions.none,
            decode: Callable[[jax.Array], jax.Array] | None = None
            ) -> Iterator[np.ndarray]:
  """Draws batches of images; batch i depends on the key and i alone.

  Args:
    deployed: the model.
    plan: the sampler.
    numbers: which batches.
    batch_size: images in each, a multiple of the number of devices.
    shape: of a sample, `[H, W, C]`.
    key: folded with the batch's number. Of what that gives, 0 is the noise
      that samples start from, 1 that of the sampler's steps, 2 the condition.
    name: for error messages.
    draw_condition: of every batch, for conditional models.
    decode: latents -> images in [-1, 1]; None where samples are images.

  Yields:
    uint8 images `[batch_size, H, W, C]`.

  Raises:
    ValueError: a batch that cannot be split, or samples that are NaN or
      infinite.
  """
  devices.check_batch('batch_size', batch_size)
  sharding = devices.batch_sharding()

  # Weights are arguments: constants would be folded at compile time.
  @functools.partial(jax.jit, compiler_options=kernels.compiler_options())
  def draw(arrays, key):
    model = deployed.with_arrays(arrays)
    # Drawn inside of the program and by the batch's own key: which batches are
    # drawn, and in which order, is of no account to a batch.
    noise = jax.random.normal(
        jax.random.fold_in(key, 0), (batch_size, *shape))
    if sharding is not None:
      noise = jax.lax.with_sharding_constraint(noise, sharding)
    condition = draw_condition(jax.random.fold_in(key, 2), batch_size)
    return diffusion.sample(
        lambda x, t, index: model.eps_fn(x, t, index, *condition), plan, noise,
        jax.random.fold_in(key, 1))

  # Copied once, not with every batch.
  arrays = devices.on_all(deployed.arrays)
  for number in numbers:
    x = draw(arrays, jax.random.fold_in(key, number))
    # Before anything becomes uint8, in which NaN would be a pixel like any.
    _check_finite(x, name, number)
    if decode is not None:
      x = decode(x)
      _check_finite(x, name, number)
    yield np.asarray(data.to_uint8(x))


def generate(deployed: packed_lib.PackedModel, plan: diffusion.SamplerPlan,
             num_samples: int, batch_size: int, shape: tuple[int, ...],
             key: jax.Array, name: str = 'sample', **options) -> np.ndarray:
  """Draws images, all in memory; see `batches`.

  Args:
    deployed: the model.
    plan: the sampler.
    num_samples: how many; the last batch may be partial.
    batch_size: images at once.
    shape: of a sample, `[H, W, C]`.
    key: of the noise.
    name: for progress lines.
    **options: `draw_condition` and `decode` of `batches`.

  Returns:
    uint8 images `[num_samples, H, W, C]`.

  Raises:
    ValueError: num_samples < 1, or as `batches`.
  """
  count = num_batches(num_samples, batch_size)
  progress = progress_lib.Progress(name, num_samples, unit='images')
  images = []
  for batch in batches(deployed, plan, range(count), batch_size, shape, key,
                       name, **options):
    images.append(batch)
    progress.update(min(len(images) * batch_size, num_samples))
  return np.concatenate(images)[:num_samples]


def num_batches(num_samples: int, batch_size: int) -> int:
  """Batches that hold `num_samples`. Raises ValueError if there are none."""
  if num_samples < 1 or batch_size < 1:
    raise ValueError(f'num_samples={num_samples}, batch_size={batch_size}: '
                     'must be at least 1')
  return -(-num_samples // batch_size)


def _check_finite(x: jax.Array, name: str, number: int) -> None:
  x = np.asarray(x)
  if bad := np.count_nonzero(~np.isfinite(x)):
    raise ValueError(f'{name}: {bad} of {x.size} values of batch {number} are '
                     'NaN or infinite; the model is damaged')
