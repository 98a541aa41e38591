"""LSUN bedrooms 256 x 256: latent diffusion LDM-4 of CompVis, W4A4.

  python train.py --config=configs/lsun_bedroom.py --workdir=runs/bedroom \
      --config.pretrained=lsun_beds256/model.ckpt \
      --config.first_stage=lsun_beds256/model.ckpt --config.data.path=FOLDER
  python eval.py --config=configs/lsun_bedroom.py --workdir=runs/bedroom ...

Protocol: DDIM in CompVis' convention, 200 uniform steps, eta 1.0, no guidance;
50,000 images; latents 3 x 64 x 64 decoded by the full-precision VQ first stage,
which the checkpoint holds. FOLDER has the data's images at 256 x 256. The UNet
has 274,056,163 parameters. `:smoke` runs the whole path in under a minute on a
random model of the same family.

Not measured by us yet: fine-tuning settings as in configs/cifar10.py, 80
trajectories of 200 steps.
"""

from configs import common

VARIANTS = {
    'smoke': common.SMOKE | {
        'first_stage': 'random', 'model.ch_mult': (1,),
        'model.attn_resolutions': (),
        'model.image_size': 16, 'model.head_channels': 4,
        'autoencoder.ch': 8, 'autoencoder.ch_mult': (1, 2),
        'autoencoder.norm_groups': 4, 'autoencoder.num_res_blocks': 1,
        'autoencoder.codebook_size': 16,
        'data.name': 'synthetic', 'data.path': '3x32x32'},
}


def get_config(variant: str = ''):
  config = common.get_config()
  config.pretrained = 'model.ckpt'
  config.first_stage = 'model.ckpt'
  config.model.update(
      image_size=64, in_channels=3, out_channels=3, ch=224,
      ch_mult=(1, 2, 3, 4), num_res_blocks=2, attn_resolutions=(32, 16, 8),
      head_channels=32, **common.LATENT_UNET)
  config.autoencoder.update(common.VQ)
  config.schedule.update(
      name='scaled_linear', num_train_steps=1000, beta_start=0.0015,
      beta_end=0.0195)
  config.data.name = 'images'
  config.sampler.update(
      name='ddim', num_steps=200, spacing='uniform', eta=1.0,
      convention='compvis', clip=0.0)
  config.finetune.update(num_updates=16_000, batch_size=4)
  config.eval.update(
      num_samples=50_000, batch_size=32, features='inception', vectors=10_000)
  return common.apply_variant(config, variant, VARIANTS)
