"""Names in files of LoRAs: which half of which module of which model.

Three habits are found:

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight  PEFT, diffusers
    unet.mid_block.attentions.0.proj_in.lora.down.weight      older diffusers
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight kohya

each with the modules' names of whatever code base the model was trained in.
"""

from collections.abc import Mapping
import re
from typing import NamedTuple

from msfp_jax.convert.tensors import LazyTensor

# Of a pipeline, what a LoRA may be for. No model of ours is the last one.
DENOISER, CLIP, T5, OTHER = (
    'the denoiser', "CLIP's text encoder", "T5's text encoder",
    'another text encoder')

# How a module's name begins, by part, and whether '_' stands for its dots.
_STARTS: tuple[tuple[str, str, bool], ...] = (
    ('lora_unet_', DENOISER, True), ('lora_transformer_', DENOISER, True),
    ('lora_te_', CLIP, True), ('lora_te1_', CLIP, True),
    ('lora_te2_', OTHER, True), ('lora_te3_', T5, True),
    ('unet.', DENOISER, False), ('transformer.', DENOISER, False),
    ('diffusion_model.', DENOISER, False),
    ('model.diffusion_model.', DENOISER, False),
    ('text_encoder.', CLIP, False),
    ('text_encoder_2.', OTHER, False), ('text_encoder_3.', OTHER, False),
    ('text_encoders.clip_l.transformer.', CLIP, False),
    ('text_encoders.t5xxl.transformer.', T5, False))
# The second text encoder of a pipeline is a T5 by what it is made of.
_T5_WORDS = re.compile(r'SelfAttention|DenseReluDense')
_PEFT = 'base_model.model.'  # before all names of PEFT's own files

# X.lora_A.weight and X.lora_A.ADAPTER.weight; X.lora.down.weight,
# X_lora.down.weight, X.lora_down.weight, X.lora_linear_layer.down.weight, and
# X.down.weight.
_HALF = re.compile(
    r'(?P<module>.+?)(?:\.lora_(?P<letter>[AB])(?:\.(?!weight$)[^.]+)?'
    r'|(?:[._]lora)?(?:_linear_layer)?[._](?P<word>down|up))\.weight')
_ALPHA = re.compile(r'(?P<module>.+?)(?:[._]lora)?\.alpha')

# Parts of modules' names that have '_' in themselves, of all code bases.
_WORDS = (
    # diffusers' UNets
    'down_blocks', 'up_blocks', 'mid_block', 'transformer_blocks', 'to_q',
    'to_k', 'to_v', 'to_out', 'proj_in', 'proj_out', 'time_emb_proj',
    'conv_shortcut', 'conv_in', 'conv_out', 'time_embedding', 'linear_1',
    'linear_2',
    # CompVis'
    'input_blocks', 'middle_block', 'output_blocks', 'in_layers', 'out_layers',
    'emb_layers', 'skip_connection', 'time_embed', 'label_emb',
    # diffusers' FLUX
    'single_transformer_blocks', 'x_embedder', 'context_embedder',
    'time_text_embed', 'timestep_embedder', 'text_embedder',
    'guidance_embedder', 'add_q_proj', 'add_k_proj', 'add_v_proj',
    'to_add_out', 'ff_context', 'proj_mlp', 'norm_out', 'norm1_context',
    # BFL's
    'double_blocks', 'single_blocks', 'img_attn', 'txt_attn', 'img_mlp',
    'txt_mlp', 'img_mod', 'txt_mod', 'img_in', 'txt_in', 'time_in',
    'vector_in', 'guidance_in', 'in_layer', 'out_layer', 'final_layer',
    'adaLN_modulation',
    # transformers' text encoders
    'text_model', 'self_attn', 'q_proj', 'k_proj', 'v_proj', 'out_proj',
    'text_projection', 'wi_0', 'wi_1')
# A word is whole between two '_'; of two that begin alike, the longer one.
_WORD = re.compile('(?<![^_])(?:' + '|'.join(
    sorted(_WORDS, key=len, reverse=True)) + ')(?![^_])')


class Module(NamedTuple):
  """What a file holds for one module; tensors that it lacks are None.

  Attributes:
    name: as the file has it.
    down: `[R, I]`, or of a convolution `[R, I, *window]`.
    up: `[O, R]`, or `[O, R, 1, 1]`.
    alpha: `[]`.
  """

  name: str
  down: LazyTensor | None = None
  up: LazyTensor | None = None
  alpha: LazyTensor | None = None


def sort(tensors: Mapping[str, LazyTensor]
         ) -> tuple[dict[str, dict[str, Module]], list[str]]:
  """Sorts a file's tensors by what they are for.

  Args:
    tensors: {name in the file: tensor}.

  Returns:
    {DENOISER, CLIP, T5 or OTHER: {module, its parts joined with dots: what
    there is for it}}, and the names that are no half of any LoRA.
  """
  found: dict[str, dict[str, Module]] = {}
  odd = []
  for key, tensor in tensors.items():
    name, half = _half(key)
    if not name:
      odd.append(key)
      continue
    part, module = _place(name)
    modules = found.setdefault(part, {})
    have = modules.get(module, Module(name))
    if getattr(have, half) is not None:
      odd.append(f'{key}, a second one for {have.name}')
      continue
    modules[module] = have._replace(**{half: tensor})
  return found, odd


def _half(key):
  """(a module's name, which field of `Module` the tensor is); ('', '') of none.
  """
  if match := _HALF.fullmatch(key):
    return match['module'], (
        'down' if 'A' == match['letter'] or match['word'] == 'down' else 'up')
  if match := _ALPHA.fullmatch(key):
    return match['module'], 'alpha'
  return '', ''


def _place(name):
  """(which model, the module's name with dots) of a name in the file."""
  name = name.removeprefix(_PEFT)
  part, module = DENOISER, name
  for start, its, flat in _STARTS:
    if name.startswith(start):
      rest = name.removeprefix(start)
      part, module = its, with_dots(rest) if flat else rest
      break
  if part == OTHER and _T5_WORDS.search(module):
    part = T5
  # Attention of older diffusers: attn1.processor.to_q_lora, to_out for to_out.0
  # and, of text encoders, to_q for q_proj.
  module = module.replace('.processor.to_', '.to_')
  if part == DENOISER:
    module = re.sub(r'\.to_out$', '.to_out.0', module)
  else:
    module = re.sub(r'\.to_(q|k|v|out)$', r'.\1_proj', module)
  return part, module


def with_dots(flat: str) -> str:
  """A module's name of which all dots are '_', with its dots.

  Which '_' are its own is known of the words that code bases use.
  """
  kept = _WORD.sub(lambda match: match[0].replace('_', '\0'), flat)
  return kept.replace('_', '.').replace('\0', '_')
