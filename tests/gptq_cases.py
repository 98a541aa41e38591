"""Inputs, weights and their errors that tests of GPTQ share."""

import numpy as np

from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import gptq

RNG = np.random.default_rng(0)
ROWS, OUTPUTS = 80, 12


def correlated(size, count=400):
  """Draws inputs `[N, K]` that share most of what they are."""
  common = RNG.standard_normal((count, 6)) @ RNG.standard_normal((6, size))
  x = common + 0.3 * RNG.standard_normal((count, size)) + 0.5
  return x * np.exp(RNG.uniform(-1, 1, size))


X = correlated(ROWS)
GRAM = X.T @ X / len(X)
KERNEL = RNG.standard_normal((ROWS, OUTPUTS)).astype(np.float32)


def nearest(quantizer, kernel=KERNEL):
  return np.asarray(fit_lib.restored(quantizer, kernel, -2))


def by_gptq(quantizer, kernel=KERNEL, gram=GRAM):
  tensor = gptq.round_weights(kernel, quantizer, gram)
  return np.asarray(tensor.bank(0).dequantize())


def true_error(weights, x=X, kernel=KERNEL):
  """Mean squared error of the outputs themselves."""
  return np.mean((x @ (np.float64(weights) - kernel))**2)
