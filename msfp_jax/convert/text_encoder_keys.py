"""Keys of a text encoder's config.json: read, harmless, or refused.

What a key does is what transformers' CLIPTextModel and T5EncoderModel do with
it; a key that is absent has the default of their configurations.
"""

from collections.abc import Mapping
from typing import Any

from msfp_jax.convert import key_check
from msfp_jax.convert import key_values as kinds
from msfp_jax.models.activations import ACTIVATIONS

CLIP, T5 = 'clip_text_model', 't5'
_TOKEN = kinds.Kind('a whole number from 0 on',
                    lambda value: type(value) is int and value >= 0)

# Keys that are fields of ours: {theirs: (ours, its kind, the default)}.
CLIP_FIELDS = {
    'vocab_size': ('vocab_size', kinds.WHOLE, 49408),
    'hidden_size': ('width', kinds.WHOLE, 512),
    'intermediate_size': ('mlp_width', kinds.WHOLE, 2048),
    'num_hidden_layers': ('layers', kinds.WHOLE, 12),
    'num_attention_heads': ('heads', kinds.WHOLE, 8),
    'max_position_embeddings': ('length', kinds.WHOLE, 77),
    'hidden_act': ('activation', kinds.TEXT, 'quick_gelu'),
    'layer_norm_eps': ('norm_eps', kinds.number(0), 1e-5),
    'eos_token_id': ('eos_id', _TOKEN, 49407),
    'projection_dim': ('projection_dim', kinds.or_none(kinds.WHOLE), 512)}
T5_FIELDS = {
    'vocab_size': ('vocab_size', kinds.WHOLE, 32128),
    'd_model': ('width', kinds.WHOLE, 512),
    'd_kv': ('head_width', kinds.WHOLE, 64),
    'd_ff': ('mlp_width', kinds.WHOLE, 2048),
    'num_layers': ('layers', kinds.WHOLE, 6),
    'num_heads': ('heads', kinds.WHOLE, 8),
    'layer_norm_epsilon': ('norm_eps', kinds.number(0), 1e-6),
    'relative_attention_num_buckets': ('buckets', kinds.WHOLE, 32),
    'relative_attention_max_distance': ('max_distance', kinds.WHOLE, 128)}
# The activation of T5, and what says it once more.
FEED_FORWARD = 'feed_forward_proj'
_T5_AGAIN = frozenset({FEED_FORWARD, 'dense_act_fn', 'is_gated_act'})

# Keys of which only some values are computed here; those of both encoders, and
# of one.
_BOTH_ONLY = {
    'is_decoder': (False,), 'add_cross_attention': (False,),
    'pruned_heads': ({}, None), 'quantization_config': (None,),
    # Stable Diffusion's pipeline asks it of the encoder's configuration.
    'use_attention_mask': (False, None)}
_OWN_ONLY = {
    CLIP: {
        'model_type': (CLIP,), 'hidden_act': tuple(ACTIVATIONS),
        'architectures': (['CLIPTextModel'], ['CLIPTextModelWithProjection'],
                          ['CLIPModel'], None)},
    T5: {
        'model_type': (T5,),
        'architectures': (['T5EncoderModel'], ['T5Model'],
                          ['T5ForConditionalGeneration'],
                          ['T5WithLMHeadModel'], None)}}
# Keys that change nothing of what a trained encoder computes: names, types of
# numbers, training, and what belongs to T5's decoder or to writing texts.
_HARMLESS = frozenset({
    '_name_or_path', '_attn_implementation', '_attn_implementation_autoset',
    '_commit_hash', 'attn_implementation', 'transformers_version', 'dtype',
    'torch_dtype', 'use_bfloat16', 'torchscript', 'tf_legacy_loss',
    'initializer_factor', 'initializer_range', 'dropout', 'dropout_rate',
    'attention_dropout', 'classifier_dropout', 'bos_token_id', 'pad_token_id',
    'sep_token_id', 'decoder_start_token_id', 'return_dict',
    'output_attentions', 'output_hidden_states', 'chunk_size_feed_forward',
    'id2label', 'label2id', 'num_labels', 'problem_type', 'finetuning_task',
    'tokenizer_class', 'prefix', 'task_specific_params', 'use_cache',
    'tie_word_embeddings', 'tie_encoder_decoder', 'is_encoder_decoder',
    'cross_attention_hidden_size', 'num_decoder_layers', 'output_past',
    'n_positions', 'scale_decoder_outputs', 'gradient_checkpointing',
    # Of generating text.
    'bad_words_ids', 'begin_suppress_tokens', 'diversity_penalty', 'do_sample',
    'early_stopping', 'encoder_no_repeat_ngram_size',
    'exponential_decay_length_penalty', 'forced_bos_token_id',
    'forced_eos_token_id', 'length_penalty', 'max_length', 'min_length',
    'no_repeat_ngram_size', 'num_beam_groups', 'num_beams',
    'num_return_sequences', 'output_scores', 'remove_invalid_values',
    'repetition_penalty', 'return_dict_in_generate', 'suppress_tokens',
    'temperature', 'top_k', 'top_p', 'typical_p'})
# Of a text encoder's own, with `eos_token_id` of T5, which only writes texts.
OWN_KEYS = {CLIP: CLIP_FIELDS.keys() | _OWN_ONLY[CLIP].keys(),
            T5: T5_FIELDS.keys() | _T5_AGAIN | _OWN_ONLY[T5].keys() | {
                'eos_token_id'}}
BOTH_KEYS = _BOTH_ONLY.keys() | _HARMLESS
KEYS = {kind: own | BOTH_KEYS for kind, own in OWN_KEYS.items()}
# As kinds of values, for each model_type.
_KINDS = {
    CLIP: {key: kind for key, (_, kind, _) in CLIP_FIELDS.items()},
    T5: {key: kind for key, (_, kind, _) in T5_FIELDS.items()} | {
        FEED_FORWARD: kinds.TEXT}}
_WHAT = 'this text encoder'


def check(given: Mapping[str, Any], kind: str) -> None:
  """Looks at a config.json.

  Args:
    given: its keys.
    kind: CLIP or T5, as the tensors say.

  Raises:
    ValueError: by key, for what our encoders do not have.
  """
  key_check.refuse(_WHAT, key_check.wrong(given, _KINDS[kind]))
  odd = key_check.odd(given, _BOTH_ONLY | _OWN_ONLY[kind], KEYS[kind])
  key_check.refuse(_WHAT, odd + (_contradictions(given) if kind == T5 else []))


def feed_forward(given: Mapping[str, Any]) -> dict[str, Any]:
  """The activation of a T5, as fields of `T5Config`."""
  # 'relu' of T5, 'gated-gelu' of v1.1, which means the approximation by tanh;
  # without a gate 'gelu' means the exact one.
  name = given.get(FEED_FORWARD, 'relu')
  first, dash, last = name.partition('-')
  gated = bool(dash) and first == 'gated'
  function = last if gated else name
  return {'gated': gated, 'activation': (
      'gelu_new' if name == 'gated-gelu' else function)}


def _contradictions(given):
  """What a T5's keys say of its activation, where it is not ours."""
  found = feed_forward(given)
  texts = []
  if found['activation'] not in ACTIVATIONS:
    texts.append(f'{FEED_FORWARD}={given[FEED_FORWARD]!r} (must be one of '
                 f'{list(ACTIVATIONS)}, or gated- and one of them)')
  for key, wanted in (('dense_act_fn', found['activation']),
                      ('is_gated_act', found['gated'])):
    if given.get(key, wanted) != wanted:
      texts.append(f'{key}={given[key]!r} (must be {wanted!r}, as '
                   f'{FEED_FORWARD} says)')
  return texts
