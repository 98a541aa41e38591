"""Order and position of batches, and the thread that reads ahead."""

import contextlib
import itertools
import threading

import numpy as np
import pytest

from msfp_jax.data import stream


@pytest.mark.parametrize('count, batch', [(12, 4), (10, 4), (3, 7), (1, 2)])
def test_every_image_once_an_epoch(count, batch):
  rows = np.concatenate([
      stream.batch_rows(0, count, batch, step) for step in range(count)])
  epochs = rows.reshape(batch, count)  # as many epochs as a batch is long
  np.testing.assert_array_equal(
      np.sort(epochs), np.tile(np.arange(count), (batch, 1)))


def test_the_order_depends_on_the_seed_and_the_epoch():
  epoch = lambda seed, step: stream.batch_rows(seed, 100, 100, step).tolist()
  orders = [epoch(0, 0), epoch(1, 0), epoch(-1, 0), epoch(0, 1),
            list(range(100))]
  for a, b in itertools.combinations(orders, 2):
    assert a != b


def test_the_rows_of_a_step_depend_on_nothing_before():
  rows = [stream.batch_rows(3, 10, 4, step) for step in range(20)]
  for step in (19, 0, 7):
    again = stream.batch_rows(3, 10, 4, step)
    np.testing.assert_array_equal(again, rows[step])
    again[:] = 0  # not what is drawn from next
  np.testing.assert_array_equal(stream.batch_rows(3, 10, 4, 7), rows[7])


def test_the_order_is_the_same_everywhere():
  """The order is a fixed one, as a run may resume under another NumPy."""
  assert stream.batch_rows(0, 8, 8, 0).tolist() == [
      0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize('count, batch, step', [
    (0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_rows_that_cannot_be(count, batch, step):
  with pytest.raises(ValueError, match=f'num_images={count}, batch_size='
                     f'{batch} must be at least 1, step={step} at least 0'):
    stream.batch_rows(0, count, batch, step)


def no_reader():
  return not [thread for thread in threading.enumerate()
              if thread.name.startswith('read_ahead')]


def some_batches(start, count, seed=0):
  images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
  with contextlib.closing(stream.batches(images, 4, seed, start)) as batches:
    return np.stack(list(itertools.islice(batches, count)))


def test_batches_from_a_step_on_are_the_tail_of_all():
  batches = some_batches(0, 9)
  assert batches.shape == (9, 4, 1, 1, 1)
  np.testing.assert_array_equal(some_batches(5, 4), batches[5:])
  assert not np.array_equal(some_batches(0, 9, seed=1), batches)


def test_reading_ahead_is_a_map():
  for count in (0, 1, 2, 9):
    assert list(stream.read_ahead(str, range(count))) == [
        str(i) for i in range(count)]


def test_no_more_than_a_few_are_read_ahead():
  started = []
  entered = threading.Semaphore(0)

  def read(item):
    started.append(item)
    entered.release()
    return item

  with contextlib.closing(
      stream.read_ahead(read, itertools.count(), ahead=2)) as results:
    assert next(results) == 0
    for _ in range(3):
      assert entered.acquire(timeout=60)
    assert started == [0, 1, 2]
    assert next(results) == 1


def test_an_error_is_raised_where_the_result_would_have_come():

  def read(item):
    if item == 3:
      raise ValueError('image 3 is damaged')
    return item

  results = stream.read_ahead(read, itertools.count())
  assert [next(results) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(ValueError, match='image 3 is damaged'):
    next(results)
  assert no_reader()


def test_closing_ends_the_thread():
  results = stream.read_ahead(lambda item: item, itertools.count())
  next(results)
  assert not no_reader()
  results.close()
  assert no_reader()
