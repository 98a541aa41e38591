"""Small random encoders whose tokens are letters, to try whether all runs.

For runs of models that are random too: nothing is read, and nothing that they
encode means anything. Tokenizers are made as files and read as published ones
are.
"""

from collections.abc import Mapping
import json
import pathlib
import string
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.models import clip_text
from msfp_jax.models import t5
from msfp_jax.text import backends
from msfp_jax.text import encode
from msfp_jax.text import tokenizer as tokenizer_lib

_LENGTH = 64  # of texts, in tokens
_LETTERS = string.ascii_lowercase + string.digits + string.punctuation
_SPACE = '▁'


def random_encoders(widths: Mapping[str, int], seed: int,
                    length: int | None = None) -> encode.Encoders:
  """Encoders that give what a model takes.

  Args:
    widths: {condition: width}: `context`, or `text` and `pooled`.
    seed: of the parameters.
    length: of the texts of `text`, in tokens; 64 if None.

  Raises:
    ValueError: the library `tokenizers` is not installed.
  """
  if 'context' in widths:
    return encode.Encoders(_clip(widths['context'], seed))
  return encode.Encoders(_clip(widths['pooled'], seed),
                         _t5(widths['text'], seed + 1, length or _LENGTH))


def _clip(width, seed):
  letters = [*_LETTERS, *(letter + '</w>' for letter in _LETTERS)]
  named = backends.NAMED[backends.CLIP]
  tokens = [*letters, named['bos_token'], named['eos_token']]
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / 'vocab.json').write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    tokenizer = tokenizer_lib.load_tokenizer(folder, _LENGTH)
  return _encoder(tokenizer, clip_text.ClipText(clip_text.ClipTextConfig(
      vocab_size=len(tokens), width=width, mlp_width=2 * width, layers=1,
      heads=1, length=_LENGTH, eos_id=len(tokens) - 1)), seed)


def _t5(width, seed, length):
  tokenizers, named = (
      backends.import_tokenizers(), backends.NAMED[backends.T5])
  end, unknown = named['eos_token'], named['unk_token']
  pieces = [named['pad_token'], end, unknown, _SPACE, *_LETTERS]
  backend = tokenizers.Tokenizer(tokenizers.models.Unigram(
      [(piece, -1.0) for piece in pieces], unk_id=2, byte_fallback=False))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(_SPACE)
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=f'$A {end}', special_tokens=[(end, pieces.index(end))])
  with tempfile.TemporaryDirectory() as folder:
    backend.save(f'{folder}/tokenizer.json')
    tokenizer = tokenizer_lib.load_tokenizer(folder, length)
  return _encoder(tokenizer, t5.T5(t5.T5Config(
      vocab_size=len(pieces), width=width, head_width=4, heads=2, layers=1,
      mlp_width=2 * width)), seed)


def _encoder(tokenizer, model: nn.Module, seed) -> encode.TextEncoder:
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  rng = np.random.default_rng(seed)

  def draw(leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    # Norms' scales and biases near 1; products that keep variances.
    return jnp.asarray(1 + 0.2 * noise if noise.ndim == 1
                       else noise / np.sqrt(leaf.shape[0]))

  return encode.TextEncoder(tokenizer, model, jax.tree.map(draw, shapes))
