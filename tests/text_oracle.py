"""CLIP's and T5's encoders in float64 NumPy, from transformers' own names.

`make parity` compares these with transformers itself.
"""

import json
import math

import numpy as np
import safetensors.numpy

CLIP = {'model_type': 'clip_text_model', 'architectures': ['CLIPTextModel'],
        'vocab_size': 99, 'hidden_size': 24, 'intermediate_size': 40,
        'num_hidden_layers': 2, 'num_attention_heads': 3,
        'max_position_embeddings': 11, 'hidden_act': 'quick_gelu',
        'layer_norm_eps': 1e-5, 'eos_token_id': 2, 'bos_token_id': 0,
        'pad_token_id': 1, 'projection_dim': 20}
T5 = {'model_type': 't5', 'architectures': ['T5EncoderModel'],
      'vocab_size': 99, 'd_model': 24, 'd_kv': 5, 'd_ff': 40, 'num_layers': 2,
      'num_heads': 4, 'feed_forward_proj': 'gated-gelu',
      'relative_attention_num_buckets': 8,
      'relative_attention_max_distance': 12, 'layer_norm_epsilon': 1e-6}


def clip_shapes(config):
  d, m = config['hidden_size'], config['intermediate_size']
  found = {'embeddings.token_embedding.weight': (config['vocab_size'], d),
           'embeddings.position_embedding.weight': (
               config['max_position_embeddings'], d)}
  for i in range(config['num_hidden_layers']):
    at = f'encoder.layers.{i}.'
    for name in 'qkv':
      found[f'{at}self_attn.{name}_proj.weight'] = (d, d)
    found |= {f'{at}self_attn.out_proj.weight': (d, d),
              f'{at}mlp.fc1.weight': (m, d), f'{at}mlp.fc2.weight': (d, m),
              f'{at}layer_norm1.weight': (d,), f'{at}layer_norm2.weight': (d,)}
  found['final_layer_norm.weight'] = (d,)
  biases = {name.removesuffix('weight') + 'bias': shape[:1]
            for name, shape in found.items() if 'embedding' not in name}
  return {'text_model.' + name: shape
          for name, shape in (found | biases).items()}


def t5_shapes(config):
  d, m = config['d_model'], config['d_ff']
  inner = config['num_heads'] * config['d_kv']
  gated = config['feed_forward_proj'].startswith('gated-')
  found = {'shared.weight': (config['vocab_size'], d),
           'encoder.final_layer_norm.weight': (d,),
           'encoder.block.0.layer.0.SelfAttention.relative_attention_bias'
           '.weight': (config['relative_attention_num_buckets'],
                       config['num_heads'])}
  for i in range(config['num_layers']):
    first, second = (f'encoder.block.{i}.layer.{j}.' for j in (0, 1))
    for name in 'qkv':
      found[f'{first}SelfAttention.{name}.weight'] = (inner, d)
    found[f'{first}SelfAttention.o.weight'] = (d, inner)
    for name in ('wi_0', 'wi_1') if gated else ('wi',):
      found[f'{second}DenseReluDense.{name}.weight'] = (m, d)
    found[f'{second}DenseReluDense.wo.weight'] = (d, m)
    found |= {f'{at}layer_norm.weight': (d,) for at in (first, second)}
  return found


def state_of(shapes, seed=0):
  """Random tensors, norms near 1 and biases away from 0."""
  rng = np.random.default_rng(seed)
  state = {}
  for name, shape in sorted(shapes.items()):
    scale = 0.3 if len(shape) < 2 else shape[1] ** -0.5
    state[name] = (scale * rng.standard_normal(shape) + (
        'norm' in name and name.endswith('weight'))).astype(np.float32)
  return state


def write(folder, config, state):
  """As transformers writes them: config.json and model.safetensors."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(state, folder / 'model.safetensors')
  return folder


def ids_of(length, highest=98, end=7):
  """Texts that end at different places, the rest of them padded."""
  rng = np.random.default_rng(1)
  ids = rng.integers(8, highest, (3, length)).astype(np.int32)
  for row, place in enumerate((1, length // 2, length - 1)):
    ids[row, place:] = highest
    ids[row, place] = (end, highest)[row % 2]
  return ids


def _erf_gelu(x):
  return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTIVATIONS = {
    'quick_gelu': lambda x: x / (1 + np.exp(-1.702 * x)), 'gelu': _erf_gelu,
    'gelu_new': lambda x: 0.5 * x * (1 + np.tanh(
        math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    'relu': lambda x: np.maximum(x, 0), 'silu': lambda x: x / (1 + np.exp(-x))}


def _attend(q, k, v, heads, bias, scale):
  split = lambda x: x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
  q, k, v = map(split, (q, k, v))
  scores = scale * q @ k.swapaxes(-1, -2) + bias
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  out = weights / weights.sum(-1, keepdims=True) @ v
  return out.transpose(0, 2, 1, 3).reshape(*out.transpose(0, 2, 1, 3).shape[:2],
                                           -1)


def clip(config, state, ids):
  """(hidden, pooled) of CLIPTextModel."""
  w = {name.removeprefix('text_model.'): value.astype(np.float64)
       for name, value in state.items()}

  def dense(name, x):
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

  def norm(name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config['layer_norm_eps'])
    return x * w[f'{name}.weight'] + w[f'{name}.bias']

  length = ids.shape[1]
  heads = config['num_attention_heads']
  scale = (config['hidden_size'] // heads) ** -0.5
  mask = np.where(np.tri(length), 0, -np.inf)
  h = (w['embeddings.token_embedding.weight'][ids]
       + w['embeddings.position_embedding.weight'][:length])
  for i in range(config['num_hidden_layers']):
    at = f'encoder.layers.{i}'
    x = norm(f'{at}.layer_norm1', h)
    q, k, v = (dense(f'{at}.self_attn.{name}_proj', x) for name in 'qkv')
    h = h + dense(f'{at}.self_attn.out_proj',
                  _attend(q, k, v, heads, mask, scale))
    x = dense(f'{at}.mlp.fc1', norm(f'{at}.layer_norm2', h))
    h = h + dense(f'{at}.mlp.fc2', ACTIVATIONS[config['hidden_act']](x))
  h = norm('final_layer_norm', h)
  end = config['eos_token_id']
  places = [int(np.argmax(row)) if end == 2 else row.tolist().index(end)
            for row in ids]
  return h, h[np.arange(len(ids)), places]


def t5_class(distance, buckets, far):
  """The class of one distance, of a token behind where it is above 0."""
  half = buckets // 2
  exact, size = half // 2, abs(distance)
  if size >= exact:
    size = min(half - 1, exact + math.floor(
        math.log(size / exact) / math.log(far / exact) * (half - exact) + 1e-6))
  return size + half * (distance > 0)


def t5(config, state, ids):
  """Hidden vectors of T5EncoderModel."""
  w = {name.removeprefix('encoder.'): value.astype(np.float64)
       for name, value in state.items()}

  def norm(name, x):
    return w[f'{name}.weight'] * x / np.sqrt(
        (x**2).mean(-1, keepdims=True) + config['layer_norm_epsilon'])

  dense = lambda name, x: x @ w[f'{name}.weight'].T
  name = config['feed_forward_proj']
  gated = name.startswith('gated-')
  act = ACTIVATIONS['gelu_new' if name == 'gated-gelu'
                    else name.removeprefix('gated-')]
  table = w['block.0.layer.0.SelfAttention.relative_attention_bias.weight']
  length = ids.shape[1]
  bias = np.array([[table[t5_class(
      k - q, config['relative_attention_num_buckets'],
      config['relative_attention_max_distance'])] for k in range(length)]
                   for q in range(length)]).transpose(2, 0, 1)
  h = w['shared.weight'][ids]
  for i in range(config['num_layers']):
    at = f'block.{i}.layer.0'
    x = norm(f'{at}.layer_norm', h)
    q, k, v = (dense(f'{at}.SelfAttention.{name}', x) for name in 'qkv')
    h = h + dense(f'{at}.SelfAttention.o',
                  _attend(q, k, v, config['num_heads'], bias, 1.0))
    at = f'block.{i}.layer.1'
    x = norm(f'{at}.layer_norm', h)
    at = f'{at}.DenseReluDense'
    x = (act(dense(f'{at}.wi_0', x)) * dense(f'{at}.wi_1', x) if gated
         else act(dense(f'{at}.wi', x)))
    h = h + dense(f'{at}.wo', x)
  return norm('final_layer_norm', h)
