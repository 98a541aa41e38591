"""A person's own images: trains a teacher on them, then quantizes it.

  python train.py --config=configs/images.py --workdir=runs/mine \
      --config.data.path=PATH
  python eval.py --config=configs/images.py --workdir=runs/mine \
      --config.data.path=PATH

PATH is a folder of images of one size, or an .npz of uint8 `[N, H, W]` or
`[N, H, W, C]`. Sides must be multiples of 4, the UNet's two down-samplings
(other sides: the error names those that fit). The Frechet distance is on
random convolutional features, `fd_random`, and compares with itself alone.
"""

from configs import common

VARIANTS = {
    # A minute or two, on any data: does everything run?
    'smoke': {
        'pretrain.num_steps': 20, 'pretrain.warmup': 5,
        'pretrain.batch_size': 8,
        'pretrain.save_every': 10, 'pretrain.sample_every': 20,
        'model.ch': 8, 'model.ch_mult': (1, 2), 'model.norm_groups': 4,
        'model.attn_resolutions': (), 'sampler.num_steps': 4,
        'calibrate.batch_size': 8, 'calibrate.num_batches': 1,
        'calibrate.samples_per_layer': 2048, 'finetune.num_updates': 8,
        'finetune.rank': 4, 'finetune.batch_size': 4,
        'finetune.save_every': 4, 'finetune.log_every': 1,
        'eval.num_samples': 160, 'eval.batch_size': 64,
        'eval.rows': ('fp', 'msfp', 'tuned'),
    },
}


def get_config(variant: str = ''):
  config = common.get_config()
  config.data.name = 'images'
  # Sizes and channels of 0 are taken from the images.
  config.model.update(
      image_size=0, in_channels=0, out_channels=0, ch=32, ch_mult=(1, 2, 4),
      num_res_blocks=1, attn_resolutions=(), norm_groups=8, dropout=0.1)
  config.pretrain.num_steps = 20_000
  config.eval.features = 'random'
  return common.apply_variant(config, variant, VARIANTS)
