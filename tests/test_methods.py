"""Rows of a table: names, models, sizes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import methods as rows_lib


def test_packed_bytes_by_hand():
  conv_in = 2 * 36 * 4 // 8 + 4 * 4 + 4 * 4 + 4 + 4  # scales, biases, s, z
  temb = 4 * (8 + 4)  # full precision
  conv_out = 14 + 4 + 4 + 4  # 36 x 3 bits are 13.5 bytes; scale, bias, s
  assert rows_lib.packed_bytes(toy.deployed()) == conv_in + temb + conv_out


def test_full_precision_has_the_bytes_of_its_parameters():
  params, plan = toy.params(), toy.plan()
  experiment = types.SimpleNamespace(model=toy.Toy(), params=params, plan=plan)
  full = rows_lib.untuned(experiment, None)
  assert rows_lib.packed_bytes(full) == 4 * sum(
      leaf.size for leaf in jax.tree.leaves(params))
  x = jax.random.normal(jax.random.key(5), (2, *toy.SHAPE))
  t = jnp.full((2,), 3.0)
  np.testing.assert_array_equal(
      full.eps_fn(x, t, 0), toy.Toy().apply({'params': params}, x, t))


def fake_experiment():
  return types.SimpleNamespace(
      quant=experiment_lib.QuantSettings('msfp', 4, 4, 'all-4'))


@pytest.mark.parametrize('name, asked', [
    ('int', ('int', 4, 4)), ('msfp:w6a8', ('msfp', 6, 8))])
def test_a_recipe_may_carry_its_bits(monkeypatch, name, asked):
  experiment = fake_experiment()
  experiment.calibrate = lambda *args: args
  monkeypatch.setattr(rows_lib, 'untuned', lambda experiment, spec: spec)
  row = rows_lib.make_row(experiment, name, '')
  assert row.deployed == asked
  assert (row.name, row.weight_bits, row.act_bits) == (name, *asked[1:])


def test_bits_of_a_row_that_there_are_not():
  with pytest.raises(ValueError, match="'w4a9'.*3 to 8"):
    rows_lib.make_row(fake_experiment(), 'msfp:w4a9', '')
