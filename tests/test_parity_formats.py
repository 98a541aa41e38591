"""Block formats against those of qwix and of jax.nn.scaled_matmul."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.quant import block_formats
from msfp_jax.quant import quantizers
from msfp_jax.quant.block import Block

pytestmark = pytest.mark.parity


def rows():
  """Groups of any size, of zeros, and with one outlier."""
  x = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
  x *= np.exp2(np.random.default_rng(1).integers(-8, 8, (64, 1)))
  x[0], x[1, 32:64], x[2, 5] = 0, 0, 200
  return x.astype(np.float32)


def by_qwix(x, name):
  from qwix._src.core import qarray
  size = {'nvfp4': 16, 'mxfp4': 32}[name]
  found = jax.jit(lambda x: qarray.quantize(x, qarray.HowToQuantize(
      qtype=name, channelwise_axes=(0,), tiled_axes={1: size})))(x)
  return (np.asarray(found.qvalue.astype(jnp.float32)),
          np.asarray(found.scale.astype(jnp.float32)))


@pytest.mark.optimized
@pytest.mark.parametrize('name, ours', [
    # qwix has no second level, and powers of two that cut nothing off.
    ('nvfp4', Block(block_formats.nvfp4(4).fmt, 'group', 16, 'e4m3')),
    ('mxfp4', block_formats.mxfp4(4, 'rceil'))])
def test_against_qwix(name, ours):
  x = rows()
  values, scale = by_qwix(x, name)
  tensor = quantizers.quantize(ours, x, -1)
  # Of a group of zeros any scale does: qwix has another. Of a scale that is
  # rounded to 0 its values are +-6, times 0.
  some = np.abs(x).reshape(*scale.shape, -1).max(-1) > 0
  np.testing.assert_array_equal(
      np.float32(tensor.scale)[some], scale[some])
  some = np.repeat(some & (scale > 0), x.shape[1] // scale.shape[1], 1)
  assert some.mean() > 0.9
  np.testing.assert_array_equal(np.asarray(tensor.levels())[some],
                                values[some])


def test_against_the_quantizer_of_scaled_products():
  """NVFP4 with the global scale of jax.nn.scaled_dot_general."""
  from jax._src.cudnn import scaled_matmul_stablehlo as library
  x = rows()
  outer = np.float32(np.abs(x).max() / 6 / 448)
  config = jax.nn.get_scaled_dot_general_config(
      'nvfp4', jnp.full((1,), outer))
  values, scale = jax.jit(
      lambda x: library.quantize(x, config))(x[None])
  tensor = quantizers.quantize(block_formats.nvfp4(4), x[None], -1).bank(0)
  np.testing.assert_array_equal(
      np.float32(tensor.scale), np.float32(scale[0]))
  # There x is divided by both scales in turn, which rounds twice: a tie may go
  # the other way.
  other = np.asarray(tensor.levels()) != np.float32(values[0])
  assert other.mean() < 1e-3
