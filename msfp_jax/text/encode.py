"""Prompts to conditions, by the encoders in a pipeline's folder."""

from collections.abc import Callable, Collection, Sequence
import dataclasses
import functools
import pathlib
from pathlib import PurePosixPath
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import convert
from msfp_jax.convert import hub
from msfp_jax.convert import text_encoder
from msfp_jax.models.clip_text import ClipText
from msfp_jax.models.t5 import T5
from msfp_jax.text import backends
from msfp_jax.text.embeddings import Embeddings
from msfp_jax.text.tokenizer import check_texts
from msfp_jax.text.tokenizer import load_tokenizer
from msfp_jax.text.tokenizer import READ
from msfp_jax.text.tokenizer import Tokenizer

_KINDS = {ClipText: backends.CLIP, T5: backends.T5}
_SAID = {backends.CLIP: "CLIP's", backends.T5: "T5's"}
_AT_ONCE = 8  # prompts


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
  """An encoder with its tokenizer.

  Attributes:
    tokenizer: what makes its tokens.
    model: a `ClipText` or a `T5`.
    params: its parameters.

  Raises:
    ValueError: the tokenizer does not belong to the model, see `check`.
  """

  tokenizer: Tokenizer
  model: nn.Module
  params: Any

  def __post_init__(self):
    check(self.tokenizer, self.model)

  @functools.cached_property
  def _apply(self) -> Callable[..., Any]:
    return jax.jit(self.model.apply)

  def __call__(self, prompts: Sequence[str], at_once: int = _AT_ONCE
               ) -> tuple[Any, int]:
    """Encodes prompts, each different one once.

    Args:
      prompts: B texts.
      at_once: how many of them go through the encoder together.

    Returns:
      What the model returns, `[B, ...]` as NumPy arrays, and how many of the
      prompts were cut.
    """
    check_texts(prompts)
    places = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    ids, _, cut = self.tokenizer(list(places))
    count = min(at_once, len(ids))
    parts = []
    for first in range(0, len(ids), count):
      part = ids[first:first + count]
      # All of one number, so that it is compiled once.
      padded = np.pad(part, ((0, count - len(part)), (0, 0)))
      out = self._apply({'params': self.params}, jnp.asarray(padded))
      parts.append(jax.tree.map(np.asarray, out))
    rows = [places[text] for text in prompts]
    return (jax.tree.map(lambda *some: np.concatenate(some)[rows], *parts),
            int(cut[rows].sum()))


def check(tokenizer: Tokenizer, model: nn.Module, pools: bool = False
          ) -> None:
  """Checks that a tokenizer is the one of an encoder, as far as both tell.

  Args:
    tokenizer: of the texts.
    model: a `ClipText` or a `T5`.
    pools: whether the pooled vector is taken, for which the encoder must find
      the end of a text.

  Raises:
    ValueError: it is of another kind, has tokens that the encoder does not
      know, gives more than it takes, or ends texts with another token.
  """
  kind, config = _KINDS[type(model)], model.config
  name = tokenizer.source
  if tokenizer.kind != kind:
    raise ValueError(f'{name} is {_SAID[tokenizer.kind]} tokenizer, and the '
                     f'encoder is {_SAID[kind]}')
  problems = []
  if tokenizer.vocab_size > config.vocab_size:
    problems.append(f'it has {tokenizer.vocab_size} tokens, and the embedding '
                    f'{config.vocab_size}')
  if kind == backends.CLIP and tokenizer.length > config.length:
    problems.append(f'it gives {tokenizer.length} tokens, and the encoder '
                    f'takes {config.length}')
  if pools:
    wanted = (tokenizer.vocab_size - 1 if config.eos_id is None
              else config.eos_id)
    if tokenizer.eos_id != wanted:
      problems.append(f'it ends texts with {tokenizer.eos_id}, and the encoder '
                      f'looks for {wanted}')
  if problems:
    raise ValueError(f'{name} does not belong to the encoder: '
                     + '; '.join(problems))


@dataclasses.dataclass(frozen=True, eq=False)
class Encoders:
  """The text encoders of a pipeline.

  Attributes:
    clip: CLIP's; of Stable Diffusion 1 and 2 the only one.
    t5: T5's, of FLUX; None of Stable Diffusion.
  """

  clip: TextEncoder
  t5: TextEncoder | None = None

  def with_loras(self, loras: Sequence[tuple[str, float]]) -> 'Encoders':
    """The encoders with what LoRAs have for them merged into their weights.

    Args:
      loras: (file, as of `convert.load_lora`, strength); those that have
        nothing for a text encoder change none.

    Raises:
      As `convert.load_lora`.
    """
    return Encoders(*(
        None if encoder is None else _merged(encoder, loras)
        for encoder in (self.clip, self.t5)))


def _merged(encoder, loras):
  found = [(convert.load_lora(file, encoder.model), strength)
           for file, strength in loras
           if convert.holds_lora(file, encoder.model)]
  return dataclasses.replace(
      encoder, params=convert.merge_loras(encoder.params, found))


def load_encoders(path: str | pathlib.Path, length: int | None = None
                  ) -> Encoders:
  """Loads the encoders in a pipeline's folder of diffusers.

  All is looked at before weights are read; weights of half precision stay in
  their type.

  Args:
    path: a folder with `tokenizer` and `text_encoder`, and for FLUX with
      `tokenizer_2` and `text_encoder_2`; or one in the Hugging Face Hub, of
      which these alone are downloaded (see `hub`).
    length: of T5's texts, in tokens; by default as its tokenizer says, 512 of
      FLUX's; FLUX.1-schnell was trained with 256.

  Raises:
    FileNotFoundError: parts that are absent.
    ValueError: encoders that are none of Stable Diffusion 1 or 2 or of FLUX,
      files that are refused (see `load_text_encoder`, `load_tokenizer`), or a
      tokenizer that does not belong to its encoder.
  """
  if hub.is_reference(path):
    path = hub.fetch_files(
        str(path), functools.partial(_wanted, str(path)))
  path = pathlib.Path(path).expanduser()
  if not path.is_dir():
    raise FileNotFoundError(f'no folder of a pipeline at {path}')
  ends = _ends(str(path), lambda part: (path / part).is_dir())
  # FLUX alone takes CLIP's pooled vector.
  opened = [_open(path, '', ClipText, None, pools=len(ends) == 2)]
  if len(ends) == 2:
    opened.append(_open(path, '_2', T5, length))
  return Encoders(*(TextEncoder(tokenizer, model, read(True))
                    for tokenizer, model, read in opened))


def _ends(name: str, has: Callable[[str], bool]) -> tuple[str, ...]:
  """What stands behind the names of a pipeline's parts: of one encoder or two.

  Args:
    name: of the pipeline, for messages.
    has: whether it has a folder of this name.
  """
  if has('text_encoder_3'):
    raise ValueError(f'{name} has three text encoders: those of Stable '
                     'Diffusion 1 and 2 (CLIP) and of FLUX (CLIP and T5) are '
                     'known')
  ends = ('', '_2') if has('text_encoder_2') else ('',)
  parts = [part + end for end in ends for part in ('tokenizer', 'text_encoder')]
  if absent := [part for part in parts if not has(part)]:
    raise FileNotFoundError(f'{name} lacks {absent} of a pipeline of diffusers')
  return ends


def _wanted(text: str, path: str, names: Collection[str]) -> list[str]:
  """Of a repository's files those that `load_encoders` reads."""
  folder, found = PurePosixPath(path), []
  inside = {}
  for name in names:
    inside.setdefault(PurePosixPath(name).parent, []).append(name)
  for end in _ends(text, lambda part: folder / part in inside):
    encoder, tokens = folder / f'text_encoder{end}', folder / f'tokenizer{end}'
    found.append(str(hub.weights_in(text, str(encoder), names)))
    found += [name for name in inside[encoder]
              if name == str(encoder / 'config.json')]
    found += [name for name in inside[tokens]
              if PurePosixPath(name).name in READ]
  return sorted(found)


def _open(path, end, wanted, length, pools=False):
  folder = path / f'text_encoder{end}'
  model, read = text_encoder.open_text_encoder(folder)
  if not isinstance(model, wanted):
    raise ValueError(
        f'{folder} is {_SAID[_KINDS[type(model)]]}, must be '
        f'{_SAID[_KINDS[wanted]]}: of Stable Diffusion 1 and 2 (CLIP) and of '
        'FLUX (CLIP, then T5) alone the encoders are put together here')
  most = model.config.length if wanted is ClipText else None
  tokenizer = load_tokenizer(path / f'tokenizer{end}', length, most)
  check(tokenizer, model, pools)
  return tokenizer, model, read


def encode_prompts(encoders: Encoders, prompts: Sequence[str],
                   negative: Sequence[str] | str | None = None) -> Embeddings:
  """Makes the conditions of images from prompts.

  Of Stable Diffusion `context`: CLIP's last hidden vectors after the final
  norm (in 2's folders the encoder's last layer is left out, so that these are
  the last but one). Of FLUX `text`, T5's hidden vectors, and `pooled`, CLIP's
  at the end of the text. No padding is masked, as in their pipelines.

  Args:
    encoders: of the pipeline.
    prompts: B texts.
    negative: what guidance leads away from, one text for all or one for each;
      '' is what it mostly is. None: no guidance.

  Raises:
    TypeError: a single text in place of a list.
    ValueError: no prompts, or another number of negative ones.
  """
  check_texts(prompts)
  if not len(prompts):
    raise ValueError('no prompts: at least one is needed')
  if isinstance(negative, str):
    negative = [negative] * len(prompts)
  if negative is not None and len(negative) != len(prompts):
    raise ValueError(f'{len(negative)} negative prompts for {len(prompts)} '
                     'prompts: must be one text, or one for each')
  texts = [*prompts, *(negative or ())]
  output, cut = encoders.clip(texts)
  if encoders.t5 is None:
    family, found = 'stable_diffusion', {'context': output.hidden}
  else:
    text, cut = encoders.t5(texts)
    family, found = 'flux', {'text': text, 'pooled': output.pooled}
  count = len(prompts)
  return Embeddings(
      family, {name: value[:count] for name, value in found.items()},
      None if negative is None else {
          name: value[count:] for name, value in found.items()}, cut)
