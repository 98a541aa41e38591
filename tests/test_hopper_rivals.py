"""Stage kernels of benchmarks.gpu: which products XLA computes faster."""

import functools

import jax
import numpy as np
import pytest
import works

from benchmarks import hopper_rivals
from benchmarks.hopper_cases import Case
from msfp_jax import kernels
from msfp_jax.kernels import choice
from msfp_jax.kernels import slower

SMALL = Case('small', 16, 128, 64, more=True)
HERE = {'device': 'a card', 'versions': 'some'}


def row(us, method='packed int8, chosen', **more):
  return {'method': method, 'us': us} | more


def test_what_may_be_lost_is_what_xla_does_with_decoded_weights():
  rows = [
      row(100.0, method='XLA bf16'), row(60.0, method='XLA int8'),
      {'method': 'XLA fp8', 'note': 'an error'}, row(50.0),
      row(70.0, method='packed int8, groups of 16'),
      row(55.0, method='packed int8, both in groups of 32'),
      row(99.0, method='packed int8, by token'),
      {'method': 'packed int8, groups of 64', 'note': 'an error'}]
  kind = lambda *sizes: slower.Kind('matmul', 'int8', *sizes)
  assert hopper_rivals.doubtful(SMALL, rows) == {
      kind(): False, kind(16): True, kind(32, 32): False}


def test_wrong_results_are_no_times():
  """Neither of the kernel, which has then won nothing, nor of XLA."""
  kind = slower.Kind('matmul', 'int8')
  xla, kernel = row(60.0, method='XLA int8'), row(70.0)
  wrong = lambda us, method: row(us, method=method, note='wrong: error 1 > 0')
  doubtful = lambda *rows: hopper_rivals.doubtful(SMALL, rows)
  assert doubtful(xla, wrong(1.0, kernel['method'])) == {}
  # By the wrong one the kernel would have lost, by the other it has won.
  assert doubtful(
      row(80.0, method='XLA bf16'), wrong(1.0, 'XLA fp8'), kernel) == {
          kind: False}
  # Slower than any right one of XLA is not known: a comparison will tell.
  assert doubtful(wrong(99.0, 'XLA int8'), kernel) == {kind: True}
  assert doubtful(kernel) == {kind: True}


@pytest.mark.parametrize('case', [
    SMALL, Case('conv', 1, 128, 16, 8, more=True),
    Case('QuaRTZ', 16, 64, 64, flag_group=16)])
def test_layers_are_of_the_kinds_that_rows_measure(case, monkeypatch):
  """And cut into the blocks that comparisons are named by."""
  asked = works.record(monkeypatch)
  kinds = hopper_rivals.kinds(case)
  assert len(kinds) == (7 if case.more else 1)
  for kind in kinds.values():
    layer, x = hopper_rivals.layer(case, kind)
    geometry = hopper_rivals.geometry_of(case)
    assert choice.why_not('mosaic_gpu', layer, x.shape, geometry) is None
    assert choice.operation('mosaic_gpu', layer, x.shape, geometry) == (
        hopper_rivals.operation(case, kind))
    jax.eval_shape(functools.partial(
        kernels.run, geometry=geometry, implementation='mosaic_gpu'), layer, x)
    assert asked.pop() == hopper_rivals.work(case, kind)
    assert not asked


KINDS = slower.Kind('matmul', 'int8'), slower.Kind(
    'conv', 'int8', 16, window=(3, 3), strides=(1, 1))


@pytest.mark.parametrize('seed', range(20))
def test_rows_hold_for_what_was_lost_and_for_nothing_else(seed):
  rng = np.random.default_rng(seed)
  outcomes = []
  for _ in range(12):
    lost = [True, True, False, None][rng.integers(4)]
    outcomes.append(hopper_rivals.Outcome(slower.Operation(
        KINDS[rng.integers(2)], 8 * int(rng.integers(1, 6)),
        int(rng.integers(1, 9999)), int(rng.integers(1, 9999))), lost,
        {'slowdown': 1.5, 'device': ['a', 'b'][rng.integers(2)],
         'versions': 'some'}))
  rows = hopper_rivals.rows(outcomes)
  for one in outcomes:
    assert any(row.holds(one.operation, one.where[0]) for row in rows) == (
        one.lost is True)


def test_rows_go_on_to_where_nothing_was_won():
  def outcome(rows, lost, slowdown=2.0):
    return hopper_rivals.Outcome(
        slower.Operation(KINDS[0], rows, 64, 64), lost,
        HERE | {'slowdown': slowdown})

  rows = hopper_rivals.rows([
      outcome(16, False), outcome(2048, True, 1.2), outcome(8192, True)])
  assert rows == [slower.Slower(
      KINDS[0], 2048, None, None, None, 'a card', 'some', 1.2)]
  rows = hopper_rivals.rows([
      outcome(16, True), outcome(64, True), outcome(2048, False)])
  assert [(row.least, row.most) for row in rows] == [(0, 64)]
