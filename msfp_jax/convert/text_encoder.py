"""Text encoders in transformers' files: CLIP's text model and T5's encoder."""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Any

from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.convert import hub
from msfp_jax.convert import naming
from msfp_jax.convert import restore
from msfp_jax.convert import source as source_lib
from msfp_jax.convert import text_encoder_keys as keys
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.clip_text import ClipText
from msfp_jax.models.clip_text import ClipTextConfig
from msfp_jax.models.t5 import T5
from msfp_jax.models.t5 import T5Config

_PARTS = ('text_encoder',)
# Before all names of a CLIP, but for what transformers 5.0 on writes.
_CLIP_PREFIX = 'text_model.'
_CLIP_LANDMARK = 'embeddings.token_embedding.weight'
_CLIP_COUNTS = 'embeddings.position_ids'
_PROJECTION = 'text_projection.weight'
_CLIP_RULES: tuple[naming.Rule, ...] = (
    (r'embeddings\.(token|position)_embedding', r'\1_embedding'),
    (r'encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj',
     r'layers.\1.attn.\2'),
    (r'encoder\.layers\.(\d+)\.self_attn\.out_proj',
     r'layers.\1.attn.proj_out'),
    (r'encoder\.layers\.(\d+)\.layer_norm([12])', r'layers.\1.norm\2'),
    (r'encoder\.layers\.(\d+)\.mlp\.(fc[12])', r'layers.\1.\2'),
    (r'final_layer_norm', r'final_norm'),
    (r'text_projection', r'projection'))
# T5's embedding has two names, by its decoder's; a file has either or both.
_T5_EMBEDDING = 'shared.weight'
_T5_OTHER = 'encoder.embed_tokens.weight'
_T5_LANDMARK = 'encoder.block.0.layer.0.SelfAttention.q.weight'
_T5_DECODER = ('decoder.', 'lm_head.')
_T5_RULES: tuple[naming.Rule, ...] = (
    (r'shared|encoder\.embed_tokens', r'token_embedding'),
    (r'encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias',
     r'distance_bias'),
    (r'encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkv])',
     r'blocks.\1.attn.\2'),
    (r'encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.o',
     r'blocks.\1.attn.proj_out'),
    (r'encoder\.block\.(\d+)\.layer\.0\.layer_norm', r'blocks.\1.norm1'),
    (r'encoder\.block\.(\d+)\.layer\.1\.layer_norm', r'blocks.\1.norm2'),
    (r'encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi(?:_0)?',
     r'blocks.\1.ff.proj'),
    (r'encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1',
     r'blocks.\1.ff.gated'),
    (r'encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo',
     r'blocks.\1.ff.out'),
    (r'encoder\.final_layer_norm', r'final_norm'))


def load_text_encoder(path: str | pathlib.Path,
                      config: str | pathlib.Path | None = None,
                      keep_half: bool = False) -> tuple[nn.Module, Any]:
  """Loads CLIP's text encoder or T5's, whichever the file holds.

  Args:
    path: a folder of transformers (config.json beside model.safetensors, or
      its shards), a pipeline's folder, of which `text_encoder` is taken, a
      file, or one of these in the Hugging Face Hub (see `hub`). Of a whole T5
      the decoder is left out.
    config: the encoder's config.json; by default the one beside the weights.
    keep_half: leave weights of half precision in their type, which takes half
      the memory. The results are the same: all is computed in float32.

  Returns:
    A `ClipText` or a `T5`, and its parameters, float32 but for `keep_half`.

  Raises:
    FileNotFoundError: nothing there, or shards that are absent.
    ValueError: a file that holds no such encoder, no config.json, a key in it
      that is not computed here, or tensors that are missing, unexpected,
      misshapen or not finite: all are listed.
  """
  model, read = open_text_encoder(path, config)
  return model, read(keep_half)


def open_text_encoder(path: str | pathlib.Path,
                      config: str | pathlib.Path | None = None
                      ) -> tuple[nn.Module, Callable[[bool], Any]]:
  """As `load_text_encoder`, with the weights still in their file.

  Returns:
    The model, and what reads its parameters (keep_half -> parameters).
  """
  if hub.is_reference(path):
    path = hub.fetch(str(path), _PARTS)
  source = source_lib.open_source(path, config, _PARTS)
  kind = _kind(source)
  given = _config(source, config)
  make = _clip if kind == keys.CLIP else _t5
  try:
    keys.check(given, kind)
    model, named, leftover = make(source.tensors, given)
  except ValueError as error:
    raise ValueError(f'{source.path}: {error}') from error
  logging.info('%s: %s', source.path, model.config)
  return model, lambda keep_half: restore.restore(
      named, abstract_text_encoder(model), str(source.path), restore.TORCH,
      leftover, keep_half)


@functools.lru_cache(maxsize=16)
def abstract_text_encoder(model: nn.Module) -> Any:
  """The shapes of an encoder's parameters, without making any."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), ids)['params']


def _kind(source):
  """Which encoder the tensors are of: keys.CLIP or keys.T5."""
  names = source.tensors.keys()
  if not names.isdisjoint({_CLIP_LANDMARK, _CLIP_PREFIX + _CLIP_LANDMARK}):
    return keys.CLIP
  if _T5_LANDMARK in names:
    return keys.T5
  raise ValueError(
      f"{source.path} holds no text encoder that is known, CLIP's or T5's in "
      f"transformers' names: {len(names)} tensors, such as {sorted(names)[:3]}")


def _config(source, typed):
  if typed is not None:
    return source.config
  beside = source.path.parent / 'config.json'
  if not beside.is_file():
    raise ValueError(f'{source.path} has no config.json beside it, which tells '
                     "the heads of its attention: pass the encoder's as config")
  return source_lib.read_config(beside)


def _fields(given, table):
  return {ours: given.get(theirs, default)
          for theirs, (ours, _, default) in table.items()}


def clip_module(module: str) -> str | None:
  """Our name of a CLIP's module; None where there is no rule."""
  return naming.rename_module(
      module.removeprefix(_CLIP_PREFIX), _CLIP_RULES)


def t5_module(module: str) -> str | None:
  """Likewise of a T5's."""
  return naming.rename_module(module, _T5_RULES)


def _clip(tensors: Mapping[str, LazyTensor], given: Mapping[str, Any]):
  """The model of a CLIP's config.json, and its tensors by our names."""
  # Counts up to the length, which old files hold, are no weights.
  found = {name: tensor for name, tensor in tensors.items()
           if name.removeprefix(_CLIP_PREFIX) != _CLIP_COUNTS}
  fields = _fields(given, keys.CLIP_FIELDS)
  if _PROJECTION not in found:
    fields['projection_dim'] = None
  # The wrong number that configurations had until transformers 4.31; what it
  # means is what that version computed, see `ClipTextConfig`.
  if fields['eos_id'] == 2:
    fields['eos_id'] = None
  named, leftover = naming.rename(found, clip_module)
  return ClipText(ClipTextConfig(**fields)), named, leftover


def _t5(tensors: Mapping[str, LazyTensor], given: Mapping[str, Any]):
  """The model of a T5's config.json, and its encoder's tensors by our names."""
  found = {name: tensor for name, tensor in tensors.items()
           if not name.startswith(_T5_DECODER)}
  if len(found) < len(tensors):
    logging.info("left out the %s tensors of T5's decoder",
                 len(tensors) - len(found))
  if _T5_OTHER in found and _T5_EMBEDDING in found:
    if not _equal(found[_T5_OTHER], found[_T5_EMBEDDING]):
      raise ValueError(f'{_T5_OTHER} and {_T5_EMBEDDING} differ: they are one '
                       'embedding, of which a file may have two copies')
    del found[_T5_OTHER]
  model = T5(T5Config(**_fields(given, keys.T5_FIELDS),
                      **keys.feed_forward(given)))
  named, leftover = naming.rename(found, t5_module)
  return model, named, leftover


def _equal(one, other):
  if one.shape != other.shape or one.refused or other.refused:
    return False
  return np.array_equal(one.read(), other.read())
