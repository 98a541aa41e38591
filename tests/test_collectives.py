"""What programs exchange and compute, as a plan for many devices has it."""

import json
import subprocess
import sys

import children
import jax
from jax import lax
import jax.numpy as jnp
import pytest

from benchmarks import collectives
from benchmarks import flops
from benchmarks import planned
from benchmarks import slices
from msfp_jax.tune import memory

# As compilers of CPUs and TPUs write them.
TEXT = '''HloModule toy, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s8[256,64], u32[])) -> (s8[256,64], u32[]) {
  %start = (s8[256,64]{1,0:T(32,128)(4,1)}, s8[256,64]{1,0:T(32,128)(4,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%operand), channel_id=66, source_target_pairs={{0,1},{1,0}}
  ROOT %done = s8[256,64]{1,0} collective-permute-done(%start)
}

%condition (p: (s8[256,64], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (input: f32[40,24]) -> f32[40,3] {
  %whole = f32[40,24]{1,0} all-reduce(%input), replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, to_apply=%add
  ROOT %part = f32[40,3]{1,0} dynamic-slice(%whole), dynamic_slice_sizes={40,3}
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s8[256,64], u32[]) while(%init), condition=%condition, body=%body
  %gathered = bf16[8,10]{1,0} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %sums = (f32[6]{0}, f32[]) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
  %begun = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), replica_groups=[2,4]<=[8]
  %ended = f32[8]{0} all-gather-done(%begun)
  %scattered = f32[40,3]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.1
  %kept = f32[5]{0} reduce-scatter(%e), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %turned = s4[8,10]{1,0} all-to-all(%f), replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}, dimensions={0}
}
'''  # noqa: E501 - a line is an instruction


def test_exchanges_of_a_programs_text():
  found = collectives.of(TEXT, 8)
  assert [(one.kind, one.size, one.group, one.times) for one in found] == [
      ('collective-permute', 256 * 64, 2, 4), ('all-gather', 160, 4, 1),
      ('all-reduce', 28, 8, 1), ('all-gather', 32, 4, 1),
      ('reduce-scatter', 480, 8, 1), ('reduce-scatter', 20, 2, 1),
      ('all-to-all', 40, 4, 1)]
  # By hand: of what n devices gather, or give each other, one has n parts and
  # sends n - 1; of what they sum it keeps one of n, and sends the others; where
  # all keep all, twice.
  assert [one.sent for one in found] == [
      4 * 256 * 64, 3 * 40, 2 * 7 * 3.5, 3 * 8, 7 * 480, 20, 3 * 10]
  assert collectives.summary(collectives.counts(found)) == (
      '1 all-reduce, 2 all-gather, 2 reduce-scatter, 1 all-to-all, '
      '4 collective-permute')
  assert collectives.summary(collectives.counts([])) == 'none'


@pytest.mark.parametrize('before, after, said', [
    ('ENTRY ', '', 'has no ENTRY'),
    ('calls=%all-reduce-scatter.1', 'calls=%all-reduce-scatter.2',
     "calls 'all-reduce-scatter.2'"),
    (' all-to-all(', ' ragged-all-to-all(', 'ragged-all-to-all is not counted'),
    ('[1,8]<=[8]', '@some', 'not understood: @some')])
def test_what_is_not_understood_is_refused(before, after, said):
  with pytest.raises(ValueError, match=said):
    collectives.of(TEXT.replace(before, after), 8)


def test_a_loop_without_an_end_is_refused():
  with pytest.raises(ValueError, match='a loop with exchanges'):
    collectives.of(TEXT.replace('direction=LT', 'direction=NE'), 8)
  known = TEXT.replace('body=%body', 'body=%body, backend_config='
                       '{"known_trip_count":{"n":"5"}}')
  assert collectives.of(known, 8)[0].times == 5


PROGRAM = '''
import json, jax, jax.numpy as jnp
jax.config.update('jax_num_cpu_devices', 4)
from jax.sharding import PartitionSpec as P
from benchmarks import collectives
mesh = jax.sharding.Mesh(jax.devices(), ('d',))
def work(x):
  step = lambda c, _: (jax.lax.psum(c, 'd') / 7, None)
  x = jax.lax.scan(step, x, None, length=5)[0]
  x = jax.lax.ppermute(x, 'd', [(i, (i + 1) % 4) for i in range(4)])
  return jax.lax.all_gather(x, 'd', tiled=True)
f = jax.jit(jax.shard_map(work, mesh=mesh, in_specs=P('d'), out_specs=P(),
                          check_vma=False))
text = f.lower(jnp.zeros((24, 10))).compile().as_text()
print(json.dumps([[c.kind, c.size, c.group, c.times]
                  for c in collectives.of(text, 4)]))
'''


@pytest.mark.slow
def test_exchanges_of_a_real_program():
  said = subprocess.run(
      [sys.executable, '-c', PROGRAM], check=True, stdout=subprocess.PIPE,
      env=children.compiling_fast(PYTHONPATH='.')).stdout
  assert sorted(json.loads(said)) == [
      ['all-gather', 960, 4, 1], ['all-reduce', 240, 4, 5],
      ['collective-permute', 240, 2, 1]]


def conv(x, kernel, stride):
  return lax.conv_general_dilated(
      x, kernel, (stride, stride), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@jax.custom_vjp
def doubled(a, b):
  return 2 * (a @ b)


doubled.defvjp(lambda a, b: (doubled(a, b), (a, b)),
               lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
X, K, A = jnp.zeros((4, 8, 8, 6)), jnp.zeros((3, 3, 6, 10)), jnp.zeros((7, 5))
STRIDED = 2 * (4 * 4 * 4) * 9 * 6 * 10


@pytest.mark.parametrize('function, arguments, expected', [
    (lambda a: a @ a.T, (A,), 2 * 7 * 7 * 5),
    (lambda x: conv(x, K, 1), (X,), 2 * (4 * 8 * 8) * 9 * 6 * 10),
    (lambda x: conv(x, K, 2), (X,), STRIDED),
    # Forward, and the gradients of x and of the kernel, as much each.
    (jax.grad(lambda x, k: conv(x, k, 2).sum()**2, (0, 1)), (X, K),
     3 * STRIDED),
    (lambda a: lax.scan(lambda c, _: (c @ (a.T @ a), None), a, None, 3)[0],
     (A,), 3 * (2 * 5 * 5 * 7 + 2 * 7 * 5 * 5)),
    (jax.jit(jax.checkpoint(lambda a: jnp.sin(a @ a.T))), (A,), 490),
    # Forward, once more on the way back, and the gradients of both sides.
    (jax.grad(jax.checkpoint(lambda a: jnp.sin(a @ (a.T + 1)).sum())), (A,),
     4 * 490),
    (jax.grad(lambda a: doubled(a, a.T).sum()), (A,), 490 + 2 * 490),
    (lambda a: lax.cond(a[0, 0] > 0, lambda: a @ a.T @ a, lambda: a), (A,),
     2 * 490)], ids=['product', 'convolution', 'strides', 'gradients', 'loop',
                     'checkpoint', 'recomputed', 'own gradients', 'branches'])
def test_multiplications_are_counted(function, arguments, expected):
  assert flops.of(jax.make_jaxpr(function)(*arguments)) == expected


def test_what_cannot_be_counted_is_refused():
  endless = lambda a: lax.while_loop(
      lambda c: c.sum() > 0, lambda c: c @ a.T @ a, a)
  with pytest.raises(ValueError, match='turns depend on its values'):
    flops.of(jax.make_jaxpr(endless)(A))
  mesh = jax.sharding.Mesh(jax.devices()[:1], ('d',))
  rows = jax.sharding.PartitionSpec('d')
  with pytest.raises(ValueError, match='each device by itself'):
    flops.of(jax.make_jaxpr(jax.shard_map(
        lambda a: a @ a.T @ a, mesh=mesh, in_specs=rows, out_specs=rows))(A))


def test_blocks_that_are_not_compiled_count_as_those_that_are(monkeypatch):
  """By works of which 7 a block of one kind, and 5 of another, would be."""
  beside = 2

  def cost(work, chip, count):
    blocks = dict(work.fields)
    number = 100 + 7 * blocks['num_layers'] + 5 * blocks['num_single_layers']
    return slices.Cost(
        memory.Need(number, beside * number), '', 3 * number,
        (collectives.Collective('all-to-all', 8, 4, number),))

  monkeypatch.setattr(planned, 'cost', cost)
  work = planned.STEPS['FLUX fine-tuning']
  number = 100 + 7 * 19 + 5 * 38
  found = planned.figures(work, 'v5e', 8)
  assert (found.kept, found.temporary, found.flops, found.sent) == (
      number, 2 * number, 3 * number, 6 * number)
  assert found.counts['all-to-all'] == number
  # What is beside them for a while may be less of more blocks, by chance.
  beside = -2
  monkeypatch.setattr(slices, 'capacity', lambda chip: 1e9)
  assert planned.row('FLUX fine-tuning', 'v5e', 8)[6] == 'not known'
  monkeypatch.setattr(
      planned, 'cost', lambda *unused: slices.Cost(None, '9 of 8'))
  assert planned.figures(work, 'v5e', 8) == 'with 2 blocks of a kind: 9 of 8'
  assert planned.row('LDM sampling', 'v5e', 8)[5] == 'does not fit (9 of 8)'
