"""The convolution of published classifiers: with a bias, in full precision."""

from collections.abc import Mapping

import jax


def convolve(layer: Mapping[str, jax.Array], x: jax.Array, stride: int = 1,
             padding: int = 0) -> jax.Array:
  """Convolves `[N, H, W, C]`; as many zeros on each side as `padding`.

  Args:
    layer: 'kernel', HWIO, and 'bias' `[O]`.
    x: float32.
    stride: in pixels, each way.
    padding: likewise.
  """
  return layer['bias'] + jax.lax.conv_general_dilated(
      x, layer['kernel'], (stride, stride), [(padding, padding)] * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      # A distance must not depend on the device that it is measured on.
      precision=jax.lax.Precision.HIGHEST)
