"""CIFAR-10 in pixels: the DDPM of ermongroup/ddim, W4A4.

  python train.py --config=configs/cifar10.py --workdir=runs/cifar10 \
      --config.pretrained=ema_cifar10 --config.data.path=cifar-10-batches-bin
  python eval.py --config=configs/cifar10.py --workdir=runs/cifar10 ...

Protocol, as of the relatives in docs/method.md: DDIM, 100 steps, spacing
"quad", eta 0; 50,000 images, FID to the training images. `ema_cifar10` is
ermongroup/ddim's file, or a folder of google/ddpm-cifar10-32; 35,746,307
parameters. `:smoke` runs the whole path in under a minute on a random model of
the same family.

Not measured by us yet: fine-tuning settings are those of the digits, with
EfficientDM's length (160 trajectories of 100 steps).
"""

from configs import common

VARIANTS = {
    'smoke': common.SMOKE | {
        'model.attn_resolutions': (), 'model.image_size': 16,
        'data.name': 'synthetic', 'data.path': '3x16x16'},
}


def get_config(variant: str = ''):
  config = common.get_config()
  config.pretrained = 'ema_cifar10'
  config.model.update(
      image_size=32, in_channels=3, out_channels=3, ch=128,
      ch_mult=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,),
      norm_groups=32, dropout=0.1)
  config.data.name = 'cifar10'
  config.sampler.update(num_steps=100, spacing='quad')
  config.finetune.num_updates = 16_000
  config.eval.update(num_samples=50_000, features='inception', vectors=10_000)
  return common.apply_variant(config, variant, VARIANTS)
