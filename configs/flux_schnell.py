"""FLUX.1-schnell: a text and its image in 4 steps, W4A4.

  python train.py --config=configs/flux_schnell.py --workdir=runs/schnell \
      --config.pretrained=FLUX.1-schnell --config.first_stage=FLUX.1-schnell \
      --config.text_encoder=FLUX.1-schnell --config.prompts=prompts.txt
  python eval.py --config=configs/flux_schnell.py --workdir=runs/schnell ...

FLUX.1-schnell is the published folder of diffusers: transformer, vae,
tokenizer, text_encoder, tokenizer_2, text_encoder_2 and scheduler
(docs/checkpoints.md). prompts.txt has a prompt a line, or is an .npz of their
embeddings, made once by `text.save_embeddings`: then no encoder is loaded.

Protocol: Euler steps of flow matching at sigma 1, 3/4, 1/2, 1/4, no guidance
(schnell takes none), texts of 256 tokens, 1024 x 1024 pixels, decoded in bands
of 256 rows. Calibration draws its conditions from the prompts; image i is made
from prompt i and from that prompt's seed, and all rows are compared with the
images of full precision. Other sizes: --config.image_size=(512,768). Words
`quartz`, `svdquant`, `nvfp4` and `msfp` choose the recipe, data-free nvfp4
being the quickest. `:dev` is FLUX.1-dev, from the folder of that name: 50
steps, its own shift, guidance of 3.5, texts of 512 tokens. `:smoke` runs the
whole path in under a minute on a small random transformer, random encoders and
a random autoencoder.

Not measured by us yet: the published weights were not at hand. No fine-tuning.
"""

import pathlib

from configs import common

PROMPTS = str(pathlib.Path(__file__).with_name('prompts.txt'))
# Tiny random parts.
SMOKE = common.SMOKE | {
    'first_stage': 'random', 'first_stage_rows': 0, 'text_encoder': 'random',
    'prompts': PROMPTS, 'text_length': 64, 'image_size': (),
    'autoencoder.ch': 8, 'autoencoder.ch_mult': (1, 2),
    'autoencoder.norm_groups': 4, 'autoencoder.num_res_blocks': 1,
    'eval.num_samples': 16, 'eval.batch_size': 8, 'eval.vectors': 0,
    'eval.rows': ('fp', 'tuned', 'packed')}

VARIANTS = {
    'smoke': {name: value for name, value in SMOKE.items()
              if not name.startswith('model.')} | {
        'model.image_size': 8, 'model.in_channels': 4, 'model.out_channels': 4,
        'model.num_layers': 1, 'model.num_single_layers': 1,
        'model.num_heads': 2, 'model.head_dim': 8, 'model.axes_dims': (4, 2, 2),
        'model.text_dim': 12, 'model.pooled_dim': 6,
        'image_size': (16, 32), 'autoencoder.z_channels': 4,
        'autoencoder.embed_dim': 4},
    **{recipe: {'quant.recipe': recipe}
       for recipe in ('quartz', 'svdquant', 'nvfp4', 'msfp')},
    # Its model card's protocol; its scheduler's file has the shift.
    'dev': {
        **dict.fromkeys(('pretrained', 'first_stage', 'text_encoder'),
                        'FLUX.1-dev'),
        'text_length': 512, 'guidance.scale': 3.5,
        'model.guidance_embeds': True,
        'sampler.num_steps': 50},
}


def get_config(variant: str = ''):
  config = common.get_config()
  config.pretrained = 'FLUX.1-schnell'
  config.first_stage = 'FLUX.1-schnell'
  config.first_stage_rows = 256
  config.text_encoder = 'FLUX.1-schnell'
  config.text_length = 256
  config.prompts = 'prompts.txt'
  config.data.name = ''
  config.image_size = (1024, 1024)
  config.model.update(
      family='flux', image_size=128, in_channels=16, out_channels=16,
      num_layers=19, num_single_layers=38, num_heads=24, head_dim=128,
      axes_dims=(16, 56, 56), text_dim=4096, pooled_dim=768)
  config.autoencoder.update(common.KL | {
      'z_channels': 16, 'embed_dim': 16, 'quant_conv': False})
  config.schedule.name = 'flow'
  config.schedule.num_train_steps = 1
  config.sampler.update(name='flow', num_steps=4)
  config.calibrate.update(batch_size=1, num_batches=16)
  config.quant.recipe = 'quartz'
  config.finetune.num_updates = 0
  config.eval.update(
      rows=('fp', 'quartz', 'svdquant', 'nvfp4', 'msfp'), num_samples=64,
      batch_size=1, features='inception', layer_images=0)
  return common.apply_variant(config, variant, VARIANTS)
