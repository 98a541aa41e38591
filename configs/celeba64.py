"""CelebA 64 x 64 in pixels: the DDPM of ermongroup/ddim, W4A4.

  python train.py --config=configs/celeba64.py --workdir=runs/celeba64 \
      --config.pretrained=ckpt.pth --config.data.path=img_align_celeba
  python eval.py --config=configs/celeba64.py --workdir=runs/celeba64 ...

Protocol: DDIM, 100 steps, spacing "quad", eta 0; 50,000 images. We know of no
published protocol for this set's spacing: "quad" is CIFAR-10's. `ckpt.pth` is
the file that ermongroup/ddim's README links, whose last element is the moving
average; 78,700,803 parameters. `:smoke` runs the whole path in under a minute
on a random model of the same family.

Not measured by us yet: fine-tuning settings as in configs/cifar10.py.
"""

from configs import cifar10
from configs import common

VARIANTS = {'smoke': cifar10.VARIANTS['smoke']}


def get_config(variant: str = ''):
  config = cifar10.get_config()
  config.pretrained = 'ckpt.pth'
  config.model.update(image_size=64, ch_mult=(1, 2, 2, 2, 4))
  config.data.name = 'celeba'
  return common.apply_variant(config, variant, VARIANTS)
