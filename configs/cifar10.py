"""CIFAR-10 in pixels: the DDPM of ermongroup/ddim, W4A4.

  python train.py --config=configs/cifar10.py --workdir=runs/cifar10 \
      --config.pretrained=ema_cifar10 --config.data.path=cifar-10-batches-bin
  python eval.py --config=configs/cifar10.py --workdir=runs/cifar10 ...

Protocol, as of the relatives in docs/method.md: DDIM, 100 steps, spacing
"quad", eta 0; 50,000 images, FID to the training images. `ema_cifar10` is
ermongroup/ddim's file, or a folder of google/ddpm-cifar10-32; 35,746,307
parameters. `:smoke` runs the whole path in under a minute on a random model of
the same family.

Without a checkpoint, `:small` trains a teacher of 2.7 million parameters, for
which two CPU cores are enough, and `:ten` one of 9.5 million, in bfloat16, for
accelerators:

  python train.py --config=configs/cifar10.py:small --workdir=runs/small \
      --config.data.path=cifar-10-batches-bin

XLA_FLAGS=--xla_force_host_platform_device_count=2 gives each of two cores half
of a batch: 76 images a second in place of 57 (AMD EPYC; the command's own
lines). With --config.stage=quantize the same command goes on to quantize it.
Both words evaluate on the features of a ResNet-56 for CIFAR-10, against
statistics of its 50,000 training images; both ship with the package.

What came of `:small` ships too, as `cifar10_small`
(msfp_jax/assets/README.md). What each ingredient brings on it is a study, with
20 steps, a tenth of the updates and 2,048 images, for which a CPU has time
(`ablation_100` has all); it needs no data. `past` goes on from there:

  python -m msfp_jax.run.study --config=configs/cifar10.py:ablation \
      --workdir=runs/cifar10-ablation

--more_features=squeezenet:FILE --more_references=cifar10 measures distances on
a second network (docs/evaluation.md), of the weights of its authors.

Measured so far, with 20 steps: the most important rows on two or three seeds,
others on one (docs/results_cifar10.md).
Settings of fine-tuning are those of the digits, and EfficientDM's length (160
trajectories of 100 steps) is not measured by us yet.
"""

from typing import Any

from configs import common

_DISTANCE = {
    'eval.features': 'resnet56', 'eval.reference': 'cifar10',
    'eval.vectors': 0}  # those statistics hold none
_TEACHER = {
    'stage': 'pretrain', 'pretrained': '', 'model.num_res_blocks': 1,
    'pretrain.flip': True, **_DISTANCE}
VARIANTS = common.ABLATION | {
    'small': _TEACHER | {  # in float32: bfloat16 is no faster on CPUs
        'model.ch': 32, 'model.ch_mult': (1, 2, 4),
        'model.attn_resolutions': (8,), 'model.norm_groups': 8,
        'model.dropout': 0.0, 'pretrain.num_steps': 8000,
        'pretrain.learning_rate': 8e-4, 'pretrain.warmup': 500,
        'pretrain.batch_size': 64, 'pretrain.ema_decay': 0.999,
        'pretrain.save_every': 100, 'pretrain.log_every': 20,
        'pretrain.sample_every': 2000, 'eval.num_samples': 10_000},
    'ten': _TEACHER | {
        'model.ch': 80, 'model.ch_mult': (1, 2, 2, 2),
        'model.norm_groups': 16, 'pretrain.num_steps': 200_000,
        'pretrain.learning_rate': 3e-4, 'pretrain.warmup': 2000,
        'pretrain.batch_size': 128, 'pretrain.ema_decay': 0.9999,
        'pretrain.dtype': 'bfloat16', 'pretrain.save_every': 2000,
        'pretrain.sample_every': 10_000},
    # The teacher that the command above has trained; it needs no data.
    'trained': {'stage': 'quantize', 'data.name': '',
                'pretrained': 'cifar10_small', **_DISTANCE},
    '20': {'sampler.num_steps': 20, 'finetune.num_updates': 1600,
           'eval.num_samples': 2048},
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
  config.sampler.update(
      name='ddim', num_steps=100, spacing='quad', convention='ddim', clip=0.0)
  config.finetune.num_updates = 16_000
  config.eval.update(num_samples=50_000, features='inception', vectors=10_000)
  return common.apply_variant(config, variant, VARIANTS)


# Rows of the ablation, in the order of the paper's.
_ROWS = {
    'INT asymmetric': 'int,untuned',
    'signed FP': 'signed,untuned',
    'MSFP': 'msfp,untuned',
    'MSFP by step': 'recipe=msfp+by_step,untuned',
    'MSFP (corrected)': 'msfp,untuned,corrected',
    'INT asymmetric + LoRA': 'int,lora',
    'signed FP + LoRA': 'signed,lora',
    'MSFP + LoRA': 'msfp,lora',
    'MSFP by step + LoRA': 'recipe=msfp+by_step,lora',
    'MSFP + TALoRA': 'msfp,talora',
    'MSFP + TALoRA (h = 4)': 'msfp,talora=4',
    'MSFP + LoRA + DFA': 'msfp,lora,dfa',
    'MSFP + LoRA + DFA (corrected)': 'msfp,lora,dfa,corrected',
    'MSFP by step + LoRA + DFA': 'recipe=msfp+by_step,lora,dfa',
    'MSFP + TALoRA + DFA': 'msfp,talora,dfa',
    'MSFP + TALoRA + DFA (corrected)': 'msfp,talora,dfa,corrected',
    'MSFP + TALoRA + DFA (ddpm)': 'msfp,talora,dfa=ddpm',
    'MSFP + TALoRA + DFA (ddpm_respaced)': 'msfp,talora,dfa=ddpm_respaced',
    'MSFP + LoRA + DFA + steered': 'msfp,lora,dfa,steer',
    'MSFP + TALoRA + DFA + steered': 'msfp,talora,dfa,steer',
}
# Untuned and tuned with one LoRA and DFA: weights, then inputs, then both.
_DIFFERENCES = 'int4_minmax_image+gptq+differences'
_PAST = (
    'mixup_weights', 'msfp+smooth', 'msfp+weighted', 'msfp+gptq',
    'mixup_weights+gptq', 'msfp+gptq+by_step', 'msfp_image+gptq',
    'msfp_group+gptq', 'msfp_hadamard+gptq', 'nvfp4+gptq',
    'int4_minmax+gptq', 'int4_minmax_16+gptq', 'int4_minmax_image+gptq',
    _DIFFERENCES, 'msfp_image+gptq+differences')
_PAST_TUNED = ('mixup_weights+gptq', 'msfp+gptq+by_step', 'nvfp4+gptq',
               'int4_minmax_16+gptq', _DIFFERENCES)
_PAST_ROWS = {
    **{name: f'recipe={name},untuned' for name in _PAST},
    **{f'{name} (corrected)': f'recipe={name},untuned,corrected'
       for name in ('int4_minmax_image+gptq', _DIFFERENCES)},
    **{f'{name} + LoRA + DFA': f'recipe={name},lora,dfa'
       for name in _PAST_TUNED},
    f'{_DIFFERENCES} + LoRA + DFA (corrected)':
        f'recipe={_DIFFERENCES},lora,dfa,corrected',
    **{f'{_DIFFERENCES} + LoRA + DFA + {label}':
       f'recipe={_DIFFERENCES},lora,dfa,{word}'
       for label, word in (
           ('student', 'student'), ('steered', 'steer'),
           ('windows', 'window=4'), ('direction', 'direction'),
           ('offsets', 'rank=0'))},
}
VARIANTS |= {f'recipe={name}': {'quant.recipe': name}
             for name in (*_PAST, 'msfp+by_step')}


def _study(rows: dict[str, str], words: str) -> dict[str, Any]:
  return {
      'seeds': (0, 1, 2),
      'metrics': (
          'bits_per_weight', 'bits_per_act', 'bytes', 'bytes_kept',
          'fd_resnet56', 'fd_resnet56_to_fp', 'fd_squeezenet_caffe',
          'fd_squeezenet_caffe_to_fp', 'psnr_to_fp', 'ssim_to_fp',
          'label_agreement'),
      'base': f'small,trained{words}',
      'groups': {bits: {label: f'small,trained{words},{bits},{row}'
                        for label, row in rows.items()}
                 for bits in ('w4a4', 'w6a6')},
  }


# python -m msfp_jax.run.study --config=configs/cifar10.py:STUDY
STUDIES = {
    'ablation': _study(_ROWS, ',20'), 'ablation_100': _study(_ROWS, ''),
    'past': _study(_PAST_ROWS, ',20'), 'past_100': _study(_PAST_ROWS, ''),
}
