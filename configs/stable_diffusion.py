"""Stable Diffusion 1 and 2: a text and its image, with guidance, W4A4.

  python train.py --config=configs/stable_diffusion.py --workdir=runs/sd \
      --config.pretrained=sd15 --config.first_stage=sd15 \
      --config.text_encoder=sd15 --config.prompts=prompts.txt
  python eval.py --config=configs/stable_diffusion.py --workdir=runs/sd ...

sd15 is the published folder of diffusers: unet, vae, tokenizer, text_encoder
and scheduler (docs/checkpoints.md); 2's are read likewise. prompts.txt has a
prompt a line; a .jsonl has negative prompts and seeds as well; an .npz holds
their embeddings, with those of the negative prompts.

Protocol: DDIM of 50 steps on the checkpoint's own schedule and timesteps,
classifier-free guidance of scale 7.5 against each prompt's negative prompt,
which is empty if none is given. What is calibrated and distilled is the guided
prediction, on conditions drawn from the prompts. Image i is made from prompt i
and from that prompt's seed, and all rows are compared with the images of full
precision. `:smoke` runs the whole path in under a minute on a small random
UNet, a random encoder and a random autoencoder.

Not measured by us yet: the published weights were not at hand. Fine-tuning
settings as in configs/cifar10.py.
"""

from configs import common
from configs import flux_schnell

VARIANTS = {
    'smoke': common.SMOKE | {
        'first_stage': 'random', 'text_encoder': 'random',
        'prompts': flux_schnell.PROMPTS, 'model.attn_resolutions': (),
        'model.image_size': 16, 'model.num_heads': 1, 'model.context_dim': 6,
        'autoencoder.ch': 8, 'autoencoder.ch_mult': (1, 2),
        'autoencoder.norm_groups': 4, 'autoencoder.num_res_blocks': 1,
        'schedule.name': 'scaled_linear', 'schedule.beta_start': 0.00085,
        'schedule.beta_end': 0.012, 'eval.num_samples': 16,
        'eval.batch_size': 8, 'eval.vectors': 0,
        'eval.rows': ('fp', 'tuned', 'packed')},
}


def get_config(variant: str = ''):
  config = common.get_config()
  config.pretrained = config.first_stage = config.text_encoder = 'sd15'
  config.prompts = 'prompts.txt'
  config.data.name = ''
  config.guidance.scale = 7.5
  config.model.update(
      image_size=64, in_channels=4, out_channels=4, ch=320,
      ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=(64, 32, 16),
      num_heads=8, context_dim=768, **common.LATENT_UNET)
  config.autoencoder.update(common.KL)
  config.sampler.update(name='ddim', num_steps=50)
  config.calibrate.update(batch_size=4, num_batches=16)
  config.finetune.update(num_updates=16_000, batch_size=2)
  config.eval.update(num_samples=1000, batch_size=8, features='inception')
  return common.apply_variant(config, variant, VARIANTS)
