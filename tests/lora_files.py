"""LoRAs drawn at random, as files in the names of those who train them.

Written apart from `msfp_jax.convert`, which it helps to check: a LoRA is
{module of PyTorch: (down, up)}, and what it adds is added in PyTorch's layouts.
"""

import json
import re

import flux_oracle
import ml_dtypes
import numpy as np
import safetensors.numpy

# Modules that read one input, for which a fused matrix has one `down`.
_ONE_INPUT = re.compile(r'(attn\.)?(to_[qkv]|proj_mlp|(add_)[qkv]_proj)$')


def draw(shapes, rank=2, seed=0, only='', dtype=np.float32):
  """Draws a LoRA for modules of a state dict.

  Args:
    shapes: {name of a parameter: its shape}.
    rank: of it.
    seed: of it.
    only: a pattern that modules' names hold.
    dtype: of its arrays.
  """
  rng, found, shared = np.random.RandomState(seed), {}, {}
  for name, shape in sorted(shapes.items()):
    module, _, leaf = name.rpartition('.')
    if leaf != 'weight' or len(shape) < 2 or not re.search(only, module):
      continue
    outputs, *inputs = shape
    down = rng.standard_normal((rank, *inputs)) / np.sqrt(np.prod(inputs))
    up = 0.5 * rng.standard_normal((outputs, rank, *[1] * (len(inputs) - 1)))
    if match := _ONE_INPUT.search(module):
      place = module[:match.start()], match[3], tuple(inputs)
      down = shared.setdefault(place, down)
    found[module] = down.astype(dtype), up.astype(dtype)
  return found


def added(state, lora, scale):
  """The state dict with what the LoRA adds, in float64."""
  found = dict(state)
  for module, (down, up) in lora.items():
    name = f'{module}.weight'
    change = np.tensordot(np.float64(up).reshape(len(up), -1),
                          np.float64(down), 1)
    found[name] = (np.float64(state[name])
                   + scale * change.reshape(state[name].shape))
  return found


def peft(lora, prefix='transformer.', adapter=''):
  """diffusers' names, or with another prefix PEFT's own."""
  found = {}
  for module, (down, up) in lora.items():
    found[f'{prefix}{module}.lora_A{adapter}.weight'] = down
    found[f'{prefix}{module}.lora_B{adapter}.weight'] = up
  return found


def old_diffusers(lora, prefix='unet.'):
  """Attention by processors, all else under `lora`."""
  found = {}
  for module, (down, up) in lora.items():
    name = f'{prefix}{module}.lora'
    if match := re.fullmatch(r'(.*attn\d)\.to_(q|k|v|out)(\.0)?', module):
      name = f'{prefix}{match[1]}.processor.to_{match[2]}_lora'
    found |= {f'{name}.down.weight': down, f'{name}.up.weight': up}
  return found


def kohya(lora, prefix='lora_unet_', alpha=None):
  """kohya's: no dots, and alpha beside the halves if there is one."""
  found = {}
  for module, (down, up) in lora.items():
    name = prefix + module.replace('.', '_')
    found |= {f'{name}.lora_down.weight': down, f'{name}.lora_up.weight': up}
    if alpha is not None:
      found[f'{name}.alpha'] = np.array(alpha, down.dtype)
  return found


def bfl(lora, config):
  """A FLUX LoRA of all modules by BFL's, q, k and v fused."""
  # Rows are put together as those of weights.
  rank = len(next(iter(lora.values()))[0])
  state = {}
  for name, shape in flux_oracle.shapes(config).items():
    module = name.rpartition('.')[0]
    state[name] = (lora[module][1] if len(shape) > 1
                   else np.zeros((*shape, rank)))
  ups = flux_oracle.bfl(state, config)
  # A fused module reads what its first part does.
  names = flux_oracle.bfl({name: np.array([name] * 2) for name in state},
                          config)
  found = {}
  for name, up in ups.items():
    module, _, leaf = names[name][0].rpartition('.')
    if leaf == 'weight' and module in lora:
      found[name.removesuffix('.weight')] = lora[module][0], up
  return found


def xlabs(lora):
  """Attention's part of a LoRA in BFL's names, as XLabs names it."""
  table = {'img_attn.qkv': 'qkv_lora1', 'txt_attn.qkv': 'qkv_lora2',
           'img_attn.proj': 'proj_lora1', 'txt_attn.proj': 'proj_lora2'}
  found = {}
  for module, (down, up) in lora.items():
    for theirs, name in table.items():
      if module.endswith(f'.{theirs}'):
        name = module.replace(theirs, f'processor.{name}')
        found |= {f'{name}.down.weight': down, f'{name}.up.weight': up}
    if re.fullmatch(r'single_blocks\.\d+\.linear[12]', module):
      name = module.replace('linear1', 'processor.qkv_lora').replace(
          'linear2', 'processor.proj_lora')
      # Of linear1, q, k and v alone.
      up = up[:3 * len(up) // 7] if module.endswith('1') else up
      found |= {f'{name}.down.weight': down, f'{name}.up.weight': up}
  return found


def write(path, tensors, **metadata):
  """Writes a file; metadata that is no text goes in as JSON."""
  safetensors.numpy.save_file(
      {name: np.ascontiguousarray(value) for name, value in tensors.items()},
      path, {key: value if isinstance(value, str) else json.dumps(value)
             for key, value in metadata.items()})
  return path


def rounded(lora):
  """Its arrays rounded to bfloat16, of their own type."""
  return {module: tuple(np.asarray(half, ml_dtypes.bfloat16).astype(half.dtype)
                        for half in halves)
          for module, halves in lora.items()}
