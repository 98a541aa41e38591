"""Attention in pieces, and guidance, against their plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.models import attention
from msfp_jax.models.guided import Guided
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig


@pytest.mark.parametrize('queries', [1, 7, 12, 30])
def test_pieces_are_the_whole(monkeypatch, queries):
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((2, n, 3, 4)).astype(np.float32)
             for n in (queries, 9, 9))
  scores = np.einsum('bqhd,bkhd->bhqk', np.float64(q), k) / 2
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum('bhqk,bkhd->bqhd', weights, v)
  monkeypatch.setattr(attention, '_SCORES_AT_ONCE', 2 * 3 * 9 * 5)
  monkeypatch.setattr(attention, '_LEAST_QUERIES', 1)
  np.testing.assert_allclose(
      attention.attend(q, k, v), expected, rtol=0, atol=1e-6)


def test_the_scores_of_a_large_batch_are_never_all_in_memory():
  shape = jax.ShapeDtypeStruct((32, 4096, 8, 16), jnp.float32)
  jaxpr = str(jax.make_jaxpr(attention.attend)(shape, shape, shape))
  assert '32,8,4096,4096' not in jaxpr
  assert 'scan' in jaxpr


@pytest.mark.slow
@pytest.mark.parametrize('scale', [0.0, 3.0])
def test_guidance_is_two_predictions(scale):
  config = UNetConfig(
      image_size=4, ch=4, ch_mult=(1,), num_res_blocks=0, norm_groups=2,
      attn_resolutions=(), num_classes=5, dropout=0.0)
  model = UNet(config)
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  t, labels = jnp.array([3.0, 700.0]), jnp.array([1, 3])
  rng = np.random.default_rng(1)
  params = jax.tree.map(
      lambda s: rng.normal(size=s.shape).astype(np.float32),
      jax.eval_shape(model.init, jax.random.key(1), x, t, labels))
  guided, within, without = jax.jit(lambda params: (
      Guided(model, scale, 4).apply(params, x, t, labels),
      model.apply(params, x, t, labels),
      model.apply(params, x, t, jnp.array([4, 4]))))(params)
  within, without = np.float64(within), np.float64(without)
  assert np.abs(within - without).max() > 0.1
  np.testing.assert_allclose(
      guided, without + scale * (within - without), rtol=0, atol=1e-4)
