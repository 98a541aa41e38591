"""W4A4 diffusion on scikit-learn's digits: the embedded default.

  python train.py --config=configs/digits.py:w4a4 --workdir=runs/w4a4
  python eval.py --config=configs/digits.py:w4a4 --workdir=runs/w4a4

quantizes the shipped UNet `digits16` (649,329 parameters, 16 x 16), fine-tunes
it and compares 2,048 images of each method. Variants are words joined by
commas: bits (w4a4, w6a6), exceptions (ends-8, skip-8), and those below.

`digits16` itself was made by

  python train.py --config=configs/digits.py:pretrain --workdir=runs/pretrain

with seed 0; SHA-256 of its file: see msfp_jax/assets/README.md.
"""

from configs import common
from msfp_jax.quant import recipes

# Word of --config=configs/digits.py:WORD,WORD -> what it changes.
VARIANTS = common.ABLATION | {
    # Train the teacher that the package ships.
    'pretrain': {'stage': 'pretrain', 'pretrained': ''},
    # Every recipe, by everything that is measured; needs no train.py.
    'recipes': {'finetune.num_updates': 0, 'eval.rows': ('fp', 'all'),
                'eval.layer_images': 16, 'eval.timing': True},
    # Minutes on a laptop.
    'demo': {'eval.num_samples': 512, 'finetune.num_updates': 600,
             'quant.exceptions': 'skip-8'},
}


def get_config(variant: str = ''):
  config = common.get_config()
  config.pretrained = 'digits16'
  config.model.update(
      image_size=16, in_channels=1, out_channels=1, ch=16, ch_mult=(1, 2, 4),
      num_res_blocks=1, attn_resolutions=(8,), norm_groups=8, dropout=0.0)
  return common.apply_variant(config, variant, VARIANTS)


# Rows of README's tables, the same under both lists of exceptions.
_ROWS = {
    'INT asymmetric': 'int,untuned',
    'signed FP': 'signed,untuned',
    'MSFP': 'msfp,untuned',
    'MSFP W6A6': 'msfp,w6a6,untuned',
    'signed FP + LoRA': 'signed,lora',
    'MSFP + LoRA': 'msfp,lora',
    'MSFP + TALoRA': 'msfp,talora',
    'MSFP + TALoRA + DFA': 'msfp,talora,dfa',
    'MSFP W6A6 + TALoRA + DFA': 'msfp,w6a6,talora,dfa',
}
# What `recipes` compares: all that are registered, and those whose weights gain
# most by GPTQ.
_RECIPES = (*recipes.RECIPES, 'msfp+gptq', 'msfp_group+gptq',
            'mixup_weights+gptq', 'nvfp4+gptq', 'int4_minmax+gptq',
            'int4_minmax_16+gptq', 'quartz+gptq')
_BEST = ('msfp', 'msfp_group+gptq', 'nvfp4+gptq', 'int4_minmax+gptq')
_OF_INPUTS = ('int4_minmax_image', 'int4_minmax_image+gptq', 'msfp_image+gptq',
              'nvfp4+gptq', 'int4_minmax_16+gptq')
_OF_DIFFERENCES = tuple(f'{name}+differences' for name in _OF_INPUTS)
_DRIVEN = ('msfp', 'msfp_group+gptq', 'int4_minmax_16+gptq')
VARIANTS |= {f'recipe={name}': {'quant.recipe': name}
             for name in (*_RECIPES, *_OF_INPUTS, *_OF_DIFFERENCES)}
# What the paper leaves open: the full method with one thing changed.
_CHOICES = {
    'as configured': {},
    'fixed activation ranges': {'finetune.learn_act_ranges': False},
    'fixed weight scales': {'finetune.learn_weight_scales': False},
    'learned biases': {'finetune.learn_biases': True},
    'banks: 1': {'finetune.num_banks': 1},
    'banks: 4': {'finetune.num_banks': 4},
    'router prior: 0': {'finetune.router_prior': 0.0},
    'router temperature: 4': {'finetune.router_temperature': 4.0},
    'router rate: 0 (spans)': {'finetune.router_learning_rate': 0.0},
    'router rate: 1e-2': {'finetune.router_learning_rate': 1e-2},
    'base weight: dequantized': {'finetune.base_weight': 'dequantized'},
    'gamma: ddpm': {'finetune.gamma': 'ddpm'},
    'gamma: ddpm_respaced': {'finetune.gamma': 'ddpm_respaced'},
    'updates: twice': {'finetune.num_updates': 2000},
    'average: 0.99': {'finetune.ema_decay': 0.99},
    'driver: student': {'finetune.driver': 'student'},
    'driver: student + steer: 0.3': {
        'finetune.driver': 'student', 'finetune.steer': 0.3},
}
VARIANTS |= {f'choice={name}': change for name, change in _CHOICES.items()}

_METRICS = ('fd_digits', 'fd_digits_to_fp', 'psnr_to_fp', 'label_agreement',
            'bytes')
# python -m msfp_jax.run.study --config=configs/digits.py:STUDY
STUDIES = {
    'table': {
        'seeds': (0, 1, 2),
        'metrics': _METRICS,
        'groups': {group: {label: f'{group},{variant}'
                           for label, variant in _ROWS.items()}
                   for group in ('ends-8', 'skip-8')},
    },
    'choices': {
        'seeds': (0, 1, 2),
        'metrics': (*_METRICS, 'class_balance'),
        'groups': {'ends-8': {label: f'ends-8,choice={label}'
                             for label in _CHOICES}},
    },
    'recipes': {
        'seeds': (0, 1, 2),
        'metrics': (
            'bits_per_weight', 'bits_per_act', 'bytes', 'sqnr_mean', 'sqnr_min',
            'psnr_to_fp', 'ssim_to_fp', 'fd_digits_to_fp', 'fd_digits',
            'label_agreement', 'seconds', 'seconds_packed'),
        'base': 'recipes',
        'groups': {group: {name: f'recipes,{group},recipe={name}'
                           for name in _RECIPES}
                   for group in ('ends-8', 'skip-8')},
    },
    # The best of those, and MSFP, fine-tuned.
    'recipes_tuned': {
        'seeds': (0, 1, 2),
        'metrics': ('bits_per_weight', 'bits_per_act', *_METRICS, 'ssim_to_fp'),
        'groups': {group: {f'{name} + {label}': f'{group},recipe={name},{words}'
                           for name in _BEST
                           for label, words in (('LoRA', 'lora'),
                                                ('TALoRA + DFA', 'talora,dfa'))}
                   for group in ('ends-8', 'skip-8')},
    },
    # Inputs, and what they differ by from step to step; the latter fine-tuned.
    'differences': {
        'seeds': (0, 1, 2),
        'metrics': ('bits_per_weight', 'bits_per_act', 'bytes_kept', *_METRICS,
                    'ssim_to_fp'),
        'groups': {group: {
            **{name: f'{group},recipe={name},untuned'
               for pair in zip(_OF_INPUTS, _OF_DIFFERENCES, strict=True)
               for name in pair},
            **{f'{_OF_DIFFERENCES[1]}: {label}':
               f'{group},recipe={_OF_DIFFERENCES[1]},{words}'
               for label, words in (
                   ('LoRA', 'lora'), ('LoRA + DFA', 'lora,dfa'),
                   ('LoRA + DFA + student', 'lora,dfa,student'),
                   ('LoRA + DFA + steered', 'lora,dfa,steer'))}}
                   for group in ('ends-8', 'skip-8')},
    },
    # Who drives the trajectories that a student is tuned along.
    'driven': {
        'seeds': (0, 1, 2),
        'metrics': ('bits_per_weight', 'bits_per_act', *_METRICS, 'ssim_to_fp'),
        'groups': {group: {f'{name}: {label}': f'{group},recipe={name},{words}'
                           for name in _DRIVEN for label, words in (
                               ('untuned', 'untuned'),
                               ('teacher', 'lora,dfa'),
                               ('student', 'lora,dfa,student'),
                               ('steered', 'lora,dfa,steer'),
                               ('steered + two banks',
                                'talora,dfa,steer'))}
                   for group in ('ends-8', 'skip-8')},
    },
}
