"""Fused tensors are taken apart by a table, and read when asked for."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from msfp_jax.convert import source
from msfp_jax.convert.fused import Fused
from msfp_jax.convert.fused import Product
from msfp_jax.convert.fused import renamed
from msfp_jax.convert.fused import take_apart
from msfp_jax.convert.fused import take_apart_products
from msfp_jax.convert.tensors import LazyTensor

TABLE = (
    renamed(r'in(\d)', r'first.\1'),
    Fused(r'b\.(\d)\.qkv', {r'\1.q': (0,), r'\1.k': (1,), r'\1.v': (2,)}, 3),
    Fused('swapped', {'right': (1, 0)}, 2),
    Fused('wide', {'a': (0,), 'b': (1, 2)}, 3, axis=1))


def take(**arrays):
  lazy = {name.replace('__', '.'): LazyTensor.of(value)
          for name, value in arrays.items()}
  found = take_apart(lazy, TABLE)
  for tensor in found.values():
    assert tensor.read().shape == tensor.shape
    assert tensor.read().dtype == tensor.dtype
  return {name: tensor.read().tolist() for name, tensor in found.items()}


def test_names_alone():
  assert take(in3__weight=np.ones(1), in3__bias=np.zeros(1), in4__scale=np.ones(
      1), other=np.ones(1), in3__mean=np.ones(1)) == {
          'first.3.weight': [1], 'first.3.bias': [0], 'first.4.weight': [1],
          'other': [1], 'in3.mean': [1]}


def test_rows_in_the_order_of_the_parts():
  weight = np.arange(12).reshape(6, 2)
  assert take(b__7__qkv__weight=weight, b__7__qkv__bias=np.arange(6)) == {
      '7.q.weight': [[0, 1], [2, 3]], '7.k.weight': [[4, 5], [6, 7]],
      '7.v.weight': [[8, 9], [10, 11]],
      '7.q.bias': [0, 1], '7.k.bias': [2, 3], '7.v.bias': [4, 5]}
  assert take(swapped__bias=np.arange(4)) == {'right.bias': [2, 3, 0, 1]}


def test_inputs_have_one_bias():
  assert take(wide__weight=np.arange(6).reshape(1, 6), wide__bias=np.ones(
      1)) == {'a.weight': [[0, 1]], 'b.weight': [[2, 3, 4, 5]], 'a.bias': [1]}


@pytest.mark.parametrize('name, shape', [
    ('swapped.weight', (3, 2)), ('swapped.weight', ()), ('wide.weight', (6,)),
    ('wide.weight', (6, 4))])
def test_what_has_no_such_pieces_keeps_its_name(name, shape):
  found = take_apart({name: LazyTensor.of(np.ones(shape))}, TABLE)
  assert [*found] == [name] and found[name].shape == shape


def test_no_tensor_is_lost_where_two_have_one_place():
  assert take(in3__weight=np.ones(1), in3__scale=np.zeros(1)) == {
      'first.3.weight': [1], 'in3.scale': [0]}


def test_of_a_file_a_part_reads_its_rows_alone(tmp_path):
  values = np.arange(12, dtype=np.float32).reshape(6, 2).astype(
      ml_dtypes.bfloat16)
  safetensors.numpy.save_file(
      {'b.0.qkv.weight': values}, tmp_path / 'a.safetensors')
  tensors, _ = source.read_safetensors(tmp_path / 'a.safetensors')
  # The whole is not to be asked for.
  whole = dataclasses.replace(tensors['b.0.qkv.weight'], read=None)
  found = take_apart({'b.0.qkv.weight': whole}, TABLE)
  for i, part in enumerate('qkv'):
    np.testing.assert_array_equal(
        found[f'0.{part}.weight'].read(), values[2 * i:2 * i + 2])


def test_nothing_is_read_before_it_is_asked_for():
  def read():
    raise AssertionError('was read')
  tensor = LazyTensor((6, 2), np.dtype(np.float32), read, 'is sparse')
  found = take_apart({'b.0.qkv.weight': tensor}, TABLE)
  assert [t.shape for t in found.values()] == [(2, 2)] * 3
  assert {t.refused for t in found.values()} == {'is sparse'}


@pytest.mark.parametrize('module, whole', [
    ('in3', ['first.3']), ('b.7.qkv', ['7.q', '7.k', '7.v']),
    ('swapped', ['right']), ('wide', ['a', 'b']), ('other', ['other'])])
def test_a_products_parts_are_those_of_the_matrix(module, whole):
  """Taken apart and multiplied, or multiplied and taken apart."""
  rng = np.random.default_rng(0)
  down, up = rng.integers(-9, 9, (2, 6)), rng.integers(-9, 9, (12, 2))
  found = take_apart_products({module: Product(
      LazyTensor.of(down), LazyTensor.of(up), 0.5, 'its name')}, TABLE)
  expected = take_apart({f'{module}.weight': LazyTensor.of(up @ down)}, TABLE)
  assert [*found] == whole
  for part, product in found.items():
    assert product.scale == 0.5 and product.name == 'its name'
    np.testing.assert_array_equal(
        product.up.read() @ product.down.read(),
        expected[f'{part}.weight'].read())


def test_a_product_that_cannot_be_split_keeps_its_name():
  one = Product(LazyTensor.of(np.ones((1, 4))), LazyTensor.of(np.ones((4, 1))),
                1.0, 'x')
  found = take_apart_products({'wide': one, 'b.1.qkv': one}, TABLE)
  assert [*found] == ['wide', 'b.1.qkv']
