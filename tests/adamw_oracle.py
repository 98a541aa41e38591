"""AdamW in float64 (Loshchilov and Hutter 2019, algorithm 2)."""

import numpy as np


def adamw(param, gradients, rates, b2, weight_decay, b1=0.9, eps=1e-8):
  """The parameter after each of the gradients, at a learning rate for each."""
  param = np.float64(param)
  first, second, seen = np.zeros_like(param), np.zeros_like(param), []
  for i, (gradient, rate) in enumerate(
      zip(np.float64(gradients), rates, strict=True), 1):
    first = b1 * first + (1 - b1) * gradient
    second = b2 * second + (1 - b2) * gradient**2
    direction = (first / (1 - b1**i)) / (
        np.sqrt(second / (1 - b2**i)) + eps)
    param = param - rate * (direction + weight_decay * param)
    seen.append(param)
  return np.array(seen)
