"""Text encoders against NumPy in float64, and the files that are refused."""

import json
import math

import jax
import marks
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import text_oracle
import unet_oracle

from msfp_jax.convert import text_encoder_keys as keys
from msfp_jax.convert.text_encoder import abstract_text_encoder
from msfp_jax.convert.text_encoder import load_text_encoder
from msfp_jax.models import t5 as t5_lib
from msfp_jax.models.clip_text import ClipText
from msfp_jax.models.clip_text import ClipTextConfig

pytestmark = pytest.mark.optimized

KINDS = {'clip': (text_oracle.CLIP, text_oracle.clip_shapes),
         't5': (text_oracle.T5, text_oracle.t5_shapes)}


def case(kind, **changes):
  """A config.json and its tensors."""
  config, shapes = KINDS[kind]
  config = config | changes
  return config, text_oracle.state_of(shapes(config))


def run(path, ids, **options):
  model, params = load_text_encoder(path, **options)
  return jax.jit(model.apply)({'params': params}, ids)


def is_close(actual, expected):
  return unet_oracle.rel_l2(np.asarray(actual), expected) < 5e-6


@pytest.mark.parametrize('changes', [
    {}, {'hidden_act': 'gelu'}, {'eos_token_id': 7},
    {'eos_token_id': 98, 'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-2}],
    ids=['clip-l', 'openclip-h', 'new end', 'eps'])
def test_clip(changes, tmp_path):
  config, state = case('clip', **changes)
  text_oracle.write(tmp_path, config, state)
  ids = text_oracle.ids_of(11, end=98)
  # Each of them has the end that is looked for, and one has it thrice.
  if config['eos_token_id'] == 7:
    ids[:, -2], ids[1, 2:5] = 7, 7
  hidden, pooled = text_oracle.clip(config, state, ids)
  actual = run(tmp_path, ids)
  assert is_close(actual.hidden, hidden)
  assert is_close(actual.pooled, pooled)


@pytest.mark.parametrize('name', ['gated-gelu', 'relu', 'gelu', 'gated-silu'])
def test_t5(name, tmp_path):
  """Longer than the furthest distance that has a class of its own."""
  config, state = case('t5', feed_forward_proj=name)
  text_oracle.write(tmp_path, config, state)
  ids = text_oracle.ids_of(20)
  assert is_close(run(tmp_path, ids), text_oracle.t5(config, state, ids))


def test_distances_of_published_t5():
  """Of every pair in FLUX's 512 tokens."""
  found = t5_lib.distance_classes(512, 32, 128)
  for distance in range(-511, 512):
    expected = text_oracle.t5_class(distance, 32, 128)
    assert set(np.diag(found, distance).tolist()) == {expected}


def test_names_of_newer_and_older_files(tmp_path):
  """Without the prefix, with counts that are no weights, projected."""
  config, state = case('clip')
  hidden, pooled = text_oracle.clip(config, state, text_oracle.ids_of(11))
  projection = np.random.default_rng(3).standard_normal((20, 24)).astype('f')
  bare = {name.removeprefix('text_model.'): x for name, x in state.items()}
  text_oracle.write(tmp_path, config, bare | {
      'text_projection.weight': projection,
      'embeddings.position_ids': np.arange(11)[None]})
  actual = run(tmp_path, text_oracle.ids_of(11))
  assert is_close(actual.hidden, hidden)
  assert is_close(actual.pooled, pooled @ projection.T)


def test_a_whole_t5(tmp_path):
  """Its decoder is left out, and a second copy of the embedding taken once."""
  config, state = case('t5')
  rest = {'decoder.embed_tokens.weight': state['shared.weight'],
          'lm_head.weight': state['shared.weight'] + 1}
  ids = text_oracle.ids_of(9)
  expected = text_oracle.t5(config, state, ids)
  text_oracle.write(tmp_path, config, state | rest | {
      'encoder.embed_tokens.weight': state['shared.weight']})
  assert is_close(run(tmp_path, ids), expected)
  text_oracle.write(tmp_path, config, state | {
      'encoder.embed_tokens.weight': state['shared.weight'] + 1})
  with pytest.raises(ValueError, match='embed_tokens.weight and shared.weight'):
    load_text_encoder(tmp_path)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', marks.quick(
    [ml_dtypes.bfloat16], [np.float16, ml_dtypes.bfloat16]))
def test_half_precision_in_shards(kind, dtype, tmp_path):
  """Kept or not, the result is that of the values as float32, bit for bit."""
  config, state = case(kind)
  half = {name: value.astype(dtype) for name, value in state.items()}
  text_oracle.write(tmp_path / 'one', config, {
      name: value.astype(np.float32) for name, value in half.items()})
  (tmp_path / 'text_encoder').mkdir()
  (tmp_path / 'text_encoder/config.json').write_text(json.dumps(config))
  names, places = sorted(half), {}
  for i in range(2):
    file = f'model-0000{i + 1}-of-00002.safetensors'
    safetensors.numpy.save_file({name: half[name] for name in names[i::2]},
                                tmp_path / 'text_encoder' / file)
    places |= dict.fromkeys(names[i::2], file)
  (tmp_path / 'text_encoder/model.safetensors.index.json').write_text(
      json.dumps({'weight_map': places}))
  ids = text_oracle.ids_of(11)
  expected = run(tmp_path / 'one', ids)
  for options in ({}, {'keep_half': True}):
    jax.tree.map(np.testing.assert_array_equal,
                 run(tmp_path, ids, **options), expected)
  _, params = load_text_encoder(tmp_path, keep_half=True)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}


def test_absent_shards_are_named(tmp_path):
  config, state = case('clip')
  text_oracle.write(tmp_path, config, state)
  (tmp_path / 'model.safetensors').unlink()
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({
      'weight_map': {'a': 'one.safetensors', 'b': 'two.safetensors'}}))
  with pytest.raises(FileNotFoundError, match='one.*two'):
    load_text_encoder(tmp_path)


@pytest.mark.parametrize('kind, name', [
    ('clip', 'text_model.encoder.layers.1.mlp.fc2.bias'),
    ('t5', 'encoder.block.1.layer.1.DenseReluDense.wi_1.weight')])
def test_tensors_missing_and_left_over_are_named(kind, name, tmp_path):
  config, state = case(kind)
  odd = name.replace('1', '7')
  text_oracle.write(tmp_path, config, {
      odd if key == name else key: x for key, x in state.items()})
  with pytest.raises(ValueError, match='does not fit') as caught:
    load_text_encoder(tmp_path)
  assert 'missing ' in str(caught.value) and 'unexpected ' in str(caught.value)


def test_other_models_are_no_text_encoder(tmp_path):
  text_oracle.write(tmp_path, {}, {'conv_in.weight': np.ones(3, np.float32)})
  with pytest.raises(ValueError, match='holds no text encoder'):
    load_text_encoder(tmp_path)


def test_without_a_configuration(tmp_path):
  config, state = case('clip')
  text_oracle.write(tmp_path, config, state)
  (tmp_path / 'config.json').rename(tmp_path / 'other.json')
  with pytest.raises(ValueError, match='config.json'):
    load_text_encoder(tmp_path)
  model, _ = load_text_encoder(tmp_path, tmp_path / 'other.json')
  assert model.config == ClipTextConfig(
      vocab_size=99, width=24, mlp_width=40, layers=2, heads=3, length=11,
      eos_id=None)


@pytest.mark.parametrize('kind, changes, said', [
    ('clip', {'model_type': 'clip'}, 'model_type'),
    ('clip', {'hidden_act': 'mish'}, 'hidden_act'),
    ('clip', {'num_attention_heads': 5}, '5 heads'),
    ('clip', {'eos_token_id': [2, 3]}, 'eos_token_id'),
    ('clip', {'eos_token_id': None}, 'eos_token_id'),
    ('clip', {'use_attention_mask': True}, 'use_attention_mask'),
    ('clip', {'hidden_size': 'wide'}, 'hidden_size'),
    ('clip', {'quantization_config': {}}, 'quantization_config'),
    ('clip', {'dreamt_of': 1}, 'dreamt_of'),
    ('t5', {'model_type': 'umt5'}, 'model_type'),
    ('t5', {'is_decoder': True}, 'is_decoder'),
    ('t5', {'feed_forward_proj': 'gated-mish'}, 'feed_forward_proj'),
    ('t5', {'feed_forward_proj': 'a-b-c'}, 'feed_forward_proj'),
    ('t5', {'dense_act_fn': 'relu'}, 'dense_act_fn'),
    ('t5', {'is_gated_act': False}, 'is_gated_act'),
    ('t5', {'relative_attention_max_distance': 2}, 'distance'),
    ('t5', {'layer_norm_epsilon': -1}, 'layer_norm_epsilon'),
    ('t5', {'dreamt_of': 1}, 'dreamt_of')])
def test_keys_that_are_not_computed_are_refused(kind, changes, said, tmp_path):
  config, state = case(kind)
  text_oracle.write(tmp_path, config | changes, state)
  with pytest.raises(ValueError, match=said):
    load_text_encoder(tmp_path)


# As published, all keys of them.
SD2 = {
    '_name_or_path': 'x', 'architectures': ['CLIPTextModel'],
    'attention_dropout': 0.0, 'bos_token_id': 0, 'dropout': 0.0,
    'eos_token_id': 2, 'hidden_act': 'gelu', 'hidden_size': 1024,
    'initializer_factor': 1.0, 'initializer_range': 0.02,
    'intermediate_size': 4096, 'layer_norm_eps': 1e-05,
    'max_position_embeddings': 77, 'model_type': 'clip_text_model',
    'num_attention_heads': 16, 'num_hidden_layers': 23, 'pad_token_id': 1,
    'projection_dim': 512, 'torch_dtype': 'float32',
    'transformers_version': '4.25.0.dev0', 'vocab_size': 49408}
XXL = {
    '_name_or_path': 'google/t5-v1_1-xxl', 'architectures': ['T5EncoderModel'],
    'classifier_dropout': 0.0, 'd_ff': 10240, 'd_kv': 64, 'd_model': 4096,
    'decoder_start_token_id': 0, 'dense_act_fn': 'gelu_new',
    'dropout_rate': 0.1, 'eos_token_id': 1, 'feed_forward_proj': 'gated-gelu',
    'initializer_factor': 1.0, 'is_encoder_decoder': True,
    'is_gated_act': True, 'layer_norm_epsilon': 1e-06, 'model_type': 't5',
    'num_decoder_layers': 24, 'num_heads': 64, 'num_layers': 24,
    'output_past': True, 'pad_token_id': 0,
    'relative_attention_max_distance': 128,
    'relative_attention_num_buckets': 32, 'tie_word_embeddings': False,
    'torch_dtype': 'bfloat16', 'transformers_version': '4.43.3',
    'use_cache': True, 'vocab_size': 32128}


@pytest.mark.parametrize('config, kind', [(SD2, keys.CLIP), (XXL, keys.T5)])
def test_published_configurations_are_taken(config, kind):
  keys.check(config, kind)


@pytest.mark.parametrize('make, tensors, numbers', [
    (lambda: ClipText(ClipTextConfig()), 196, 123_060_480),
    (lambda: ClipText(ClipTextConfig(
        width=1024, mlp_width=4096, layers=23, heads=16)), 372, 340_387_840),
    (lambda: t5_lib.T5(t5_lib.T5Config()), 219, 4_762_310_656)],
    ids=['CLIP-L', 'OpenCLIP-H, its last layer left out', 'T5-XXL'])
def test_sizes_of_the_published_encoders(make, tensors, numbers):
  leaves = jax.tree.leaves(abstract_text_encoder(make()))
  assert len(leaves) == tensors
  assert sum(math.prod(leaf.shape) for leaf in leaves) == numbers
