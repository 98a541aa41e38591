"""Tests of progress.py."""

import logging

from msfp_jax.base import progress as progress_lib


class _Clock:

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _progress(caplog, updates, total, start=0, **kwargs):
  """Collects the lines logged for `updates`, (seconds, step, scalars) each."""
  caplog.set_level(logging.INFO, logger='absl')
  clock = _Clock()
  progress = progress_lib.Progress(
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


def test_progress_shows_images_where_steps_have_some(caplog):
  assert _progress(
      caplog, [(20, 5, {}), (40, 45, {})], 45, images_per_step=64) == [
          'calibrate 5/45 (11%) 0.25 steps/s (16.0 images/s) ETA 2:40',
          'calibrate 45/45 (100%) 1.1 steps/s (72.0 images/s) took 0:40']


def test_progress_says_what_is_known_of_the_rate(caplog):
  share = lambda rate: f'{100 * rate / 4:.0f}% of it'
  assert _progress(
      caplog, [(20, 20, {}), (40, 60, {})], 60, images_per_step=8,
      share=share)[1] == (
          'calibrate 60/60 (100%) 1.5 steps/s (12.0 images/s, 38% of it) '
          'took 0:40')
  assert _progress(caplog, [(20, 20, {})], 20, share=share)[-1] == (
      'calibrate 20/20 (100%) 1.0 steps/s (25% of it) took 0:20')


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


def test_compiling_is_said_before_and_is_in_no_rate(caplog):
  """A first step of 45 s, then two steps a second."""
  assert _progress(
      caplog, [(45, 1, {}), (55, 21, {'loss': .5}), (65, 41, {})], 41,
      compiles=True) == [
          'calibrate: compiling; the first step can take a minute or more',
          'calibrate 1/41 (2%) compiled and first done in 0:45',
          'calibrate 21/41 (51%) 2.0 steps/s ETA 0:10 loss=0.5',
          'calibrate 41/41 (100%) 2.0 steps/s took 1:05, the first 0:45']


def test_a_quick_first_step_has_no_line(caplog):
  assert _progress(
      caplog, [(0.2, 1, {}), (10.2, 6, {}), (15.2, 11, {})], 11,
      compiles=True)[1:] == [
          'calibrate 6/11 (54%) 0.5 steps/s ETA 0:10',
          'calibrate 11/11 (100%) 0.67 steps/s took 0:15']


def test_a_single_step_has_no_rate(caplog):
  """All that is known of its time has the compilation in it."""
  assert _progress(caplog, [(11, 1, {'loss': .5})], 1, compiles=True)[1:] == [
      'calibrate 1/1 (100%) took 0:11 loss=0.5']


def test_a_resumed_run_compiles_too(caplog):
  assert _progress(caplog, [(20, 51, {}), (25, 100, {})], 100, start=50,
                   compiles=True)[1:] == [
      'calibrate 51/100 (51%) compiled and first done in 0:20',
      'calibrate 100/100 (100%) 9.8 steps/s took 0:25, the first 0:20']


def test_what_is_done_already_compiles_nothing(caplog):
  assert _progress(caplog, [], 40, start=40, compiles=True) == []
