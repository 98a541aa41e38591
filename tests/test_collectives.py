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

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s8[256,64], u32[]) while(%init), condition=%condition, body=%body
  %gathered = bf16[8,10]{1,0} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %sums = (f32[6]{0}, f32[]) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
  %begun = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), replica_groups=[2,4]<=[8]
  ROOT %ended = f32[8]{0} all-gather-done(%begun)
}
'''  # noqa: E501 - a line is an instruction


def test_exchanges_of_a_programs_text():
  found = collectives.of(TEXT, 8)
  assert [(one.kind, one.size, one.group, one.times) for one in found] == [
      ('collective-permute', 256 * 64, 2, 4), ('all-gather', 160, 4, 1),
      ('all-reduce', 28, 8, 1), ('all-gather', 32, 4, 1)]
  # By hand: in a ring of n a device passes on n - 1 parts of what is gathered,
  # and twice as many of what is summed.
  assert [one.sent for one in found] == [
      4 * 256 * 64, 3 * 40, 2 * 7 * 3.5, 3 * 8]
  assert collectives.summary(collectives.counts(found)) == (
      '1 all-reduce, 2 all-gather, 4 collective-permute')
  assert collectives.summary(collectives.counts([])) == 'none'


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
    (lambda a: lax.cond(a[0, 0] > 0, lambda: a @ a.T @ a, lambda: a), (A,),
     2 * 490)], ids=['product', 'convolution', 'strides', 'gradients', 'loop',
                     'checkpoint', 'branches'])
def test_multiplications_are_counted(function, arguments, expected):
  assert flops.of(jax.make_jaxpr(function)(*arguments)) == expected


def test_products_in_an_endless_loop_are_refused():
  endless = lambda a: lax.while_loop(
      lambda c: c.sum() > 0, lambda c: c @ a.T @ a, a)
  with pytest.raises(ValueError, match='turns depend on its values'):
    flops.of(jax.make_jaxpr(endless)(A))
