"""Prompts of a run: read, encoded, and dealt out to images."""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import pathlib

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from msfp_jax.convert import hub
from msfp_jax.diffusion import conditions
from msfp_jax.models import denoiser
from msfp_jax.models import guided
from msfp_jax.run import teacher
from msfp_jax.text import embeddings as embeddings_lib
from msfp_jax.text import encode
from msfp_jax.text import letters
from msfp_jax.text import prompts as prompts_lib

_EMBEDDINGS = '.npz'
# The conditions of a model that are made of texts, in any order.
_TEXTS = {frozenset(axes): family
          for family, axes in embeddings_lib.FAMILIES.items()}
_GUIDANCE = 'guidance'


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """What the images of a run are made from.

  Image i is made from prompt i % P, and from noise of that prompt's seed and
  of how often the prompt was taken before, i // P, alone: which batch it is
  in, and which prompts stand beside it, is of no account.

  Attributes:
    texts: of the P prompts; empty where only their embeddings are known.
    seeds: uint32 `[P]`.
    tables: the model's conditions in the order of its arguments, NumPy arrays
      `[P, ...]`.
    digest: tells the prompts of one run from those of another.
  """

  texts: tuple[str, ...]
  seeds: np.ndarray
  tables: tuple[np.ndarray, ...]
  digest: str

  def __len__(self) -> int:
    return len(self.seeds)

  @property
  def draw(self) -> conditions.Draw:
    """Conditions at random, for calibration and fine-tuning."""
    return conditions.rows(self.tables)

  def batch(self, number: int, size: int
            ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Seeds `[B]`, rounds `[B]` and conditions of batch `number`, B = `size`.
    """
    rounds, rows = np.divmod(
        np.arange(number * size, (number + 1) * size), len(self))
    return (jnp.asarray(self.seeds[rows]), jnp.asarray(rounds, jnp.int32),
            tuple(jnp.asarray(table[rows]) for table in self.tables))

  def texts_of(self, count: int) -> list[str]:
    """Those of the first `count` images; empty where they are not known."""
    return [self.texts[i % len(self)] for i in range(count)
            ] if self.texts else []


def noise(seeds: jax.Array, rounds: jax.Array, shape: Sequence[int]
          ) -> jax.Array:
  """Noise that images start from, `[B, *shape]`.

  Args:
    seeds: uint32 `[B]`, of the images' prompts.
    rounds: int32 `[B]`, how often each prompt was taken before.
    shape: of a sample.
  """
  # normal(fold_in(key(seed), round), shape), whatever the batch.
  return jax.vmap(lambda seed, number: jax.random.normal(
      jax.random.fold_in(jax.random.key(seed), number), tuple(shape)))(
          seeds, rounds)


def check(config: ml_collections.ConfigDict) -> None:
  """Looks at the prompts of a config alone, before anything is loaded.

  Raises:
    ValueError, FileNotFoundError: see `read_prompts`, `load_embeddings`; or
      nothing encodes them, as a reference to the hub that is none.
  """
  if not config.prompts:
    if config.text_encoder or config.text_length:
      raise ValueError(
          f'config.text_encoder={config.text_encoder!r}, text_length='
          f'{config.text_length} without config.prompts: there is nothing to '
          'encode')
    return
  if not config.pretrained:
    raise ValueError(
        f'config.prompts={config.prompts} without config.pretrained: a teacher '
        'that is trained here takes no text')
  if config.text_length < 0:
    raise ValueError(f'config.text_length={config.text_length}: must be a '
                     'number of tokens, or 0 for what the tokenizer says')
  held = _read(config)
  if isinstance(held, embeddings_lib.Embeddings):
    if config.text_encoder or config.text_length:
      # A config of prompts names them, and whoever gives embeddings need not.
      logging.info(
          '%s holds embeddings: config.text_encoder and config.text_length, '
          'which are of texts, are of no account', config.prompts)
    return
  if not config.text_encoder:
    raise ValueError(
        f'config.prompts={config.prompts} are texts: set config.text_encoder '
        'to the folder with tokenizer and text_encoder (of FLUX tokenizer_2 '
        'and text_encoder_2 as well), or config.prompts to an .npz of '
        'embeddings')
  if hub.is_reference(config.text_encoder):
    hub.parse(config.text_encoder)
  elif config.text_encoder != teacher.RANDOM and not pathlib.Path(
      config.text_encoder).expanduser().is_dir():
    raise FileNotFoundError(
        f'no folder at {config.text_encoder}, which config.text_encoder names')


def _read(config):
  """The file's list of prompts, or its embeddings."""
  path = pathlib.Path(config.prompts).expanduser()
  if path.suffix == _EMBEDDINGS:
    return embeddings_lib.load_embeddings(path)
  return prompts_lib.read_prompts(path, config.seed)


def family_of(model: denoiser.Denoiser) -> str:
  """The family of `text.Embeddings` that a model takes; '' if no text.

  Raises:
    ValueError: it takes a text in a way that no encoder here gives, or labels
      beside it.
  """
  names = [part.name for part in model.conditions if part.classes is None]
  if not names:
    return ''
  family = _TEXTS.get(frozenset(names) - {_GUIDANCE})
  if family is None or len(names) < len(model.conditions):
    raise ValueError(
        f'the model takes {[part.name for part in model.conditions]}, and '
        f'prompts give {[sorted(names) for names in _TEXTS]}')
  return family


def check_model(model: denoiser.Denoiser,
                config: ml_collections.ConfigDict) -> str:
  """Whether prompts and guidance of a config are what a model takes.

  Returns:
    See `family_of`.

  Raises:
    ValueError: there are prompts and it takes none, or the other way round;
      or guidance that it does not have.
  """
  family = family_of(model)
  if config.prompts and not family:
    names = [part.name for part in model.conditions]
    raise ValueError(f'config.prompts={config.prompts}: the model takes '
                     f'{names or "no conditions"}, and no text; leave it out')
  if not family:
    return family
  if not config.prompts:
    names = ' and a '.join(f'{part.name} of width {part.shape[-1]}'
                           for part in model.conditions if part.shape)
    raise ValueError(
        f'the model takes a {names}, made of texts: set config.prompts to a '
        'file of prompts (.txt, .jsonl) or of embeddings (.npz)')
  scale = config.guidance.scale
  if config.guidance.null_class:
    raise ValueError('config.guidance.null_class: the model takes texts, and '
                     'no classes; leave it at False')
  takes = any(part.name == _GUIDANCE for part in model.conditions)
  if family == 'flux' and scale != 1.0 and not takes:
    raise ValueError(
        f'config.guidance.scale={scale}: this transformer takes no guidance '
        '(as FLUX.1-schnell, which needs none); leave it at 1.0')
  return family


def load(model: denoiser.Denoiser, config: ml_collections.ConfigDict
         ) -> tuple[denoiser.Denoiser, Prompts]:
  """The model as it is sampled from with prompts, and these, encoded.

  A model of one context is guided where config.guidance.scale says so, against
  each prompt's negative one, which is empty if none is given. A model that
  takes the strength of guidance is given it.

  Args:
    model: for which `check_model` has found the family.
    config: of the run.

  Raises:
    ValueError, FileNotFoundError: see `encode.load_encoders`; or embeddings
      that are not what the model takes.
  """
  family = check_model(model, config)
  scale = config.guidance.scale
  guides = family == 'stable_diffusion' and scale != 1.0
  held = _read(config)
  if isinstance(held, embeddings_lib.Embeddings):
    texts, seeds = (), config.seed + np.arange(len(held))
    digest = _digest(seeds, *held.conditions.values(),
                     *(held.negative or {}).values())
  else:
    texts, seeds = tuple(one.prompt for one in held), [
        one.seed for one in held]
    negative = [one.negative_prompt for one in held]
    digest = hashlib.sha256(json.dumps(
        [texts, negative, seeds]).encode()).hexdigest()[:16]
    if any(negative) and not guides:
      logging.warning('negative prompts are of no account: this model is '
                      'sampled without guidance against a text')
    held = _encode(model, config, texts, negative if guides else None)
  tables = _tables(model, family, held, guides)
  for part in model.conditions:
    if part.name == _GUIDANCE:
      tables += (np.full(len(held), scale, np.float32),)
  return guided.GuidedByText(model, scale) if guides else model, Prompts(
      texts, np.asarray(seeds, np.uint32), tables, digest)


def _digest(*arrays):
  found = hashlib.sha256()
  for array in arrays:
    found.update(str((array.shape, array.dtype)).encode())
    found.update(np.ascontiguousarray(array).data)
  return found.hexdigest()[:16]


def _encode(model, config, texts, negative):
  """Embeddings of texts; the encoders are gone after it."""
  length = config.text_length or None
  if config.text_encoder == teacher.RANDOM:
    widths = {part.name: part.shape[-1] for part in model.conditions
              if part.shape}
    encoders = letters.random_encoders(widths, config.seed, length)
  else:
    encoders = encode.load_encoders(config.text_encoder, length)
  encoders = encoders.with_loras(config.loras)
  logging.info('encoding %d prompts', len(texts))
  return encode.encode_prompts(encoders, texts, negative)


def _tables(model, family, held, guides):
  """The model's conditions, each looked at, of what encoders or a file gave."""
  if held.family != family:
    raise ValueError(
        f'config.prompts and config.text_encoder give the conditions of '
        f'{held.family}, {list(held.conditions)}, and the model takes those '
        f'of {family}, {list(embeddings_lib.FAMILIES[family])}')
  if guides and held.negative is None:
    raise ValueError(
        'config.guidance.scale: guidance needs what it leads away from, and '
        "the embeddings hold no 'negative_context'; add it (that of an empty "
        'prompt), or set config.guidance.scale=1.0')
  found = []
  for part in model.conditions:
    if part.name not in held.conditions:
      continue
    sides = [held.conditions[part.name]]
    if guides:
      sides.append(held.negative[part.name])
      if sides[0].shape != sides[1].shape:
        raise ValueError(
            f'{part.name} has shape {sides[0].shape}, and what guidance leads '
            f'away from {sides[1].shape}: must be the same')
    if sides[0].shape[-1] != part.shape[-1]:
      raise ValueError(
          f'{part.name} of the prompts has width {sides[0].shape[-1]}, and the '
          f'model takes {part.shape[-1]}: they are of another model\'s '
          'encoder')
    found += sides
  return tuple(found)
