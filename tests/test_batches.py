"""What a sampler starts from: every mistake gets a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.models.denoiser import Condition
from msfp_jax.quant import batches as batches_lib

NOISE = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
LABELS = np.arange(2)


@pytest.mark.parametrize('given, count', [
    (NOISE, 1), (jnp.asarray(NOISE), 1), ([NOISE], 1), ([NOISE, NOISE], 2),
    ((NOISE, NOISE), 2), (iter([NOISE] * 3), 3), ([(NOISE,)], 1),
    ([NOISE.astype(np.float64)], 1), (list(jnp.stack([NOISE] * 4)), 4)])
def test_batches_of_noise(given, count):
  found = batches_lib.check_batches(given)
  assert len(found) == count
  for batch, in found:
    assert isinstance(batch, jax.Array) and batch.dtype == jnp.float32
    np.testing.assert_array_equal(batch, NOISE)


def test_conditions_stay_as_they_are():
  (noise, labels), = batches_lib.check_batches([(NOISE, LABELS)])
  np.testing.assert_array_equal(noise, NOISE)
  assert labels is LABELS


@pytest.mark.parametrize('given, message', [
    ([], 'batches is empty'),
    (iter([]), 'batches is empty'),
    (np.stack([NOISE] * 3), r'one array of shape \(3, 2, 4, 4, 1\): write '
     r'batches=\[noise\].*batches=list\(noise\)'),
    (NOISE[0, 0], r'batches=\[noise\]'),
    ((NOISE, LABELS), r'batches=\[\(noise, condition\)\]'),
    (None, 'list of arrays.*not None'),
    (3, 'not a int'),
    ('noise', 'not a str'),
    ({'noise': NOISE}, 'not a dict'),
    ([NOISE, None], 'batch 1 is None'),
    ([[1.0]], 'batch 0 is a list'),
    ([()], 'batch 0 is None'),
    ([NOISE, NOISE.astype(np.int32)], 'batch 1 is int32: .*float32.*normal'),
    ([NOISE.astype(np.uint8)], 'batch 0 is uint8'),
    ([NOISE.astype(np.float16)], 'batch 0 is float16: .*by its dtype'),
    ([jnp.asarray(NOISE, jnp.bfloat16)], 'batch 0 is bfloat16'),
    ([NOISE.astype(bool)], 'batch 0 is bool'),
    ([NOISE[:0]], r'shape \(0, 4, 4, 1\).*at least one image'),
    ([np.float32(1)], 'batch 0 is a float32'),
    ([jnp.float32(1)], r'batch 0 has shape \(\)'),
])
def test_what_is_no_batches(given, message):
  with pytest.raises(ValueError, match=message):
    batches_lib.check_batches(given)


def test_noise_is_named_in_its_error():
  with pytest.raises(ValueError, match='^noise is int32: a sampler starts'):
    batches_lib.check_noise(NOISE.astype(np.int32))


class Labelled:
  """A model of this package, of what it says of itself."""
  sample_shape = (8, 8, 3)
  conditions = (Condition('labels', classes=10),)


@pytest.mark.parametrize('shape, condition, message', [
    ((8, 8, 3), (LABELS,), r'\(8, 8, 3\): for one image write noise\[None\]'),
    ((2, 8, 8, 1), (LABELS,), r'denoises \[B, 8, 8, 3\]'),
    ((2, 8, 3, 1, 1), (LABELS,), r'denoises \[B, 8, 8, 3\]'),
    ((2, 8, 8, 3), (), r"0 conditions beside the noise.*\['labels'\]"),
    ((2, 8, 8, 3), (LABELS, LABELS), '2 conditions beside the noise')])
def test_inputs_that_the_model_does_not_take(shape, condition, message):
  with pytest.raises(ValueError, match=message):
    batches_lib.check_inputs(Labelled(), jnp.zeros(shape), condition)


def test_inputs_of_other_sizes_and_of_other_models_pass():
  batches_lib.check_inputs(Labelled(), jnp.zeros((2, 16, 24, 3)), (LABELS,))
  batches_lib.check_inputs(object(), jnp.zeros((2, 7)), ())
