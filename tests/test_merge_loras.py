"""LoRAs merged into weights in full precision."""

import ml_dtypes
import numpy as np
import pytest

import msfp_jax as msfp
from msfp_jax.convert import lora as lora_lib


def of_layers(layers, source='mine'):
  return lora_lib.Lora(source, {
      name: lora_lib.LowRank(np.float32(down), np.float32(up), 1.0)
      for name, (down, up) in layers.items()})


PARAMS = {'a': {'kernel': np.ones((3, 4), np.float32), 'bias': np.ones(4)},
          'b': {'kernel': np.ones((3, 3, 3, 4), ml_dtypes.bfloat16)}}
LORA = of_layers({'a': (np.ones((3, 1)), 2 * np.ones((1, 4))),
                  'b': (np.ones((3, 3, 3, 1)), np.ones((1, 4)))})


def test_merged_weights_keep_their_type_and_their_names():
  merged = msfp.merge_loras({'params': PARAMS}, [(LORA, 0.5), (LORA, 1)])
  np.testing.assert_array_equal(merged['params']['a']['kernel'], 4)
  assert merged['params']['b']['kernel'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(
      np.float32(merged['params']['b']['kernel']), 2.5)
  assert merged['params']['a']['bias'] is PARAMS['a']['bias']
  np.testing.assert_array_equal(PARAMS['a']['kernel'], 1)


def test_strength_0_merges_nothing():
  merged = msfp.merge_loras(PARAMS, [(LORA, 0.0)])
  assert merged['a']['kernel'] is PARAMS['a']['kernel']


@pytest.mark.parametrize('loras, error, part', [
    ([LORA], TypeError, 'must be pairs'), ([('x', 1)], TypeError, "is 'x'"),
    ([(LORA, '1')], ValueError, "strength '1' of mine"),
    ([(LORA, np.nan)], ValueError, 'strength nan'),
    ([(LORA, None)], ValueError, 'strength None'),
    ([(of_layers({'c': (np.ones((3, 1)), np.ones((1, 4)))}), 1)], ValueError,
     r"mine belongs to another model: 1 of its 1 layers.*\['c'\]"),
    ([(of_layers({'a': (np.ones((2, 1)), np.ones((1, 4)))}), 1)], ValueError,
     'belongs to another model')])
def test_what_cannot_be_merged(loras, error, part):
  with pytest.raises(error, match=part):
    msfp.merge_loras(PARAMS, loras)
