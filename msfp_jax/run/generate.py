"""Images from a model, batch by batch, on all devices."""

from collections.abc import Callable, Iterable, Iterator
import functools
import statistics
import time

import jax
import numpy as np

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import devices
from msfp_jax.base import progress as progress_lib
from msfp_jax.diffusion import conditions
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import placing
from msfp_jax.run import prompts as prompts_lib

_TIMED = 3  # batches, at least, by which a model is timed


class Drawer:
  """Draws batches from a model; compiled at the first one.

  Attributes:
    model: that is sampled from.
    batch_size: images in a batch.
  """

  def __init__(self, model: packed_lib.PackedModel,
               plan: diffusion.SamplerPlan, batch_size: int,
               shape: tuple[int, ...],
               draw_condition: conditions.Draw = conditions.none,
               prompts: prompts_lib.Prompts | None = None,
               layout: devices.Layout | None = None):
    """Nothing runs yet.

    Args:
      model: that is sampled from.
      plan: the sampler.
      batch_size: images in a batch, which the devices can share.
      shape: of a sample, `[H, W, C]`.
      draw_condition: of every batch, for conditional models.
      prompts: in place of it: each image is made from its own.
      layout: where weights and batches lie; by default each device has all
        weights.

    Raises:
      ValueError: a batch that cannot be split.
    """
    layout = layout or devices.layout()
    layout.check_batch('batch_size', batch_size)
    self.model = placing.on_devices(model, layout)
    self.batch_size = batch_size
    self._more = plan, batch_size, shape, draw_condition, prompts, layout
    self._layout = layout
    self._prompts = prompts
    self._arrays, self._times = None, []

  def of(self, model: packed_lib.PackedModel) -> 'Drawer':
    """Draws in the same way from another model."""
    return Drawer(model, *self._more)

  @functools.cached_property
  def _draw(self) -> Callable[..., jax.Array]:
    """(arrays, key, of `Prompts.batch` or None) -> a batch; compiled."""
    plan, batch_size, shape, draw_condition, _, layout = self._more

    def draw(arrays, key, prompted):
      model = self.model.with_arrays(arrays)
      # Drawn inside of the program and by the batch's own key: which batches
      # are drawn, and in which order, is of no account to a batch.
      if prompted is None:
        noise = jax.random.normal(
            jax.random.fold_in(key, 0), (batch_size, *shape))
        condition = draw_condition(jax.random.fold_in(key, 2), batch_size)
      else:
        seeds, rounds, condition = prompted
        noise = prompts_lib.noise(seeds, rounds, shape)
      noise = layout.constrain(noise, layout.batch)
      return diffusion.sample(
          model.eps_fn_of(*condition), plan, noise, jax.random.fold_in(key, 1),
          model.memory(noise, *condition))

    # Weights are arguments: constants would be folded at compile time.
    return jax.jit(draw, compiler_options=kernels.compiler_options())

  def __call__(self, key: jax.Array, number: int = 0) -> jax.Array:
    """One batch `[batch_size, H, W, C]`, before any decoder.

    Args:
      key: of what folding makes of it, 0 is the noise that samples start from,
        1 that of the sampler's steps, 2 the condition. With prompts, 1 alone
        counts.
      number: of the batch, which tells its prompts.
    """
    if self._arrays is None:  # copied once, not with every batch
      self._arrays = self._layout.put(self.model.arrays)
    prompted = None if self._prompts is None else self._prompts.batch(
        number, self.batch_size)
    begin = time.perf_counter()
    x = self._draw(self._arrays, key, prompted).block_until_ready()
    self._times.append(time.perf_counter() - begin)
    return x

  def seconds_per_image(self, key: jax.Array) -> float:
    """The median over all batches so far, compiled and without a decoder.

    Args:
      key: of those that are drawn for it, where there were not enough.
    """
    # The first one holds the time to compile.
    while len(self._times) <= _TIMED:
      self(key)
    return statistics.median(self._times[1:]) / self.batch_size


def batches(draw: Drawer, numbers: Iterable[int], key: jax.Array,
            name: str = 'sample', *,
            decode: Callable[[jax.Array], jax.Array] | None = None
            ) -> Iterator[np.ndarray]:
  """Draws batches of images; batch i depends on the key and i alone.

  Args:
    draw: from the model.
    numbers: which batches.
    key: folded with the batch's number.
    name: for error messages.
    decode: latents -> images in [-1, 1]; None where samples are images.

  Yields:
    uint8 images `[batch_size, H, W, C]`.

  Raises:
    ValueError: samples that are NaN or infinite.
  """
  for number in numbers:
    x = draw(jax.random.fold_in(key, number), number)
    # Before anything becomes uint8, in which NaN would be a pixel like any.
    _check_finite(x, name, number)
    if decode is not None:
      x = decode(x)
      _check_finite(x, name, number)
    yield devices.fetch(data.to_uint8(x))


def generate(draw: Drawer, num_samples: int, key: jax.Array,
             name: str = 'sample', **options) -> np.ndarray:
  """Draws images, all in memory; see `batches`.

  Args:
    draw: from the model.
    num_samples: how many; the last batch may be partial.
    key: of the noise.
    name: for progress lines.
    **options: `decode` of `batches`.

  Returns:
    uint8 images `[num_samples, H, W, C]`.

  Raises:
    ValueError: num_samples < 1, or as `batches`.
  """
  size = draw.batch_size
  progress = progress_lib.Progress(
      name, num_samples, unit='images', compiles=True)
  images = []
  for batch in batches(draw, range(num_batches(num_samples, size)), key, name,
                       **options):
    images.append(batch)
    progress.update(min(len(images) * size, num_samples))
  return np.concatenate(images)[:num_samples]


def num_batches(num_samples: int, batch_size: int) -> int:
  """Batches that hold `num_samples`. Raises ValueError if there are none."""
  if num_samples < 1 or batch_size < 1:
    raise ValueError(f'num_samples={num_samples}, batch_size={batch_size}: '
                     'must be at least 1')
  return -(-num_samples // batch_size)


def _check_finite(x: jax.Array, name: str, number: int) -> None:
  x = devices.fetch(x)
  if bad := np.count_nonzero(~np.isfinite(x)):
    raise ValueError(f'{name}: {bad} of {x.size} values of batch {number} are '
                     'NaN or infinite; the model is damaged')
