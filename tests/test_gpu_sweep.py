"""Stage kernels of benchmarks.gpu: which blocks win, and what is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import works

from benchmarks import hopper_cases
from benchmarks import hopper_measure
from benchmarks import hopper_rivals
from benchmarks import hopper_sweep
from benchmarks.gpu import products
from benchmarks.gpu import record as record_lib
from benchmarks.gpu import runner
from benchmarks.hopper_cases import Case
from msfp_jax.kernels import slower
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import measured

CASES = {case.name: case for case in hopper_cases.CASES}
LARGE = CASES['large']
HERE = {'device': 'a card', 'versions': 'some'}


def row(us, bf16_us=100.0, method='packed int8, chosen', **more):
  return {'method': method, 'us': us, 'bf16_us': bf16_us} | more


def test_the_worst_are_those_that_are_least_faster_than_bf16():
  rows = {
      'large': [row(50.0)], 'few 16': [row(25.0)],
      'conv SD 64': [row(10.0, note='wrong: error 1 > 0')],
      'conv SD 32': [row(1.0, method='packed fp8, chosen'),
                     row(120.0), {'method': 'XLA fp8', 'note': 'an error'}],
      'quartz large': [row(80.0, method='packed QuaRTZ')],
      'few 64': [row(400.0, None)]}
  worst = hopper_sweep.worst([CASES[name] for name in rows], rows)
  assert [case.name for case in worst] == [
      'conv SD 32', 'quartz large', 'large']


@pytest.mark.parametrize('name', CASES)
def test_blocks_that_are_tried(name):
  """A few that the kernel takes, first those that it would choose."""
  work = hopper_cases.work(CASES[name])
  tried = hopper_sweep.blocks(CASES[name])
  assert tried[0] == blocks_lib.ranked(work)[0]
  assert 3 <= len(tried) == len(set(tried)) <= 6
  assert any(blocks.rows != tried[0].rows or blocks.split != tried[0].split
             for blocks in tried)
  for blocks in tried:
    assert blocks_lib.why_not(blocks, work.row_length, work.taps,
                              work.out_dtype, work.groups) is None


@pytest.mark.parametrize('case', [
    Case('product', 20, 96, 70), Case('flags', 16, 64, 64, flag_group=32),
    Case('conv', 2, 96, 64, 8), Case('flags', 2, 64, 64, 8, flag_group=16)])
def test_the_work_of_a_case_is_what_its_kernel_cuts(case, monkeypatch):
  """Else a row would be for a product that nobody computes."""
  asked = works.record(monkeypatch)
  method = hopper_cases.of_kernel(case)
  jax.eval_shape(method.function, *hopper_cases.arguments(
      method, hopper_cases.draw(case)))
  if not case.size:  # rows of x are padded to 8
    case = dataclasses.replace(case, m=-(-case.m // 8) * 8)
  assert asked == [hopper_cases.work(case)]


def test_a_sweep_has_a_winner_beyond_noise():
  chosen, second, third, *_ = hopper_sweep.blocks(LARGE)
  rows = {chosen: HERE | {'us': 100.0}, second: HERE | {'us': 98.0},
          third: HERE | {'us': 50.0, 'note': 'wrong'}}
  assert hopper_sweep.winner(LARGE, rows) is None
  rows[second] = HERE | {'us': 50.0, 'device': 'another'}
  assert hopper_sweep.winner(LARGE, rows) is None
  rows[second] = HERE | {'us': 80.0}
  assert hopper_sweep.winner(LARGE, rows) == measured.Tuned(
      hopper_cases.work(LARGE), second, 'a card', 'some', 1.25)
  del rows[chosen]
  assert hopper_sweep.winner(LARGE, rows) is None


def test_rows_are_printed_as_python_has_them():
  """What is printed can be put into the file of the tables as it is."""
  names = vars(measured)
  won = [hopper_sweep.winner(case, {
      blocks: HERE | {'us': 100.0 - i}
      for i, blocks in enumerate(hopper_sweep.blocks(case))})
         for case in (LARGE, CASES['quartz SD 32'], CASES['conv SD up'])]
  lost = [slower.Slower(slower.Kind('matmul', 'int8', 16, 64), 0, 128, None,
                        None, 'a card', 'some', 2.5)]
  for rows in (won, lost):
    text = hopper_sweep.literal(rows)
    assert eval(text, names) == tuple(rows)
    assert max(map(len, text.splitlines())) <= 80
  assert eval(hopper_sweep.literal([])) == ()


def fake_measurements(monkeypatch, calls):
  """Makes 'toy' the worst, slower than XLA; other blocks are twice as fast."""
  there = HERE | {'device': jax.devices()[0].device_kind}

  def run_case(case, roofline, methods, least):
    calls.append(case.name)
    for method in methods:
      slow = case.name == 'toy' and method.packed
      yield row(90.0 if slow else 50.0, method=method.name)

  def measure(case, method, *unused):
    calls.append(method.name)
    slow = method.name == hopper_sweep.name(hopper_sweep.blocks(case)[0])
    return {'us': 90.0 if slow else 45.0}

  def compare(case, kind, ways, least):
    calls.append((case.name, measured.choose(hopper_cases.work(case))))
    return {'slowdown': 2.0, **there}

  monkeypatch.setattr(hopper_measure, 'run_case', run_case)
  monkeypatch.setattr(hopper_measure, 'measure', measure)
  monkeypatch.setattr(hopper_sweep, 'there', lambda: there)
  monkeypatch.setattr(hopper_rivals, 'compare', compare)
  monkeypatch.setattr(products, 'stand_in', lambda case, method: method)


def test_the_stage_sweeps_the_worst_and_goes_on(tmp_path, monkeypatch, capsys):
  calls, toys = [], [Case('toy', 16, 64, 64), *(
      Case(f'other {i}', 16 + i, 64, 128) for i in range(3))]
  fake_measurements(monkeypatch, calls)
  stage = lambda: products.Products(
      record_lib.Record(tmp_path, 60.0), toys, dry=True)
  assert stage().run() == 0
  tried = [hopper_sweep.name(blocks) for blocks in hopper_sweep.blocks(toys[0])]
  assert calls[:4] == [case.name for case in toys]
  assert calls[4:4 + len(tried)] == tried
  found = runner.read(tmp_path / runner.FOUND)['measurements']
  won = eval(found['blocks']['value'], vars(measured))
  assert len(won) == hopper_sweep.WORST and won[0].speedup == 2.0
  assert won[0].work == hopper_cases.work(toys[0])
  # Compared with XLA by the blocks that won, and with no other case.
  assert calls[-1] == ('toy', won[0].blocks)
  assert [call for call in calls if isinstance(call, tuple)] == calls[-1:]
  lost, = eval(found['slower']['value'], vars(measured))
  assert lost.holds(
      hopper_rivals.operation(toys[0], lost.kind), lost.device)
  said = capsys.readouterr().out
  assert all(found[table]['value'] in said for table in ('blocks', 'slower'))
  done = len(calls)
  assert stage().run() == 0
  assert len(calls) == done


def test_a_winner_outlives_worse_cases(tmp_path, monkeypatch):
  """What was swept keeps its row, though others are the worst by then."""
  fake_measurements(monkeypatch, [])
  toy = Case('toy', 16, 64, 64)
  others = [Case(f'other {i}', 16 + i, 64, 128) for i in range(3)]
  stage = lambda *cases: products.Products(
      record_lib.Record(tmp_path, 60.0), cases, dry=True).run()
  assert stage(toy) == 0
  faster = hopper_measure.run_case

  def slow(case, *args):  # slower than any that was measured before
    return (one | {'us': 500.0} for one in faster(case, *args))

  monkeypatch.setattr(hopper_measure, 'run_case', slow)
  assert stage(toy, *others) == 0
  found = runner.read(tmp_path / runner.FOUND)['measurements']
  won = eval(found['blocks']['value'], vars(measured))
  assert [row.work for row in won] == [
      hopper_cases.work(case) for case in (toy, *others)]


def test_comparisons_by_other_blocks_are_made_anew(tmp_path, monkeypatch):
  """What was not lost by blocks that are gone may be lost by the others."""
  calls, toy = [], Case('toy', 16, 64, 64)
  fake_measurements(monkeypatch, calls)
  stage = lambda: products.Products(
      record_lib.Record(tmp_path, 60.0), [toy], dry=True).run()
  compared = lambda: [call[1] for call in calls if isinstance(call, tuple)]
  assert stage() == stage() == 0
  won, = compared()
  monkeypatch.setattr(hopper_sweep, 'winner', lambda case, rows: None)
  assert stage() == 0
  assert compared() == [won, blocks_lib.ranked(hopper_cases.work(toy))[0]]
  assert won != compared()[1]


def test_cases_leave_the_sweep_its_time(tmp_path, monkeypatch):
  """With too little for a case beside it, what is there is swept."""
  calls = []
  fake_measurements(monkeypatch, calls)
  toys = [Case('toy', 16, 64, 64), Case('other', 16, 64, 64)]
  record = record_lib.Record(tmp_path, 60.0)
  stage = products.Products(record, toys, dry=False)
  monkeypatch.setattr(products.machine, 'measure', lambda: None)
  record.found['limits'] = {'value': None}
  record.found['claims'] = {'value': {}}
  record.found['toy'] = {'value': [row(90.0)]}
  monkeypatch.setattr(record, 'left', lambda: 30.0 if calls else 60.0)
  assert stage.run() == 0
  assert calls[0] != 'other' and 'other' in calls


def test_dry_kernels_are_lowered_and_xla_computes_in_their_place():
  case = Case('toy', 16, 64, 64, flag_group=16)
  method = hopper_cases.of_kernel(case)
  instead = products.stand_in(case, method)
  drawn = hopper_cases.draw(case)
  y = instead.function(*hopper_cases.arguments(instead, drawn))
  want = np.float64(drawn['x']) @ np.float64(drawn['levels']).T * drawn['scale']
  np.testing.assert_array_equal(y, jnp.asarray(want, jnp.bfloat16))
  bad = hopper_sweep.method(case, blocks_lib.Blocks(64, 128, 2))
  with pytest.raises(ValueError, match='whole steps'):
    products.stand_in(case, bad)
