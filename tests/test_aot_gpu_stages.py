"""What benchmarks.gpu runs beside products, compiled for an H200 without one.

Smaller models of the same parts: widths that the kernels take, attention, both
ends, up and down. Needs JAX's plugin for CUDA and nvcc; run by `make aot`, the
step without quantization by `make test-long`.
"""

import dataclasses

import hopper_target
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import packed_models
from benchmarks.gpu import sampling
from benchmarks.gpu import state as state_lib
from benchmarks.gpu import tuning
from configs import cifar10
from msfp_jax.diffusion import origin
from msfp_jax.models.unet import UNetConfig
from msfp_jax.tune import finetune
from msfp_jax.tune import pretrain

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('uncached')]
CONFIG = UNetConfig(image_size=16, ch=64, ch_mult=(1, 2), num_res_blocks=0,
                    attn_resolutions=(8,), dropout=0.0)
# Float32 without TF32 is the same program with other products.
WAYS = ('packed', 'bfloat16', 'float32, TF32', 'simulated')


@pytest.fixture(scope='module')
def hopper_device():
  """Returns a sharding onto an H200 that is not there."""
  return hopper_target.sharding()


@pytest.fixture(scope='module')
def subject():
  """Calibrated on the CPU, and then packed as a GPU does."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packed_models, 'CONFIG', CONFIG)
    made = packed_models.make(num_steps=2)
    patch.setattr(jax, 'default_backend', lambda: 'gpu')
    return dataclasses.replace(made, packed=made.simulated.packed())


@pytest.fixture
def build(hopper_device, monkeypatch):
  """Compiles function(*arguments) for the device; returns what XLA made."""
  shape = lambda a: jax.ShapeDtypeStruct(
      np.shape(a), a.dtype, sharding=hopper_device)

  def compile_(function, *arguments):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    return jax.jit(function).trace(*jax.tree.map(shape, arguments)).lower(
        lowering_platforms=('cuda',)).compile().as_text()

  return compile_


@pytest.mark.parametrize('name', WAYS)
def test_sampling(build, subject, name):
  """Packed layers are the kernels', and nobody else's are."""
  way = sampling.ways(subject)[name]
  noise = jnp.zeros((2, 16, 16, 3))
  with jax.default_matmul_precision(way.precision):
    text = build(way.function, way.arrays, noise)
  assert ('mosaic_gpu' in text) == (name == 'packed')


@pytest.mark.parametrize('quantized', [
    True, pytest.param(False, marks=pytest.mark.long)])
def test_a_fine_tuning_step(build, subject, quantized):
  settings = finetune.FinetuneSettings(
      **cifar10.get_config('smoke').finetune)
  spec = subject.spec if quantized else tuning.without_quantization(subject)
  step = tuning.Step(subject, spec, settings)
  assert build(step.update, step.state)


def test_an_update_of_the_teacher(build):
  """As `configs/cifar10.py:ten` has it, in bfloat16, with fewer blocks."""
  config = cifar10.get_config('ten')
  config.model.update(ch_mult=(1, 2))
  settings = pretrain.PretrainSettings(**config.pretrain)
  assert settings.dtype == 'bfloat16'
  model = state_lib.model_of(config)
  update = pretrain.make_update(
      model, origin.choose(
          origin.Origin(), config.schedule, config.sampler).schedule,
      pretrain.optimizer(settings), settings.ema_decay, jax.random.key(0),
      flip=settings.flip, dtype=settings.dtype)
  state = jax.eval_shape(lambda: state_lib.begin(model, config))
  images = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.uint8)
  text = build(lambda state, x: update(state, lambda key: x), state, images)
  assert 'bf16' in text
