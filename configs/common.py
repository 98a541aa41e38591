"""The fields of every experiment, their defaults and their meanings."""

import re
from typing import Any

import ml_collections

from msfp_jax.quant import recipes
from msfp_jax.quant import roles

# What the UNets of latent diffusion share.
LATENT_UNET = {
    'norm_groups': 32, 'norm_eps': 1e-5, 'dropout': 0.0,
    'downsample_padding': (1, 1), 'time_order': 'cos_sin',
    'time_freq_shift': 0}
# First stages, of runs that have no checkpoint (`first_stage` 'random').
VQ = {'kind': 'vq', 'ch': 128, 'ch_mult': (1, 2, 4), 'z_channels': 3,
      'embed_dim': 3, 'codebook_size': 8192}
KL = {'kind': 'kl', 'ch': 128, 'ch_mult': (1, 2, 4, 4), 'z_channels': 4,
      'embed_dim': 4, 'codebook_size': 0}
# Under a minute on 2 cores, on random models: does everything run?
SMOKE = {
    'pretrained': 'random', 'model.ch': 8, 'model.ch_mult': (1, 1),
    'model.norm_groups': 4, 'model.num_res_blocks': 0,
    'sampler.num_steps': 4, 'calibrate.batch_size': 4,
    'calibrate.num_batches': 1, 'calibrate.samples_per_layer': 2048,
    'finetune.num_updates': 8, 'finetune.rank': 2, 'finetune.batch_size': 2,
    'finetune.save_every': 8, 'finetune.log_every': 1,
    'eval.num_samples': 160, 'eval.batch_size': 80,
    'eval.rows': ('fp', 'tuned'), 'eval.features': 'random',
    'eval.reference': '',
    'eval.vectors': 100, 'eval.report': False}

# Words of the ablation, of experiments that have one.
ABLATION = {
    # Recipes; alone they change what is fine-tuned.
    'msfp': {'quant.recipe': 'msfp'},
    'signed': {'quant.recipe': 'signed_fp'},
    'int': {'quant.recipe': 'int'},
    # The drift of predictions is subtracted, tuned or not.
    'corrected': {'quant.drift_images': 64},
    # Ingredients of the fine-tuning.
    'untuned': {'finetune.num_updates': 0,
                'eval.rows': ('fp', 'int', 'signed_fp', 'msfp')},
    'lora': {'finetune.num_banks': 1, 'finetune.gamma': 'none'},
    'talora': {'finetune.num_banks': 2, 'finetune.gamma': 'none'},
    'talora=4': {'finetune.num_banks': 4, 'finetune.gamma': 'none'},
    'dfa': {'finetune.gamma': 'sampler'},
    'dfa=ddpm': {'finetune.gamma': 'ddpm'},
    'dfa=ddpm_respaced': {'finetune.gamma': 'ddpm_respaced'},
    # Along the student's own trajectories; and led back to the teacher's.
    'student': {'finetune.driver': 'student', 'finetune.steer': 0.0},
    'steer': {'finetune.driver': 'student', 'finetune.steer': 0.3},
    'window=4': {'finetune.driver': 'student', 'finetune.window_steps': 4},
    # What else the loss sees, and offsets of single weights in place of a LoRA.
    'direction': {'finetune.direction': 1.0},
    'rank=0': {'finetune.rank': 0, 'finetune.learning_rate': 1e-4},
}


def get_config() -> ml_collections.ConfigDict:
  """Makes the fields of every experiment; configs/*.py fill in theirs."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  # Full-precision checkpoint to start from: a file, a folder, or the name of a
  # shipped one, or hf:OWNER/NAME of the Hugging Face Hub (docs/checkpoints.md).
  # Empty: train one first, in the workdir. 'random': the untrained model of
  # config.model, to try whether everything runs.
  config.pretrained = ''
  # Of checkpoints that do not tell their own configuration: a CompVis yaml.
  config.pretrained_config = ''
  # Take the moving average where the checkpoint has one. None: so it is, unless
  # its yaml says otherwise.
  config.ema = ml_collections.config_dict.placeholder(bool)
  # LoRAs that are merged into it before anything else: ((file, strength), ...)
  config.loras = ()
  # Latent diffusion: checkpoint of the first stage, which decodes.
  config.first_stage = ''
  config.first_stage_config = ''  # as pretrained_config, of the first stage
  # Its latents are (z - shift) * scale. None: as its checkpoint says.
  config.first_stage_scale = ml_collections.config_dict.placeholder(float)
  config.first_stage_shift = ml_collections.config_dict.placeholder(float)
  # Decode images one by one, so many rows at a time: large ones in less memory,
  # the same but for rounding (msfp_jax/models/decode_rows.py). 0: all at once.
  config.first_stage_rows = 0
  # Of a random first stage.
  config.autoencoder = ml_collections.ConfigDict(
      {'num_res_blocks': 2, 'norm_groups': 32})
  # Of transformers: height and width of images in pixels, multiples of 16.
  # (): as the model says.
  config.image_size = ()
  # Models that take a text: a .txt with a prompt a line, a .jsonl of prompt,
  # seed and negative_prompt, or an .npz of embeddings (docs/usage.md).
  config.prompts = ''
  # What makes conditions of texts: a pipeline's folder with tokenizer and
  # text_encoder (FLUX: and tokenizer_2 and text_encoder_2), or one of the hub
  # (hf:OWNER/NAME); or 'random'.
  config.text_encoder = ''
  config.text_length = 0  # of FLUX's texts in tokens; 0: as tokenizer_2 says
  # Classifier-free guidance of models of labels, and of a context (against the
  # negative prompt). Models that take its strength, as FLUX.1-dev, are given
  # it.
  config.guidance = ml_collections.ConfigDict({
      'scale': 1.0,
      'null_class': False,  # whether the last class stands for none
  })
  config.stage = 'quantize'  # or 'pretrain': stop after the teacher

  config.data = ml_collections.ConfigDict({
      # A name in msfp_jax/data, DATASETS. Empty: none; then evaluation needs
      # eval.reference, or prompts, of which images are compared with full
      # precision's alone; and nothing can be pre-trained.
      'name': 'digits',
      'path': '',  # of its files: a folder, an .npz, ...
  })
  # Of the UNet that pre-training makes, or of a random model; a checkpoint
  # brings its own. `family` names another model than the UNet, see
  # msfp_jax/models/registry.py.
  config.model = ml_collections.ConfigDict()
  # Of these two, '', 0, and -1 of offset and clip, stand for what the
  # checkpoint says, or, where it says nothing, for the values in brackets.
  config.schedule = ml_collections.ConfigDict({
      'name': '',  # [linear], scaled_linear or cosine; or flow, flow matching
      'num_train_steps': 0,  # [1000]; of flow, the t of pure noise
      'beta_start': 0.0,  # [1e-4]
      'beta_end': 0.0,  # [0.02]
  })
  config.sampler = ml_collections.ConfigDict({
      # [ddim], ddpm, plms or dpm_solver; of schedule.name='flow' [flow].
      'name': '',
      'num_steps': 20,
      'spacing': '',  # [uniform], quad, leading, trailing or linspace
      'eta': 0.0,  # of DDIM
      'convention': '',  # [ddim] or compvis, see msfp_jax/diffusion/ddim.py
      'offset': -1,  # added to timesteps [0, with compvis 1]
      'clip': -1.0,  # of x_0 as predicted, at this magnitude [0.0: not]
      'variance': '',  # of DDPM: [small] or large
      # Of flow, see msfp_jax/diffusion/flow.py: how far to noise its levels are
      # shifted [1.0: not]; or this by the size of the image, (0.5, 1.15, 256,
      # 4096) for FLUX.1-dev, exponential or linear, and the size in tokens; and
      # the last level that they are stretched to [0.0: not].
      'shift': 0.0,
      'shift_by_tokens': (),
      'shift_type': '',  # [exponential] or linear
      'image_tokens': 0,
      'shift_terminal': -1.0,
  })
  config.pretrain = ml_collections.ConfigDict({
      'num_steps': 10_000,
      'batch_size': 64,
      'learning_rate': 1e-3,
      'warmup': 500,
      'weight_decay': 0.01,
      'clip_norm': 1.0,
      'ema_decay': 0.999,
      'flip': False,  # every other image mirrored, left for right, at random
      # Of the model's arithmetic, or 'bfloat16', which accelerators prefer;
      # parameters, gradients and optimizer are float32 either way.
      'dtype': 'float32',
      # What makes a step need less memory and more time. Parts of a batch, one
      # after the other; activations computed twice: none, all but what was
      # multiplied (products), or all but the inputs of blocks (blocks).
      'accumulate': 1,
      'remat': 'none',
      # How often each noise level is seen: uniform, or logit_normal, which
      # prefers the middle, with the mean and deviation of its normal number.
      'times': 'uniform',
      'times_mean': 0.0,
      'times_std': 1.0,
      'save_every': 1000,
      'log_every': 50,
      'sample_every': 2000,
  })
  config.calibrate = ml_collections.ConfigDict({
      'batch_size': 64,  # trajectories at once
      'num_batches': 4,
      'samples_per_layer': 65_536,  # activations kept of each layer
  })
  config.mesh = ml_collections.ConfigDict({
      # Devices that share the large weights, and what optimizers keep of them,
      # while the model runs; the others split batches.
      'model': 1,
      # Several processes: 'auto' where JAX finds them by itself (TPU pods;
      # SLURM and Open MPI, with one for each GPU); or HOST:PORT of the first
      # one, and how many there are and which this is.
      'coordinator': '',
      'num_processes': 0,
      'process_id': -1,
      # Gigabytes that a training step may need of each device; 0: what is free
      # there. A step that needs more is refused before the run begins.
      'memory': 0.0,
  })
  config.quant = ml_collections.ConfigDict({
      'recipe': 'msfp',  # see msfp_jax/quant/recipes.py
      'weight_bits': 4,
      'act_bits': 4,
      # Roles with other bits: a name in EXCEPTIONS there.
      'exceptions': 'ends-8',
      # Images by which it is measured how far the quantized model's predictions
      # are off on average, at every step and in every channel, which is then
      # subtracted (msfp_jax/packed/drift.py); all at once. 0: it is not.
      'drift_images': 0,
  })
  config.finetune = ml_collections.ConfigDict({
      'num_updates': 1000,  # 0: calibrate only
      'batch_size': 16,
      'num_banks': 2,  # LoRAs a layer; 1: plain LoRA, no router
      'rank': 16,  # 0: an offset of every weight
      'gamma': 'sampler',  # see msfp_jax/tune/losses.py; 'none': plain MSE
      'direction': 0.0,  # weight of the predictions' angle in the loss
      # Whose predictions move the trajectories that it is trained along:
      # teacher or student; how much the student's are led back to the
      # teacher's, 0.0 to below 1; and after how many steps they begin anew
      # there, 0: never. See msfp_jax/tune/trajectories.py.
      'driver': 'teacher',
      'steer': 0.0,
      'window_steps': 0,
      'base_weight': 'full',  # what banks add to; or 'dequantized'
      'learn_act_ranges': True,  # activation scales and zero points
      'learn_weight_scales': True,
      'learn_biases': False,
      'learning_rate': 1e-3,  # of the banks
      'router_learning_rate': 1e-3,
      'range_learning_rate': 1e-3,  # of ranges, scales and biases
      'router_temperature': 1.0,
      'router_prior': 1.0,  # pull of each span of timesteps to its own bank
      'adam_b2': 0.99,
      'weight_decay': 0.0,
      # Of the moving average of what is trained, which is then kept; 0.0: what
      # the last update leaves is.
      'ema_decay': 0.0,
      'dtype': 'float32',  # of activations and products; or 'bfloat16'
      'accumulate': 1,  # as of pretrain, likewise `remat`
      'remat': 'none',
      'save_every': 500,
      'log_every': 20,
  })
  config.eval = ml_collections.ConfigDict({
      # 'fp', 'tuned', 'packed', recipes, such with bits ('msfp:w6a6'), or
      # 'all' for every recipe there is.
      'rows': ('fp', 'int', 'signed_fp', 'msfp', 'tuned'),
      'num_samples': 2048,
      'batch_size': 256,
      'features': 'digits',  # see msfp_jax/metrics/features.py
      # Other networks, whose distances stand in the same rows; and a reference
      # of each, as below.
      'more_features': (),
      'more_references': (),
      # Of features 'inception': the file of its weights, which is downloaded
      # if empty; and how images are prepared, see metrics/preprocess.py.
      'inception': '',
      'preprocessing': 'tf',
      # Of column lpips_alex_to_fp or lpips_vgg_to_fp: 'alex:PATH' or
      # 'vgg:PATH', torchvision's file of that classifier's weights.
      'lpips': '',
      # Statistics to compare with: an .npz of eval.py --make_stats or of other
      # tools; 'cifar10', those that ship with the package. Empty: those of the
      # data.
      'reference': '',
      # Feature vectors kept of each set, for the kernel distance, precision
      # and recall; 0: without these.
      'vectors': 0,
      # All samples as samples/ROW.npz ('npz') or PNG files ('png'); or not.
      'keep': '',
      'pictures': 16,  # images a row in samples/methods.png
      'report': True,  # write report.html
      # Images by which the error of every layer is measured: columns sqnr_...,
      # and the report's picture of layers by methods; 0: without.
      'layer_images': 0,
      # Images by which it is measured what every layer and every step costs the
      # images in the end, by two runs of the sampler for each: the field
      # `sensitivity` of results.json, and the report's table; 0: without.
      'sensitivity_images': 0,
      # Time the sampling of every row: columns seconds, seconds_packed. No two
      # runs give the same.
      'timing': False,
  })
  return config


def apply_variant(
    config: ml_collections.ConfigDict, variant: str,
    named: dict[str, dict[str, Any]]) -> ml_collections.ConfigDict:
  """Applies a comma-separated variant such as 'w4a4,skip-8,lora'.

  Args:
    config: changed in place.
    variant: each word is bits (w4a4), a list of exceptions (ends-8, skip-8), or
      a key of `named`.
    named: {word: {dotted field: value}}.

  Raises:
    ValueError: a word that is none of these; all are listed.
  """
  for word in filter(None, variant.split(',')):
    if word in named:
      config.update_from_flattened_dict(named[word])
    elif word in roles.EXCEPTIONS or word in roles.FORMER_NAMES:
      config.quant.exceptions = roles.FORMER_NAMES.get(word, word)
    elif re.fullmatch(r'w\d+a\d+', word):
      bits = recipes.parse_bits(word)
      config.quant.weight_bits, config.quant.act_bits = bits
    else:
      raise ValueError(
          f'variant {word!r}: must be bits such as w4a4, one of '
          f'{sorted(roles.EXCEPTIONS)}, or one of {sorted(named)}')
  return config
