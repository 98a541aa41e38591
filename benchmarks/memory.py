"""What a training step needs of a chip's memory, by the ways to compute it.

  python -m benchmarks.memory v5e

No TPU is needed, only libtpu, whose compiler says what its programs need. The
model is a UNet of one level, of 64 channels with two residual blocks down and
three up, for images of 32 x 32; the batch is of 64. Each compilation takes a
minute or more.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tpu_cost
from configs import common
import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.models import unet
from msfp_jax.run import cli
from msfp_jax.tune import finetune
from msfp_jax.tune import losses
from msfp_jax.tune import memory
from msfp_jax.tune import pretrain

MODEL = unet.UNet(unet.UNetConfig(
    image_size=32, in_channels=3, out_channels=3, ch=64, ch_mult=(1,),
    num_res_blocks=2, attn_resolutions=(), norm_groups=8, dropout=0.0))
BATCH = 64
WAYS = {
    'as it is': {}, 'remat=products': {'remat': 'products'},
    'remat=blocks': {'remat': 'blocks'}, 'accumulate=4': {'accumulate': 4},
    'remat=blocks accumulate=4': {'remat': 'blocks', 'accumulate': 4},
    'dtype=bfloat16': {'dtype': 'bfloat16'}}
SCHEDULE = diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
KEY = jax.random.key(0)


def pretraining(ways):
  """The update and what it takes, abstract."""
  settings = pretrain.PretrainSettings(
      **dict(common.get_config().pretrain) | {'batch_size': BATCH} | ways)
  tx = pretrain.optimizer(settings)
  update = pretrain.make_update(
      MODEL, SCHEDULE, tx, settings.ema_decay, KEY, dtype=settings.dtype,
      accumulate=settings.accumulate, how_remat=settings.remat)
  images = jax.ShapeDtypeStruct((BATCH, *MODEL.sample_shape), jnp.uint8)
  return (jax.jit(lambda state, images: update(state, lambda key: images),
                  donate_argnums=0),
          (jax.eval_shape(lambda: pretrain.init_state(MODEL, tx, KEY)), images))


def tuning(params, spec, plan, ways):
  """Likewise, of fine-tuning by the usual settings."""
  settings = finetune.FinetuneSettings(
      **dict(common.get_config().finetune) | {'batch_size': BATCH} | ways)
  student = finetune.make_student(
      MODEL, params, spec, SCHEDULE.num_train_steps, settings)
  tx = finetune.optimizer(settings)
  step = finetune.make_step(
      student, plan, losses.denoising_factors(SCHEDULE, plan, 'sampler'), tx,
      KEY, accumulate=settings.accumulate, how_remat=settings.remat)
  state = jax.eval_shape(lambda: finetune.init_state(
      student, tx, plan, MODEL.sample_shape, KEY, settings))
  return step.update, (state, *step.shapes)


def need(sharding, update, shapes):
  """What the chip's compiler says."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      np.shape(x), x.dtype, sharding=sharding), shapes)
  return memory.need_of(update.trace(*shapes).lower(
      lowering_platforms=('tpu',)).compile())


def main(argv: list[str]):
  """Prints a table."""
  chip = (argv[1:] or ['v5e'])[0]
  if chip not in tpu_cost.TOPOLOGIES:
    sys.exit(f'error: {chip!r}: must be one of {sorted(tpu_cost.TOPOLOGIES)}')
  os.environ |= tpu_cost.LIBTPU_ENVIRONMENT
  sharding = tpu_cost.sharding(chip)
  plan = diffusion.ddim_plan(SCHEDULE, 20)
  params = jax.jit(MODEL.init)(
      KEY, jnp.zeros((1, *MODEL.sample_shape)), jnp.zeros((1,)))['params']
  spec = msfp.calibrate(MODEL, params, plan=plan, recipe='msfp', batches=[
      jax.random.normal(KEY, (4, *MODEL.sample_shape))])
  kinds = {'pre-training': pretraining, 'fine-tuning': lambda ways: tuning(
      params, spec, plan, ways)}
  print(f'| GB of a {chip} | kept | beside it while a step runs |\n'
        '|---|---|---|')
  for kind, make in kinds.items():
    for name, ways in WAYS.items():
      found = need(sharding, *make(ways))
      print(f'| {kind}, {name} | {found.kept / 1e9:.3f} | '
            f'{found.temporary / 1e9:.3f} |', flush=True)


if __name__ == '__main__':
  cli.run(main)
