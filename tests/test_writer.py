"""Tests of writer.py: metrics.jsonl, TensorBoard events; who writes."""

import json
import logging
import os
import struct

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2

from msfp_jax.base import pictures
from msfp_jax.base import progress as progress_lib
from msfp_jax.base import writer as writer_lib


def _lines(workdir):
  return [json.loads(line) for line in
          (workdir / 'metrics.jsonl').read_text().splitlines()]


def _events(folder):
  """Reads all events of a folder's files, by the TFRecord framing."""
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
  """Makes this process another one than process 0."""
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


def test_only_process_0_writes(tmp_path, elsewhere, caplog):
  caplog.set_level(logging.INFO, logger='absl')
  with writer_lib.MetricWriter(tmp_path / 'w') as writer:
    writer.truncate_after(0)
    writer.write_scalars(1, {'loss': 1})
    writer.write_images(1, {'x': np.zeros((1, 2, 2, 1), np.uint8)})
    writer.flush()
  pictures.save_png(tmp_path / 'x.png', np.zeros((2, 2, 1), np.uint8))
  progress_lib.Progress('finetune', 1).update(1)
  assert not os.listdir(tmp_path)
  assert not caplog.records
