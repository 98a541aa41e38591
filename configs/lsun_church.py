"""LSUN churches 256 x 256: latent diffusion LDM-8 of CompVis, W4A4.

  python train.py --config=configs/lsun_church.py --workdir=runs/church \
      --config.pretrained=lsun_churches256/model.ckpt \
      --config.first_stage=lsun_churches256/model.ckpt \
      --config.data.path=FOLDER
  python eval.py --config=configs/lsun_church.py --workdir=runs/church ...

Protocol: DDIM in CompVis' convention, "400 steps", which its uniform spacing
makes 500 (1000 is no multiple of 400), eta 0, no guidance; 50,000 images;
latents 4 x 32 x 32 decoded by the full-precision KL first stage, scaled by the
checkpoint's scale_factor. The UNet has 294,966,916 parameters. `:smoke` runs
the whole path in under a minute on a random model of the same family.

Not measured by us yet: fine-tuning settings as in configs/cifar10.py, 32
trajectories of 500 steps.
"""

from configs import common
from configs import lsun_bedroom

VARIANTS = {
    'smoke': lsun_bedroom.VARIANTS['smoke'] | {
        'model.in_channels': 4, 'model.out_channels': 4,
        'model.head_channels': None, 'model.num_heads': 2,
        'autoencoder.codebook_size': 0},
}


def get_config(variant: str = ''):
  config = lsun_bedroom.get_config()
  config.model.update(
      image_size=32, in_channels=4, out_channels=4, ch=192,
      ch_mult=(1, 2, 2, 4, 4), attn_resolutions=(32, 16, 8, 4),
      head_channels=None, num_heads=8, resample='resblock',
      time_injection='scale_shift')
  config.autoencoder.update(common.KL)
  config.schedule.beta_end = 0.0155
  config.sampler.update(num_steps=400, eta=0.0)
  return common.apply_variant(config, variant, VARIANTS)
