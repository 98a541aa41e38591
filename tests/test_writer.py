"""Tests of writer.py: metrics.jsonl, TensorBoard events, images, progress."""

import json
import logging
import os
import struct

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2

from msfp_jax import writer as writer_lib


def _lines(workdir):
  return [json.loads(line) for line in
          (workdir / 'metrics.jsonl').read_text().splitlines()]


def _events(folder):
  """All events of a folder's files, by the TFRecord framing."""
  events = []
  for file in sorted(folder.glob('events*')):
    content = file.read_bytes()
    while content:
      size, = struct.unpack('<Q', content[:8])
      events.append(event_pb2.Event.FromString(content[12:12 + size]))
      content = content[16 + size:]
  return events


def _values(folder):
  return {(event.step, value.tag): value for event in _events(folder)
          for value in event.summary.value}


@pytest.fixture
def elsewhere(monkeypatch):
  """This is not process 0."""
  monkeypatch.setattr(jax, 'process_index', lambda: 1)


def test_scalars_are_one_line_a_call_and_events(tmp_path):
  with writer_lib.MetricWriter(tmp_path / 'new') as writer:
    writer.write_scalars(1, {'loss': np.float32(.5), 'n': 3})
    writer.flush()
    writer.write_scalars(np.int64(2), {'loss': jax.numpy.ones((1,))})
  assert _lines(tmp_path / 'new') == [
      {'step': 1, 'loss': .5, 'n': 3}, {'step': 2, 'loss': 1}]
  values = _values(tmp_path / 'new/tensorboard')
  assert values[1, 'loss'].simple_value == .5
  assert values[2, 'loss'].simple_value == 1


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
  with writer_lib.MetricWriter(tmp_path) as writer:
    writer.write_scalars(1, {'loss': 1})
    assert _lines(tmp_path) == [{'step': 1, 'loss': 1}]


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_non_finite_scalars_become_null_with_a_warning(
    tmp_path, caplog, value):
  with writer_lib.MetricWriter(tmp_path) as writer:
    writer.write_scalars(7, {'loss': value, 'lr': .1})
  assert _lines(tmp_path) == [{'step': 7, 'loss': None, 'lr': .1}]
  assert 'loss is' in caplog.text and 'step 7' in caplog.text


@pytest.mark.parametrize('scalars', [
    {'loss': np.ones(2)}, {'loss': []}, {'step': 1}])
def test_what_is_no_scalar_is_refused(tmp_path, scalars):
  with writer_lib.MetricWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=f'{next(iter(scalars))!r} at step 3'):
      writer.write_scalars(3, scalars)
  assert not _lines(tmp_path)


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
  def write(name, steps, resume=None):
    with writer_lib.MetricWriter(tmp_path / name) as writer:
      if resume is not None:
        writer.truncate_after(resume)
      for step in steps:
        writer.write_scalars(step, {'loss': step / 3})

  write('whole', range(1, 8))
  write('parts', range(1, 6))
  with open(tmp_path / 'parts/metrics.jsonl', 'a') as file:
    file.write('{"step": 6, "lo')
  write('parts', range(4, 8), resume=3)
  read = lambda name: (tmp_path / name / 'metrics.jsonl').read_bytes()
  assert read('parts') == read('whole')
  assert sorted(os.listdir(tmp_path / 'parts')) == [
      'metrics.jsonl', 'tensorboard']


def test_truncation_tells_tensorboard_to_hide_later_steps(tmp_path):
  with writer_lib.MetricWriter(tmp_path) as writer:
    writer.write_scalars(5, {'loss': 1})
    writer.truncate_after(3)
    writer.write_scalars(4, {'loss': 2})
  events = _events(tmp_path / 'tensorboard')
  start = event_pb2.SessionLog.START
  assert [e.step for e in events if e.session_log.status == start] == [4]
  # Within one second, and yet no file has replaced the other.
  assert {(5, 'loss'), (4, 'loss')} <= _values(tmp_path / 'tensorboard').keys()


def test_opening_drops_a_half_written_line_and_no_other(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1, "a": 1.0}\n\x00\x00\n[1]\n{"step": 9}\n{"st')
  writer_lib.MetricWriter(tmp_path).close()
  assert _lines(tmp_path) == [{'step': 1, 'a': 1}, {'step': 9}]
  for number in (2, 3, 5):
    assert f'line {number} dropped' in caplog.text


def test_images_become_a_grid(tmp_path):
  images = np.random.RandomState(0).randint(0, 256, (4, 2, 3, 3), np.uint8)
  with writer_lib.MetricWriter(tmp_path) as writer:
    writer.write_images(1, {'bytes': images, 'floats': images / 255.0})
    writer.write_images(2, {'gray': images[:1, ..., :1]})
    with pytest.raises(ValueError, match="'bad' at step 3.*NaN"):
      writer.write_images(3, {'bad': images * np.nan})
    with pytest.raises(ValueError, match=r"'bad' at step 4.*\[N, H, W, C\]"):
      writer.write_images(4, {'bad': images[0]})
  values = _values(tmp_path / 'tensorboard')
  expected = np.vstack([np.hstack(images[:2]), np.hstack(images[2:])])
  for name in ('bytes', 'floats'):
    (tmp_path / 'x.png').write_bytes(
        values[1, name].image.encoded_image_string)
    np.testing.assert_array_equal(Image.open(tmp_path / 'x.png'), expected)
  assert (2, 'gray') in values


def test_texts_and_hparams_reach_tensorboard(tmp_path):
  with writer_lib.MetricWriter(tmp_path) as writer:
    writer.write_texts(1, {'note': 'hello'})
    writer.write_hparams({'lr': .1, 'model': {'widths': (1, 2), 'on': True}})
  text, = [v for (step, tag), v in _values(tmp_path / 'tensorboard').items()
           if tag.startswith('note')]
  assert text.tensor.string_val == [b'hello']
  assert any(b'model.widths' in e.SerializeToString()
             for e in _events(tmp_path / 'tensorboard/hparams'))


def test_only_process_0_writes(tmp_path, elsewhere, caplog):
  caplog.set_level(logging.INFO, logger='absl')
  with writer_lib.MetricWriter(tmp_path / 'w') as writer:
    writer.truncate_after(0)
    writer.write_scalars(1, {'loss': 1})
    writer.write_images(1, {'x': np.zeros((1, 2, 2, 1), np.uint8)})
    writer.write_texts(1, {'x': 'y'})
    writer.write_hparams({'x': 1})
    writer.flush()
  writer_lib.save_png(tmp_path / 'x.png', np.zeros((2, 2, 1), np.uint8))
  writer_lib.Progress('finetune', 1).update(1)
  assert not os.listdir(tmp_path)
  assert not caplog.records


def test_grid_places_images_row_by_row():
  images = np.arange(5 * 2 * 3).reshape(5, 2, 3, 1).astype(np.uint8)
  grid = writer_lib.image_grid(images, 3)
  assert grid.shape == (4, 9, 1)
  for i in range(5):
    y, x = 2 * (i // 3), 3 * (i % 3)
    np.testing.assert_array_equal(grid[y:y + 2, x:x + 3], images[i])
  assert not grid[2:, 6:].any()
  assert writer_lib.image_grid(images, 16).shape == (2, 15, 1)


@pytest.mark.parametrize('images, columns, message', [
    (np.zeros((1, 2, 2, 1)), 1, 'float64'),
    (np.zeros((1, 2, 2, 2), np.uint8), 1, r'\[1, 2, 2, 2\]'),
    (np.zeros((0, 2, 2, 1), np.uint8), 1, 'not empty'),
    (np.zeros((1, 2, 2, 1), np.uint8), 0, 'columns is 0'),
])
def test_grid_refuses_other_images(images, columns, message):
  with pytest.raises(ValueError, match=message):
    writer_lib.image_grid(images, columns)


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (3, 'RGB')])
def test_png_keeps_every_pixel(tmp_path, channels, mode):
  image = np.random.RandomState(0).randint(0, 256, (4, 5, channels), np.uint8)
  path = tmp_path / 'samples' / 'x.png'
  writer_lib.save_png(path, image)
  with Image.open(path) as read:
    assert read.mode == mode
    np.testing.assert_array_equal(
        np.asarray(read).reshape(image.shape), image)
  assert os.listdir(path.parent) == ['x.png']


def test_png_refuses_other_images(tmp_path):
  for bad in (np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8)):
    with pytest.raises(ValueError, match='x.png.*uint8'):
      writer_lib.save_png(tmp_path / 'x.png', bad)
  assert not os.listdir(tmp_path)


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('old')
  with pytest.raises(RuntimeError):
    with writer_lib.atomic_path(path) as temporary:
      temporary.write_text('half')
      raise RuntimeError
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['a.txt']


class _Clock:

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _progress(caplog, updates, total, start=0, **kwargs):
  """The lines logged for `updates`, a list of (seconds, step, scalars)."""
  caplog.set_level(logging.INFO, logger='absl')
  clock = _Clock()
  progress = writer_lib.Progress(
      'calibrate', total, start, clock=clock, **kwargs)
  for seconds, step, scalars in updates:
    clock.now = 100.0 + seconds
    progress.update(step, **scalars)
  return [record.getMessage() for record in caplog.records]


def test_progress_shows_the_rate_since_the_line_before(caplog):
  lines = _progress(caplog, [
      (20, 20, {}),  # slow: compiles
      (25, 60, {}),  # too early for a line
      (30, 120, {'loss': .12345}),
      (40, 400, {'loss': .1}),
  ], 400)
  assert lines == [
      'calibrate 20/400 (5%) 1.0 steps/s ETA 6:20',
      'calibrate 120/400 (30%) 10.0 steps/s ETA 0:28 loss=0.1235',
      'calibrate 400/400 (100%) 10.0 steps/s took 0:40 loss=0.1',
  ]


def test_progress_logs_the_last_line_always(caplog):
  assert len(_progress(caplog, [(1, 1, {}), (2, 2, {})], 2)) == 1


def test_progress_of_a_resumed_run_counts_its_own_steps(caplog):
  assert _progress(caplog, [(10, 60, {}), (20, 100, {})], 100, start=50) == [
      'calibrate 60/100 (60%) 1.0 steps/s ETA 0:40',
      'calibrate 100/100 (100%) 2.5 steps/s took 0:20',
  ]


def test_progress_of_long_and_of_standing_runs(caplog):
  assert _progress(
      caplog, [(5, 1, {}), (8, 1, {})], 2000, every_seconds=1) == [
          'calibrate 1/2000 (0%) 0.2 steps/s ETA 2:46:35',
          'calibrate 1/2000 (0%) 0 steps/s ETA unknown',
      ]
