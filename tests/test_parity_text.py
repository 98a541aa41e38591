"""Live comparison of text encoders with transformers (`make parity`)."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import text_files
import text_oracle
import unet_oracle

from msfp_jax.convert import text_encoder_keys
from msfp_jax.convert.text_encoder import load_text_encoder
from msfp_jax.models import t5 as t5_lib
from msfp_jax.text import encode

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning')]

CLIP = dict(vocab_size=99, hidden_size=24, intermediate_size=40,
            num_hidden_layers=3, num_attention_heads=3,
            max_position_embeddings=11, projection_dim=20, eos_token_id=2,
            bos_token_id=0, pad_token_id=1)
T5 = dict(vocab_size=99, d_model=24, d_kv=5, d_ff=40, num_layers=3, num_heads=4,
          feed_forward_proj='gated-gelu')
CLIPS = {
    'clip-l': {}, 'openclip-h': {'hidden_act': 'gelu'},
    'new eos': {'eos_token_id': 7}, 'eos of several': {'eos_token_id': 98},
    'tanh, eps': {'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-2}}
T5S = {
    'v1.1': {}, 'plain': {'feed_forward_proj': 'relu'},
    'silu': {'feed_forward_proj': 'gated-silu'},
    'exact': {'feed_forward_proj': 'gelu'},
    'classes, eps': {'relative_attention_num_buckets': 14,
                     'relative_attention_max_distance': 9,
                     'layer_norm_epsilon': 1e-2}}


def randomized(model, seed=0):
  """Weights that no initializer would give, norms and biases among them."""
  import torch
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, value in sorted(model.named_parameters()):
      scale = 1 if value.ndim < 2 else value.shape[-1] ** -0.5
      values = rng.standard_normal(value.shape) * scale
      if value.ndim < 2 and name.endswith('weight'):
        values = 1 + 0.3 * values
      value.copy_(torch.from_numpy(values.astype(np.float32)))
  return model.eval()


def clip_of(changes, projects=False):
  import transformers
  kind = 'CLIPTextModelWithProjection' if projects else 'CLIPTextModel'
  return randomized(getattr(transformers, kind)(
      transformers.CLIPTextConfig(**CLIP | changes)))


def t5_of(changes, kind='T5EncoderModel'):
  import transformers
  return randomized(getattr(transformers, kind)(
      transformers.T5Config(**T5 | changes)))


def ids_of(length=11):
  """Four texts that end at different places, one of them at once."""
  rng = np.random.default_rng(1)
  ids = rng.integers(3, 98, (4, length))
  for row, end in enumerate((1, 4, 4, length - 1)):
    # 98 is the highest token, and the padding too; 7 another one's end.
    ids[row, end] = 7
    ids[row, end:] = [98 if row % 2 else 7] + [98] * (length - 1 - end)
  return ids


def theirs(model, ids):
  import torch
  with torch.inference_mode():
    return model(torch.from_numpy(ids))


def ours(path, ids, **options):
  model, params = load_text_encoder(path, **options)
  return jax.jit(model.apply)({'params': params}, ids.astype(np.int32))


def close(actual, expected):
  return unet_oracle.rel_l2(np.asarray(actual), expected.numpy()) < 5e-6


@pytest.mark.parametrize('name', CLIPS)
def test_clip_equals_transformers(name, tmp_path):
  model, ids = clip_of(CLIPS[name]), ids_of()
  model.save_pretrained(tmp_path)
  expected, actual = theirs(model, ids), ours(tmp_path, ids)
  assert close(actual.hidden, expected.last_hidden_state)
  assert close(actual.pooled, expected.pooler_output)


def test_clip_projects_like_transformers(tmp_path):
  model, ids = clip_of({}, projects=True), ids_of()
  model.save_pretrained(tmp_path)
  assert close(ours(tmp_path, ids).pooled, theirs(model, ids).text_embeds)


@pytest.mark.parametrize('name', T5S)
def test_t5_equals_transformers(name, tmp_path):
  model, ids = t5_of(T5S[name]), ids_of(40)
  model.save_pretrained(tmp_path)
  assert close(ours(tmp_path, ids), theirs(model, ids).last_hidden_state)


def test_a_whole_t5_gives_its_encoder(tmp_path):
  import transformers
  t5_of({}, 'T5ForConditionalGeneration').save_pretrained(tmp_path)
  encoder = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
  ids = ids_of()
  assert close(ours(tmp_path, ids), theirs(encoder, ids).last_hidden_state)


@pytest.mark.parametrize('make', [clip_of, t5_of])
@pytest.mark.parametrize('kind', ['float16', 'bfloat16'])
def test_half_precision_in_shards(make, kind, tmp_path):
  """Weights of half precision, computed with in float32, from several files."""
  import torch
  model, ids = make({}).to(getattr(torch, kind)), ids_of()
  model.save_pretrained(tmp_path, max_shard_size=4000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 2
  expected = theirs(model.float(), ids).last_hidden_state
  for options in ({}, {'keep_half': True}):
    actual = ours(tmp_path, ids, **options)
    assert close(getattr(actual, 'hidden', actual), expected)


@pytest.mark.parametrize('buckets, far', [
    (32, 128), (32, 20), (8, 64), (14, 9), (33, 100), (64, 512)])
def test_classes_of_distances_equal_transformers(buckets, far):
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention
  places = torch.arange(700)
  expected = T5Attention._relative_position_bucket(
      places[None] - places[:, None], True, buckets, far)
  np.testing.assert_array_equal(
      t5_lib.distance_classes(700, buckets, far), expected)


def test_the_oracle_of_other_tests_equals_transformers():
  """NumPy's, of which `make test` thinks that it is transformers."""
  import torch
  for make, config, oracle in (
      (clip_of, text_oracle.CLIP, text_oracle.clip),
      (t5_of, text_oracle.T5, text_oracle.t5)):
    changes = {key: value for key, value in config.items()
               if key not in ('model_type', 'architectures')}
    model, ids = make(changes), text_oracle.ids_of(11)
    state = {name: value.numpy() for name, value
             in model.state_dict().items()}
    with torch.inference_mode():
      expected = model(torch.from_numpy(ids))
    found = oracle(config, state, ids)
    hidden = found[0] if make is clip_of else found
    assert close(hidden, expected.last_hidden_state)
    if make is clip_of:
      assert close(found[1], expected.pooler_output)


def pipeline_parts(folder, flux):
  """Tokenizers and encoders of transformers, written as a pipeline has them."""
  import transformers
  count = text_files.write_clip(folder / 'tokenizer', length=11,
                                pad=text_files.CLIP_ENDS[1] if flux else '!')
  found = {'text_encoder': clip_of({'vocab_size': count, 'hidden_act': 'gelu'}),
           'tokenizer': transformers.CLIPTokenizer.from_pretrained(
               folder / 'tokenizer')}
  if flux:
    text_files.write_t5(folder / 'tokenizer_2', length=20)
    found |= {'text_encoder_2': t5_of({'vocab_size': 128}),
              'tokenizer_2': transformers.T5Tokenizer.from_pretrained(
                  folder / 'tokenizer_2')}
  for name, part in found.items():
    if name.startswith('text_encoder'):
      part.save_pretrained(folder / name)
  return found


def test_stable_diffusions_prompts_equal_diffusers(tmp_path):
  import diffusers
  import torch
  pipeline = diffusers.StableDiffusionPipeline(
      **pipeline_parts(tmp_path, flux=False), vae=None, unet=None,
      scheduler=None, safety_checker=None, feature_extractor=None,
      requires_safety_checker=False)
  encoders = encode.load_encoders(tmp_path)
  for negative in (None, list(reversed(text_files.NASTY))):
    with torch.inference_mode():
      expected = pipeline.encode_prompt(text_files.NASTY, 'cpu', 1, True,
                                        negative)
    found = encode.encode_prompts(
        encoders, text_files.NASTY, '' if negative is None else negative)
    for actual, wanted in zip((found.conditions, found.negative), expected,
                              strict=True):
      assert close(actual['context'], wanted)


def test_fluxs_prompts_equal_diffusers(tmp_path):
  import diffusers
  import torch
  pipeline = diffusers.FluxPipeline(
      **pipeline_parts(tmp_path, flux=True), vae=None, transformer=None,
      scheduler=None)
  with torch.inference_mode():
    text, pooled, _ = pipeline.encode_prompt(
        text_files.NASTY, None, 'cpu', max_sequence_length=16)
  found = encode.encode_prompts(
      encode.load_encoders(tmp_path, 16), text_files.NASTY)
  assert close(found.conditions['text'], text)
  assert close(found.conditions['pooled'], pooled)


class No:
  """A value that is not computed here: refused by its key's name."""

  def __init__(self, value):
    self.value = value


# Values of each key that the class has, beside its default or the base's.
BOTH = {
    'transformers_version': ['4.0.0'], 'architectures': [No(['Other'])],
    'output_hidden_states': [True], 'return_dict': [False],
    'dtype': ['float32'], 'chunk_size_feed_forward': [1],
    'is_encoder_decoder': [True, False], 'id2label': [{'0': 'a'}],
    'label2id': [{'a': 0}], 'problem_type': ['regression'], 'vocab_size': [150],
    'initializer_factor': [2.0], 'pad_token_id': [5], '_name_or_path': ['x'],
    'output_attentions': [False]}
KEYS = {
    'clip': (clip_of, text_encoder_keys.CLIP, BOTH | {
        'model_type': [No('clip'), No('altclip')], 'hidden_size': [30],
        'intermediate_size': [50], 'projection_dim': [7, None],
        'num_hidden_layers': [1], 'num_attention_heads': [2],
        'max_position_embeddings': [20],
        'hidden_act': ['gelu', 'relu', 'gelu_pytorch_tanh', 'swish',
                       No('mish'), No('gelu_fast')],
        'layer_norm_eps': [1e-2], 'attention_dropout': [0.1],
        'initializer_range': [0.1], 'bos_token_id': [4],
        'eos_token_id': [7, 98, No([7, 98])]}),
    't5': (t5_of, text_encoder_keys.T5, BOTH | {
        'model_type': [No('umt5'), No('mt5')], 'd_model': [30], 'd_kv': [7],
        'd_ff': [50], 'num_layers': [1], 'num_decoder_layers': [5],
        'num_heads': [2], 'relative_attention_num_buckets': [8, 13],
        'relative_attention_max_distance': [20, No(8)], 'dropout_rate': [0.3],
        'layer_norm_epsilon': [1e-2],
        'feed_forward_proj': [
            'relu', 'gelu', 'gated-relu', 'gated-gelu_new', 'gated-silu',
            No('gated-mish'), No('mish')],
        'use_cache': [False], 'eos_token_id': [5], 'classifier_dropout': [0.1],
        'is_decoder': [No(True)], 'dense_act_fn': [No('relu'), 'gelu_new'],
        'is_gated_act': [No(False), True], 'scale_decoder_outputs': [False],
        'tie_word_embeddings': [False]})}
CASES = [(kind, key, value) for kind, (*_, values) in KEYS.items()
         for key, some in values.items() for value in some]


@pytest.mark.parametrize('kind', KEYS)
def test_every_key_is_known_and_tried(kind):
  make, name, values = KEYS[kind]
  config = make({}).config
  written = {field.name for field in dataclasses.fields(config)} | {
      *config.to_dict()}
  assert written == values.keys()
  assert written <= text_encoder_keys.KEYS[name]


@pytest.mark.parametrize('kind, key, value', CASES, ids=[
    f'{kind} {key} {getattr(value, "value", value)}'
    for kind, key, value in CASES])
def test_a_key_does_what_it_does_there(kind, key, value, tmp_path):
  make, _, _ = KEYS[kind]
  if isinstance(value, No):
    make({}).save_pretrained(tmp_path)
    file = tmp_path / 'config.json'
    text_files.write_json(file, json.loads(file.read_text()) | {
        key: value.value})
    with pytest.raises(ValueError, match='distance' if 'distance' in key
                       else key):
      load_text_encoder(tmp_path)
    return
  # Of some of them a model cannot be made, which then changes nothing.
  model = make({key: value}) if key not in (
      'model_type', 'is_encoder_decoder') else make({})
  model.save_pretrained(tmp_path)
  file = tmp_path / 'config.json'
  text_files.write_json(file, json.loads(file.read_text()) | {key: value})
  model.config.return_dict = True
  expected = theirs(model, ids_of()).last_hidden_state
  encoder, params = load_text_encoder(tmp_path)
  # Not compiled as a whole: all these models share most operations.
  found = encoder.apply({'params': params}, ids_of().astype(np.int32))
  assert close(getattr(found, 'hidden', found), expected)
