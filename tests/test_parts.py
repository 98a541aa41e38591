"""Batches in parts, and activations computed twice: the same gradients."""

import dataclasses

import flax.linen as nn
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest
import students
import tiny

from configs import common
from msfp_jax.base import devices
from msfp_jax.tune import finetune
from msfp_jax.tune import parts
from msfp_jax.tune import pretrain
from msfp_jax.tune import remat

LAYOUT = devices.layout()


def work(batch):
  x, y = batch
  loss = lambda w: jnp.mean((x @ w - y)**2)
  return jax.value_and_grad(loss)(jnp.ones(3)), (x.sum(-1), y)


def test_parts_give_the_means_and_the_rows_of_the_whole():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(12, 3)), rng.normal(size=12)
  (loss, grads), (sums, same) = jax.jit(
      lambda x, y: parts.run(work, (x, y), 4, LAYOUT))(x, y)
  error = x @ np.ones(3) - y
  np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-6)
  np.testing.assert_allclose(grads, 2 * x.T @ error / 12, rtol=1e-5)
  np.testing.assert_allclose(sums, x.sum(-1), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(same, np.float32(y))  # in their order


def test_parts_are_computed_one_after_the_other():
  """As a loop over a quarter of the rows: nothing is of all of them."""
  jaxpr = jax.make_jaxpr(lambda batch: parts.run(work, batch, 4, LAYOUT))(
      (jnp.ones((12, 3)), jnp.ones(12)))
  loop, = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan')
  products = [eqn for eqn in loop.params['jaxpr'].eqns
              if eqn.primitive.name == 'dot_general']
  assert products and loop.params['length'] == 4
  assert all(12 not in variable.aval.shape
             for eqn in products for variable in eqn.invars)


def test_parts_must_divide_the_batch():
  settings = students.settings_of()
  with pytest.raises(ValueError, match=r'config.finetune.accumulate=3: must '
                     r'divide batch_size=4'):
    dataclasses.replace(settings, accumulate=3)
  usual = dict(common.get_config().pretrain)
  with pytest.raises(ValueError, match=r'config.pretrain.accumulate=5'):
    pretrain.PretrainSettings(**usual | {'batch_size': 8, 'accumulate': 5})


def pretrained(how='none', accumulate=1, updates=2):
  """A small UNet after some updates, on batches of 8."""
  tx = pretrain.optimizer(pretrain.PretrainSettings(
      **dict(common.get_config().pretrain) | {'warmup': 0}))
  update = jax.jit(lambda state, images: pretrain.make_update(
      tiny.UNET, tiny.SCHEDULE, tx, 0.9, jax.random.key(1), flip=True,
      how_remat=how, accumulate=accumulate)(state, lambda key: images))
  params = jax.tree.map(jnp.asarray, tiny.params(tiny.UNET))
  state = pretrain.PretrainState(
      jnp.zeros((), jnp.int32), params, params, tx.init(params))
  images = jax.random.randint(
      jax.random.key(2), (8, *tiny.IMAGE), 0, 256).astype(jnp.uint8)
  for _ in range(updates):
    state, scalars = update(state, images)
  return jax.device_get(scalars)


@pytest.mark.parametrize('options', [
    pytest.param({'how': 'blocks', 'accumulate': 2}, marks=pytest.mark.slow),
    # Each compiles for half a minute.
    *[pytest.param(case, marks=pytest.mark.long) for case in (
        {'how': 'products'}, {'how': 'blocks'}, {'accumulate': 4})]], ids=str)
def test_pretraining_is_the_same(options):
  """Its loss and the norm of its gradients, of a second update too."""
  found, expected = pretrained(**options), pretrained()
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-5), name


def tuned(how='none', accumulate=1, model=tiny.UNET):
  """The scalars of a student's second update, and where the teacher stands."""
  setup = students.Setup(model)
  tx = finetune.optimizer(students.settings_of())
  step = finetune.make_step(
      setup.student, tiny.PLAN, np.array(students.GAMMA), tx,
      jax.random.key(4), accumulate=accumulate, how_remat=how)
  state = setup.start()
  for _ in range(2):
    state, scalars = step(state)
  return jax.device_get(scalars), np.asarray(state.position.x)


@pytest.mark.long
@pytest.mark.parametrize('options', [
    {'how': 'products'}, {'how': 'blocks'}, {'accumulate': 2}], ids=str)
def test_fine_tuning_is_the_same(options):
  """With learned ranges, two banks and a router."""
  (found, x), (expected, y) = tuned(**options), tuned()
  for name, value in expected.items():
    # An input next to a rounding boundary may fall to its other side.
    assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-9), name
  np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def equations(jaxpr):
  """All of a program's, those of its inner programs too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(inner)


def count(how, primitive):
  """Equations of a UNet's gradient."""
  def loss(params, x):
    with remat.blocks(how):
      return tiny.UNET.apply({'params': params}, x, tiny.t_of(3)).sum()

  jaxpr = jax.make_jaxpr(jax.grad(loss))(tiny.params(tiny.UNET), tiny.noise(0))
  return sum(eqn.primitive.name == primitive for eqn in equations(jaxpr.jaxpr))


def test_what_runs_twice():
  """Products run again only where blocks are kept by their inputs alone."""
  plain, products, blocks = (
      count(how, 'conv_general_dilated') for how in remat.WAYS)
  assert plain == products < blocks
  plain, products, blocks = (count(how, 'logistic') for how in remat.WAYS)
  assert plain < products == blocks  # of SiLU


def test_a_model_without_blocks_is_refused():
  class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2)(x)

  with pytest.raises(ValueError, match='the model has no blocks; give the '
                     'class of its blocks `is_block = True`'):
    with remat.blocks('products'):
      Flat().init(jax.random.key(0), jnp.ones((1, 2)))


class Twice(nn.Module):
  """A block that holds another, called with what is no array."""

  is_block = True
  depth: int = 1

  @nn.compact
  def __call__(self, x, scale, *, train=False):
    if self.depth:
      x = Twice(self.depth - 1, name='inner')(x, scale, train=train)
    x = nn.Dropout(0.5, deterministic=not train)(jnp.sin(nn.Dense(4)(x)))
    return x * scale


def test_only_the_outer_block_of_two_runs_twice():
  """With its own dropout, and a number in place of an array."""
  model = Twice()
  params = model.init(jax.random.key(0), jnp.ones((2, 4)), 2.0)

  def loss(params, how):
    with remat.blocks(how):
      return model.apply(params, jnp.ones((2, 4)), 2.0, train=True,
                         rngs={'dropout': jax.random.key(1)}).sum()

  jaxpr = jax.make_jaxpr(lambda p: jax.grad(loss)(p, 'blocks'))(params)
  again = [eqn for eqn in equations(jaxpr.jaxpr)
           if eqn.primitive.name in ('remat2', 'checkpoint')]
  assert len(again) == 1  # on the way back
  jax.tree.map(np.testing.assert_array_equal,
               jax.grad(loss)(params, 'blocks'), jax.grad(loss)(params, 'none'))
