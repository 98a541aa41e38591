"""Keys of PEFT's LoraConfig: used, harmless, or refused.

They stand in the header of a file of diffusers (`lora_adapter_metadata`, with
the name of a pipeline's part before each) or in the adapter_config.json beside
one of PEFT. What a key does is what PEFT 0.21 does with it.
"""

from collections.abc import Mapping
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from msfp_jax.convert import key_check
from msfp_jax.convert import key_values as kinds
from msfp_jax.convert import lora_names
from msfp_jax.convert import source as source_lib

HEADER = 'lora_adapter_metadata'
BESIDE = 'adapter_config.json'
# The pipeline's names of the parts, as the header has them.
_PARTS = {lora_names.DENOISER: ('unet', 'transformer'),
          lora_names.CLIP: ('text_encoder',),
          lora_names.T5: ('text_encoder_2', 'text_encoder_3')}

# Names of modules are taken as such: PEFT's may be patterns.
_NAME = re.compile(r'\^?[\w.]+\$?')
_PATTERN = kinds.Kind(
    '{name of modules: number}', lambda value: value is None or (
        isinstance(value, Mapping)
        and all(isinstance(key, str) and _NAME.fullmatch(key)
                and kinds.number().has(number)
                for key, number in value.items())))
USED: dict[str, kinds.Kind] = {
    'lora_alpha': kinds.number(), 'alpha_pattern': _PATTERN,
    'use_rslora': kinds.FLAG}
# Some ways to begin change the model's own weights, or quantize them: the
# LoRA then belongs to those, and not to the published ones.
ONLY: dict[str, tuple[Any, ...]] = {
    'peft_type': ('LORA', None), 'fan_in_fan_out': (False, None),
    'bias': ('none', None), 'lora_bias': (False, None),
    'use_dora': (False, None), 'use_qalora': (False, None),
    'use_bdlora': (None, False), 'modules_to_save': (None, []),
    'layer_replication': (None, []), 'target_parameters': (None, []),
    'trainable_token_indices': (None, []),
    'alora_invocation_tokens': (None, []), 'arrow_config': (None,),
    'kasa_config': (None,), 'velora_config': (None,),
    'monteclora_config': (None,), 'corda_config': (None,),
    'lora_ga_config': (None,),
    'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal')}
# Ranks and targets are as the tensors have them; the rest is of training.
HARMLESS = frozenset({
    'r', 'rank_pattern', 'target_modules', 'exclude_modules', 'lora_dropout',
    'layers_to_transform', 'layers_pattern', 'megatron_config',
    'megatron_core', 'loftq_config', 'eva_config', 'qalora_group_size',
    'runtime_config', 'ensure_weight_tying', 'task_type', 'auto_mapping',
    'peft_version', 'base_model_name_or_path', 'revision', 'inference_mode'})
KEYS = USED.keys() | ONLY.keys() | HARMLESS


class Scales(NamedTuple):
  """What a configuration says of alpha; without one, alpha is the rank.

  Attributes:
    alpha: of all modules, or None.
    by_module: alpha of those whose names end like this.
    by_root: whether alpha is divided by the root of the rank (rsLoRA).
  """

  alpha: float | None = None
  by_module: Mapping[str, float] = {}
  by_root: bool = False

  def of(self, module: str, rank: int) -> float:
    """The factor of a module's down up."""
    alpha = rank if self.alpha is None else self.alpha
    for name, value in self.by_module.items():
      if _matches(name, module):
        alpha = value
        break
    return alpha / (math.sqrt(rank) if self.by_root else rank)


def _matches(name, module):
  # As PEFT's '(.*\.)?(name)$'.
  plain = name.removesuffix('$')
  if plain.startswith('^'):
    return module == plain.removeprefix('^')
  return module == plain or module.endswith(f'.{plain}')


def read(path: pathlib.Path, metadata: Mapping[str, str], part: str,
         is_peft: bool = False) -> Scales:
  """Reads what is said of one part of the pipeline.

  Args:
    path: of the LoRA's file.
    metadata: of its header.
    part: of `lora_names`.
    is_peft: whether the tensors have PEFT's names, and none is an alpha.

  Raises:
    ValueError: no JSON, or by key for what is not computed here; PEFT's file
      without its configuration.
  """
  found = _config(path, metadata, part, is_peft)
  if not found and is_peft:
    raise ValueError(f'its names are those of PEFT, which has alpha in a '
                     f'{BESIDE}: put that beside it')
  if not found:
    return Scales()
  what = 'what adds LoRAs'
  key_check.refuse(what, key_check.wrong(found, USED))
  key_check.refuse(what, key_check.odd(found, ONLY, KEYS))
  if 'lora_alpha' not in found:
    raise ValueError("the LoRA's configuration has no lora_alpha")
  return Scales(found['lora_alpha'], found.get('alpha_pattern') or {},
                found.get('use_rslora', False))


def _config(path, metadata, part, is_peft):
  if HEADER in metadata:
    try:
      content = json.loads(metadata[HEADER])
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{HEADER} in its header is no JSON: {error}') from error
    if not isinstance(content, dict):
      raise ValueError(f'{HEADER} in its header holds no fields')
    known = tuple(f'{name}.' for names in _PARTS.values() for name in names)
    if not any(key.startswith(known) for key in content):
      # Of a model that was saved alone, as the tensors beside it.
      return content
    starts = tuple(f'{name}.' for name in _PARTS.get(part, ()))
    return {key.partition('.')[2]: value for key, value in content.items()
            if key.startswith(starts)}
  beside = path.parent / BESIDE
  # Other files in a folder need not be PEFT's.
  if (path.name.startswith('adapter_model') or is_peft) and beside.is_file():
    return source_lib.read_config(beside)
  return {}
