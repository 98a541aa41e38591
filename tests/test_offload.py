"""Weights that wait in the host's memory: where they are, and when they come.

What XLA makes of it for an accelerator is in test_aot_offload.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import marks
import numpy as np
import packed_files
import pytest
from test_lifted import LIFTED
from test_lifted import random_params
from test_lifted import Stack
import tiny
import toy

import msfp_jax as msfp
from msfp_jax.convert.lora import Lora
from msfp_jax.convert.lora import LowRank
from msfp_jax.kernels import apply as apply_lib
from msfp_jax.kernels import offload
from msfp_jax.quant import interception
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Static

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)


def kinds(tree):
  return {array.sharding.memory_kind for array in jax.tree.leaves(tree)}


def layers_of(params):
  """All in INT4, packed, one set of weights each."""
  static = Static(FPFormat.parse('E1M2'), np.float32(0.5))
  return {name: QLayer(static.quantize(kernel, axis=-2).packed(), static)
          for name, kernel in interception.leaves(params, 'kernel').items()}


def on_host(layers):
  memory = offload.host()
  return {name: offload.to_host(layer, memory)
          for name, layer in layers.items()}


def test_matrices_wait_and_vectors_do_not():
  block = Block(FPFormat.parse('E2M1'), group=16, scale_type='e4m3',
                two_level=True)
  kernel = np.random.default_rng(0).normal(size=(1, 32, 8)).astype(np.float32)
  layer = QLayer(block.quantize_banks(kernel).packed(), block,
                 np.zeros(8, np.float32))
  placed = offload.to_host(layer, offload.host())
  assert kinds([placed.weight.data, placed.weight.scale]) == {offload.KIND}
  assert kinds([placed.weight.outer, placed.bias]) == kinds(jnp.zeros(1))
  assert placed.weight.data.shape == (1, 16, 8)
  assert (placed.nbits, placed.num_banks) == (layer.nbits, 1)
  for back in (offload.fetch(placed), offload.to_numpy(placed)):
    tiny.assert_trees_equal(back, layer)


@pytest.mark.slow
@pytest.mark.optimized
def test_samples_are_the_same_bit_for_bit():
  """With two banks, one of which each step picks, and a layer as it was."""
  packed = toy.deployed().packed()
  noise, key = tiny.noise(0, batch=3), jax.random.key(1)
  waiting = packed.offloaded()
  assert kinds(waiting.layers['conv_in'].weight.data) == {offload.KIND}
  np.testing.assert_array_equal(
      waiting.sample(noise, key=key), packed.sample(noise, key=key))
  # Neither traced nor compiled as a whole.
  t = jnp.full(3, 500.0)
  np.testing.assert_allclose(
      waiting.eps_fn(noise, t, 1), packed.eps_fn(noise, t, 1), atol=1e-6)


@pytest.mark.optimized
def test_loras_beside_weights_that_wait():
  rng = np.random.default_rng(2)
  part = lambda *shape: rng.normal(size=shape).astype(np.float32)
  loras = [(Lora('mine', {
      'conv_in': LowRank(part(3, 3, 1, 2), part(2, 4), 0.5)}), 1.0)]
  packed = toy.deployed().packed()
  x, t = tiny.noise(0, batch=3), jnp.full(3, 500.0)
  expected, found = (
      jax.jit(lambda arrays, model=model: model.with_arrays(arrays).eps_fn(
          x, t, 1))(model.arrays)
      for model in (packed.with_loras(loras),
                    packed.offloaded().with_loras(loras)))
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('block', ['jit', 'remat', 'vmap'])
def test_in_blocks_that_are_traced_by_themselves(block):
  model = Stack(LIFTED[block])
  layers = layers_of(random_params(model, X))
  run = jax.jit(lambda layers, x: apply_lib.apply(model, {}, layers, x))
  np.testing.assert_array_equal(run(on_host(layers), X), run(layers, X))


class Wide(nn.Module):
  """Layers that could all be multiplied at once."""

  @nn.compact
  def __call__(self, x):
    return sum(nn.Dense(6, use_bias=False, name=f'{i}')(x) for i in range(5))


@pytest.mark.usefixtures('on_cpu')
def test_weights_come_after_the_product_before_the_last():
  """By the program: what each copy waits for, of the products before it."""
  model = Wide()
  layers = on_host(layers_of(random_params(model, X)))
  program = jax.make_jaxpr(
      lambda layers, x: apply_lib.apply(model, {}, layers, x))(layers, X)
  behind, products, waited = {}, 0, []
  for equation in program.eqns:
    needs = set().union(*(
        behind.get(operand, ()) for operand in equation.invars
        if not isinstance(operand, jax.extend.core.Literal)))
    if equation.primitive.name == 'cond':  # see `compiler.apart`
      products += 1
      needs.add(products)
    if equation.primitive.name == 'device_put':
      waited.append(max(needs, default=0))
    behind |= dict.fromkeys(equation.outvars, needs)
  assert products == 5
  assert waited == [0, 0, 1, 2, 3]


def test_nothing_is_added_to_programs_without_any():
  model = Wide()
  layers = layers_of(random_params(model, X))
  program = str(jax.make_jaxpr(
      lambda layers, x: apply_lib.apply(model, {}, layers, x))(layers, X))
  assert 'device_put' not in program
  assert 'optimization_barrier' not in program


@pytest.fixture(params=marks.quick(['nvfp4'], ['by hand', 'nvfp4']))
def saved(tmp_path, request):
  params = tiny.params(tiny.UNET)
  spec = (tiny.by_hand(params) if request.param == 'by hand' else
          msfp.calibrate(tiny.UNET, params, recipe='nvfp4'))
  packed = msfp.pack(tiny.UNET, params, spec, tiny.PLAN)
  msfp.save(tmp_path / 'packed.safetensors', packed)
  return tmp_path / 'packed.safetensors'


def test_loaded_onto_the_host_and_saved_again(saved):
  waiting = msfp.load(saved, offload=True)
  for layer in waiting.layers.values():
    assert kinds(layer.weight.data) == {offload.KIND}
    assert kinds(layer.bias) != {offload.KIND}
  packed_files.assert_equal(waiting.packed(), msfp.load(saved))
  again = saved.with_name('again.safetensors')
  msfp.save(again, waiting)
  assert again.read_bytes() == saved.read_bytes()
  other = waiting.with_implementation('reference')
  assert kinds(other.layers['conv_in'].weight.data) == {offload.KIND}


def test_what_is_loaded_is_where_it_runs(saved):
  loaded = msfp.load(saved)
  assert all(isinstance(array, jax.Array)
             for array in jax.tree.leaves(loaded.arrays))
  assert kinds(loaded.arrays) == kinds(jnp.zeros(1))
  other = loaded.with_implementation('reference')
  assert kinds(other.arrays) == kinds(jnp.zeros(1))


def test_a_device_that_does_not_read_the_hosts_memory(saved, monkeypatch):
  monkeypatch.setattr(offload, 'KIND', 'nowhere')
  with pytest.raises(ValueError, match="take 'nowhere': load without offload"):
    msfp.load(saved, offload=True)
