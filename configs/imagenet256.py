"""ImageNet 256 x 256 by class: latent diffusion LDM-4 (cin256-v2), W4A4.

  python train.py --config=configs/imagenet256.py --workdir=runs/imagenet \
      --config.pretrained=cin256-v2/model.ckpt \
      --config.first_stage=cin256-v2/model.ckpt --config.data.path=FOLDER
  python eval.py --config=configs/imagenet256.py --workdir=runs/imagenet ...

Protocol: DDIM in CompVis' convention, 20 uniform steps, eta 0, classifier-free
guidance of scale 3.0, labels drawn at random; 50,000 images. As the original
does for this model, the weights are taken, not their moving average. What is
calibrated and distilled is the guided prediction. The UNet has 400,920,579
parameters, its class embedder 512,512. `:smoke` runs the whole path in under
a minute on a random model of the same family.

Not measured by us yet: fine-tuning settings as in configs/cifar10.py.
"""

from configs import common
from configs import lsun_bedroom

VARIANTS = {
    'smoke': lsun_bedroom.VARIANTS['smoke'] | {
        'model.head_channels': None, 'model.num_heads': 1,
        'model.context_dim': 6, 'model.context_classes': 5},
}


def get_config(variant: str = ''):
  config = lsun_bedroom.get_config()
  config.ema = False
  config.model.update(
      ch=192, ch_mult=(1, 2, 3, 5), head_channels=None, num_heads=1,
      context_dim=512, context_classes=1001)
  config.guidance.update(scale=3.0, null_class=True)
  config.sampler.update(num_steps=20, eta=0.0)
  config.finetune.batch_size = 2
  return common.apply_variant(config, variant, VARIANTS)
