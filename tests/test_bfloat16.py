"""Fine-tuning in bfloat16: what it multiplies, and what stays in float32."""

import flux_oracle
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest
import students
import tiny

from msfp_jax import convert
from msfp_jax import kernels
from msfp_jax.models import flux
from msfp_jax.models import unet
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Static

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(0)
CONV = geometry_lib.resolve((2, 6, 6, 8), (3, 3), strides=1, padding='SAME')
E2M1, UE2M2 = FPFormat.parse('E2M1'), FPFormat.parse('UE2M2')
INT8 = FPFormat.parse('UE1M7')
STATIC = Static(E2M1, np.float32(np.exp(
    0.3 * RNG.normal(size=(1, 1, 1, 5))) / 3))
QUANTIZERS = {  # of weights and of inputs
    'msfp': (STATIC, Static(UE2M2, np.float32(0.3), np.float32(-0.28))),
    'int8': (STATIC, Static(INT8, np.float32(0.02), np.float32(-2))),
    'image': (STATIC, Block(E2M1, 'image')),
}


@pytest.fixture(params=QUANTIZERS)
def layer(request):
  weight, act = QUANTIZERS[request.param]
  kernel = jnp.asarray(RNG.normal(size=(3, 3, 8, 5)), jnp.float32)
  return QLayer(Latent(kernel, weight), act, jnp.float32(RNG.normal(size=5)))


X = jnp.asarray(RNG.normal(size=(2, 6, 6, 8)), jnp.bfloat16)


def test_products_are_of_exact_levels(layer):
  """The result is rounded to bfloat16, and nothing before it."""
  found = kernels.run(layer, X, CONV)
  expected = kernels.run(layer, X.astype(jnp.float32), CONV)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def test_gradients_are_float32s_but_for_roundings(layer):
  weights = jnp.cos(jnp.arange(2 * 6 * 6 * 5.0)).reshape(2, 6, 6, 5)

  def gradients(x):
    loss = lambda layer, x: jnp.sum(
        weights * kernels.run(layer, x, CONV).astype(jnp.float32))
    return jax.grad(loss, (0, 1), allow_int=True)(layer, x)

  (layer_grads, x_grads), (layer_exact, x_exact) = (
      gradients(x) for x in (X, X.astype(jnp.float32)))
  assert x_grads.dtype == jnp.bfloat16
  pairs = [(x_grads, x_exact),
           (layer_grads.weight.kernel, layer_exact.weight.kernel)]
  for found, expected in pairs:
    apart = np.linalg.norm(np.float32(found) - expected)
    # Of every number 2^-9 at most, and sums of them cancel each other.
    assert 0 < apart < 2**-5 * np.linalg.norm(expected)
  # A sum of rounded numbers, which may cancel each other.
  np.testing.assert_allclose(
      layer_grads.bias, layer_exact.bias,
      atol=2**-9 * float(jnp.abs(weights).sum((0, 1, 2)).max()))
  # To master weights, in their own precision.
  assert layer_grads.weight.kernel.dtype == jnp.float32


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(inner)


@pytest.mark.slow
def test_every_product_of_a_step_is_in_bfloat16():
  """Teacher and student, forward and backward; not the banks' own."""
  setup = students.net(dtype='bfloat16')
  jaxpr = jax.make_jaxpr(setup.update)(jax.eval_shape(setup.start))
  convolutions = [eqn for eqn in equations(jaxpr.jaxpr)
                  if eqn.primitive.name == 'conv_general_dilated'
                  # Sums over taps, for zero points, are no products.
                  and eqn.invars[0].aval.shape[0] != 1]
  # Three of the teacher's, two of the student's, as its window of 1 is none;
  # and on the way back two of weights and one of inputs.
  assert len(convolutions) >= 8
  for eqn in convolutions:
    assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype('bfloat16')}, eqn


def test_every_product_of_a_transformer_is_in_bfloat16():
  """Queries and keys too, which turn by angles in float32."""
  model = flux.Flux(flux_oracle.TINY)
  cast = lambda tree: jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), tree)
  x, t, *texts = flux_oracle.inputs_of(flux_oracle.TINY)
  jaxpr, out = jax.make_jaxpr(model.apply, return_shape=True)(
      {'params': cast(convert.abstract_params(model))}, cast(x), t,
      *cast(texts))
  products = [eqn for eqn in equations(jaxpr.jaxpr)
              if eqn.primitive.name == 'dot_general']
  assert len(products) > 20
  for eqn in products:
    assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype('bfloat16')}, eqn
  assert out.dtype == jnp.bfloat16


@pytest.mark.slow
def test_what_is_trained_is_float32_and_moves_by_less_than_bfloat16_holds():
  setup = students.net(dtype='bfloat16', learning_rate=1e-5)
  state, scalars = setup.run(1)
  kinds = {leaf.dtype for leaf in jax.tree.leaves(
      (state.trainable, state.position))}
  assert kinds == {jnp.dtype('float32')}
  assert all(np.isfinite(value) for value in scalars[0].values())
  before = np.array(state.trainable['banks']['body']['b'])
  again, _ = setup.run(1, state)
  moved = np.abs(again.trainable['banks']['body']['b'] - before).max()
  assert 0 < moved < 1e-4


@pytest.mark.slow
def test_its_steps_are_float32s_but_for_roundings():
  """The losses of two trajectories."""
  found, expected = (students.net(dtype=dtype).run(8)[1]
                     for dtype in ('bfloat16', 'float32'))
  for ours, exact in zip(found, expected, strict=True):
    # An input next to a rounding boundary falls to its other side.
    assert ours['mse'] == pytest.approx(exact['mse'], rel=0.15)
  assert found[0]['mse'] != expected[0]['mse']


@pytest.mark.slow
def test_labels_and_times_stay_what_they_are():
  """A label of 300 in bfloat16 would be another class."""
  model = unet.UNet(unet.UNetConfig(
      image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1,),
      num_res_blocks=1, attn_resolutions=(), norm_groups=4, dropout=0.0,
      num_classes=400))
  params = jax.jit(model.init)(
      jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,)),
      jnp.zeros((1,), jnp.int32))['params']
  setup = students.net(dtype='bfloat16')
  student = setup.student.__class__(
      model, params, setup.student.spec, None, (), dtype='bfloat16')
  x, labels = tiny.noise(3), jnp.full((len(tiny.noise(3)),), 301, jnp.int32)
  found = student.teach(x, 999.0, labels)
  apply = jax.jit(lambda t, labels: model.apply(
      {'params': params}, x, jnp.full(len(x), t), labels))
  exact, other = apply(999.0, labels), apply(992.0, labels - 1)
  assert found.dtype == jnp.float32
  apart = lambda a, b: float(np.linalg.norm(a - b))
  assert apart(found, exact) < 0.2 * apart(other, exact)
