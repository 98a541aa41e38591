"""Random quantized layers and their exact outputs, for tests of kernels."""

import functools

import jax
import kernel_oracle
import numpy as np

from msfp_jax import kernels
from msfp_jax.kernels import carriers
from msfp_jax.kernels import product
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static

# Compiling takes longer than running.
jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


class Case:
  """A random layer, its input, and its output by float64.

  Its quantizers are static, of the formats named; or `inputs`, `weights`.

  Attributes:
    layer: not packed.
    packed: the same, packed.
    x: its input.
    expected: its output.
    span: of every output, the sum of |x| |w| were all x the largest, as
      carried: what a relative error of every product and sum is of.
    length: of the sums.
  """

  def __init__(self, x_shape, w_shape, weight, act, zero=None, act_zero=None,
               bias=True, inputs=None, weights=None, **geometry):
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    weight, act = FPFormat.parse(weight), act and FPFormat.parse(act)
    outputs = w_shape[-1]
    self.geometry = geometry
    self.x, w = draw(x_shape), draw(w_shape)
    scale = np.float32(3 / weight.max * np.exp2(rng.uniform(-1, 0, outputs)))
    zeros = None if zero is None else np.float32(zero + 0.1 * draw(outputs))
    bias = draw(outputs) if bias else None
    act_scale = act and np.float32(2.5 / act.max)
    act_zero = None if act_zero is None else np.float32(act_zero)
    if weights is None:
      weights = Static(weight, _wide(scale, w), _wide(zeros, w))
    if inputs is None:
      inputs = Static(act, act_scale, act_zero) if act else Full()
    self.layer = QLayer(weights.quantize(w, axis=-2), inputs, bias)
    self.packed = packed(self.layer)
    if geometry:
      geometry = geometry_lib.resolve(x_shape, w_shape[:-2], **geometry)
    self.resolved = geometry or None
    w = kernel_oracle.quantized(w, weights, axis=-2)
    x = kernel_oracle.quantized(self.x, inputs, axis=-1)
    largest = np.abs(x).max()
    if isinstance(inputs, Static):
      zero_point = 0 if inputs.zero_point is None else inputs.zero_point
      largest = inputs.fmt.max * inputs.scale + np.abs(zero_point)
    bias = 0 if bias is None else bias
    self.expected = self.product(x, w) + bias
    self.span = self.product(
        np.full(x_shape, largest), np.abs(w)) + np.abs(bias)
    self.length = np.prod(w_shape[:-1])

  def product(self, x, w):
    if not self.geometry:
      return x @ w
    return kernel_oracle.conv(x, w, **self.geometry)

  def apply(self, x, layer, **options):
    """Runs the layer; one operation after the other unless it is jitted."""
    return kernels.run(layer, x, self.resolved, **options)

  def run(self, layer=None, **options):
    layer = self.packed if layer is None else layer
    return jit(lambda x, layer: self.apply(x, layer, **options))(
        self.x, layer)

  def assert_close(self, actual, rtol=1e-6):
    """Checks outputs to a tolerance relative to the largest one."""
    np.testing.assert_allclose(
        actual, self.expected, rtol=rtol, atol=rtol * np.abs(
            self.expected).max())

  def outputs(self, x, layer):
    """Runs the reference, and XLA in every carrier that holds the formats."""
    fmts = self.layer.weight.fmt, self.layer.input.fmt
    expected = self.apply(x, layer, implementation='reference')
    return {'reference': expected} | {
        carrier: self.apply(x, layer, implementation='xla', carrier=carrier)
        for carrier in ('int8', 'fp8', 'bf16')
        if all(carriers.carry(fmt, carrier) for fmt in fmts)}

  def assert_agree(self, layer=None, compile_=None):
    """Checks the reference, and XLA in every carrier, against float64.

    Bit for bit where sums are exact. Else every product and sum rounds once,
    and so do scale, shift and what they are applied to.
    """
    layer = self.packed if layer is None else layer
    outputs = (compile_ or jit)(self.outputs)(self.x, layer)
    expected = outputs.pop('reference')
    self.assert_close(expected)
    assert outputs
    is_exact = functools.partial(
        kernel_oracle.is_exact, layer.weight.fmt, layer.input.fmt, self.length)
    bound = 2.0**-24 * (2 * self.length + 8) * self.span
    for carrier, actual in outputs.items():
      if (is_exact(carrier) and is_exact('f32')
          and not carriers.cancels(layer.weight)):
        np.testing.assert_array_equal(actual, expected, carrier)
      else:
        assert (np.abs(actual - self.expected) <= bound).all(), carrier


def _wide(scale, w):
  """`[O]` as it stands in a quantizer of weights."""
  return None if scale is None else scale.reshape(
      (1,) * (w.ndim - 1) + (-1,))


def packed(layer):
  """A layer with codes for levels."""
  return layer.replace(weight=layer.weight.packed())


def prepared(layer, implementation=None):
  """A packed layer of one set of weights as `kernels.prepare` makes it."""
  weight = layer.weight.replace(data=np.asarray(layer.weight.data)[None])
  return kernels.prepare(
      layer.replace(weight=weight), implementation).at(0)


def quantized_with_totals(x):
  """An activation's codes in int8, and their sums by row."""
  static = Static(FPFormat.parse('E2M1'), np.float32(0.3))
  v = carriers.operand(static.quantize(jax.nn.silu(x), axis=-1), 'int8').v
  return v, product.totals(v, None, ())[0]


def conv_case(x_shape, w_shape, *formats, strides=1, padding=0, dilation=1,
              groups=1, **options):
  axes = len(x_shape) - 2
  if isinstance(padding, int):
    padding = (padding, padding)
  return Case(x_shape, w_shape, *formats, **options, strides=(strides,) * axes,
              padding=(padding,) * axes, dilation=(dilation,) * axes,
              groups=groups)


SOME = {
    'dense': functools.partial(Case, (5, 7), (7, 6)),
    'conv': functools.partial(conv_case, (1, 5, 6, 3), (3, 3, 3, 4), padding=1),
}
