"""Shuffled batches, read ahead, which depend on the seed and the step alone."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import functools
import itertools
from typing import TypeVar

import numpy as np

from msfp_jax.data.images import Images

_Item, _Result = TypeVar('_Item'), TypeVar('_Result')


def batch_rows(seed: int, num_images: int, batch_size: int, step: int
               ) -> np.ndarray:
  """The rows of a step: epochs, each in its own order, laid end to end.

  Every image comes once an epoch. A batch may end one epoch and begin the
  next, so none is partial.

  Args:
    seed: of the order.
    num_images: at least one.
    batch_size: at least one; may exceed num_images.
    step: batches before this one.

  Returns:
    int64 `[batch_size]`.

  Raises:
    ValueError: num_images, batch_size or step is too small.
  """
  if num_images < 1 or batch_size < 1 or step < 0:
    raise ValueError(f'num_images={num_images}, batch_size={batch_size} must '
                     f'be at least 1, step={step} at least 0')
  # Images are numbered through all epochs: of 5 images in batches of 3,
  #
  #   epoch    0 0 0 0 0 1 1 1 1 1 2 ..
  #   step     0 0 0 1 1 1 2 2 2 3 3 ..
  epochs, rows = np.divmod(
      np.arange(batch_size) + step * batch_size, num_images)
  return np.concatenate([
      _order(seed, num_images, int(epoch))[rows[epochs == epoch]]
      for epoch in np.unique(epochs)])


@functools.lru_cache(maxsize=2)
def _order(seed: int, num_images: int, epoch: int) -> np.ndarray:
  """The order of the images in an epoch.

  Raw numbers, sorted: unlike `Generator.permutation`, they are the same in
  every version of NumPy.
  """
  key = np.array([seed % 2**64, epoch], np.uint64)
  order = np.argsort(
      np.random.Philox(key=key).random_raw(num_images), kind='stable')
  order.flags.writeable = False
  return order


def batches(images: Images, batch_size: int, seed: int, start: int = 0,
            part: slice = slice(None)) -> Iterator[np.ndarray]:
  """The batches of steps start, start + 1, ... without end.

  Args:
    images: the data set.
    batch_size: images at a step.
    seed: of the order, see `batch_rows`.
    start: the first step; a run that resumes there sees what it would have
      seen.
    part: of every batch, the rows that are read: a process of several reads
      its own alone.

  Returns:
    A generator of uint8 `[batch_size, H, W, C]`, or so much of it as `part`
    says; see `read_ahead`.
  """
  return read_ahead(
      lambda step: images[
          batch_rows(seed, len(images), batch_size, step)[part]],
      itertools.count(start))


def read_ahead(read: Callable[[_Item], _Result], items: Iterable[_Item],
               ahead: int = 2) -> Iterator[_Result]:
  """`map(read, items)`, computed by a thread some items ahead.

  What `read` raises is raised where its result would have come. Closing the
  generator ends the thread.

  Args:
    read: item -> result; called in the order of the items.
    items: may be without end.
    ahead: results that are kept ready.
  """
  # One thread: results come in the order of the items, whatever each takes.
  pool = futures.ThreadPoolExecutor(1, 'read_ahead')
  pending = collections.deque()
  try:
    for item in items:
      pending.append(pool.submit(read, item))
      if len(pending) > ahead:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
