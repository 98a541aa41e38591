"""scheduler_config.json of flow matching, and FLUX without one.

FLUX.1, Stable Diffusion 3 and their relatives are published with this class.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from msfp_jax.convert import key_check
from msfp_jax.convert import key_values as kinds
from msfp_jax.diffusion import flow
from msfp_jax.diffusion.origin import FLOW
from msfp_jax.diffusion.origin import is_flow
from msfp_jax.diffusion.origin import Origin

CLASS = 'FlowMatchEulerDiscreteScheduler'
# Keys that become options of our sampler, with what they may be.
USED: dict[str, kinds.Kind] = {
    'shift': kinds.ABOVE_ZERO, 'use_dynamic_shifting': kinds.FLAG,
    'base_shift': kinds.or_none(kinds.number()),
    'max_shift': kinds.or_none(kinds.number()),
    'base_image_seq_len': kinds.WHOLE, 'max_image_seq_len': kinds.WHOLE,
    'time_shift_type': kinds.TEXT,
    'shift_terminal': kinds.or_none(kinds.number())}
# Keys with the values that our steps compute.
ONLY: dict[str, tuple[Any, ...]] = {
    '_class_name': (CLASS,), 'num_train_timesteps': (1000,),
    'invert_sigmas': (False,), 'use_karras_sigmas': (False, None),
    'use_exponential_sigmas': (False, None), 'use_beta_sigmas': (False, None),
    'stochastic_sampling': (False,)}
HARMLESS = frozenset({'_diffusers_version', '_name_or_path'})
KEYS = USED.keys() | ONLY.keys() | HARMLESS
_BY_TOKENS = dict(zip(
    ('base_shift', 'max_shift', 'base_image_seq_len', 'max_image_seq_len'),
    flow.FLUX_SHIFT, strict=True))
# t of pure noise, as the class counts.
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class FlowModel:
  """What a model of flow matching takes.

  Attributes:
    time: t of pure noise: 1 for models that take sigma.
    image_tokens: that it sees of an image; 0 where nobody knows.
    shifted: whether, without a file that says so, its noise levels are shifted
      by the size of the image, as FLUX.1-dev's are and -schnell's are not.
  """

  time: int = _STEPS
  image_tokens: int = 0
  shifted: bool = False


def read(given: Mapping[str, Any], source: str) -> Origin:
  """What the file says: a flow, its shift, and Euler's method.

  Args:
    given: the file.
    source: its name, for messages.

  Raises:
    ValueError: a key that is unknown, or a value that ours does not compute.
  """
  key_check.refuse('the sampler \'flow\'', key_check.wrong(given, USED))
  odd = key_check.odd(given, ONLY, KEYS)
  kind = given.get('time_shift_type', 'exponential')
  if kind not in flow.SHIFT_TYPES:
    odd.append(f'time_shift_type={kind!r} '
               f'({key_check.one_of(flow.SHIFT_TYPES)})')
  key_check.refuse('the sampler \'flow\'', odd)
  if given.get('use_dynamic_shifting', False):
    # By the size of the image; the class does not look at `shift` then.
    options = {'shift_by_tokens': [
        given.get(key, default) for key, default in _BY_TOKENS.items()],
               'shift_type': kind}
    if None in options['shift_by_tokens']:
      raise ValueError('base_shift and max_shift must be numbers where '
                       'use_dynamic_shifting is true')
  else:
    options = {'shift': float(given.get('shift', 1.0))}
  if given.get('shift_terminal'):
    options['shift_terminal'] = float(given['shift_terminal'])
  return _origin(source, options)


def of_model(described: Origin | None, model: FlowModel, source: str
             ) -> Origin:
  """What a model of flow matching says of its schedule and its sampler.

  Args:
    described: of `read`; None for a model without such a file, such as Black
      Forest Labs' own.
    model: what it takes.
    source: the checkpoint, for messages.

  Raises:
    ValueError: the file describes sampling of another kind.
  """
  if described is None:
    described = _origin(source, {'shift_by_tokens': list(flow.FLUX_SHIFT)}
                        if model.shifted else {'shift': 1.0})
  if not is_flow(described.schedule):
    raise ValueError(
        f'{described.source} is the scheduler of a model of the noise, and '
        f'this is one of flow matching, whose class is {CLASS}: they do not '
        'belong together')
  options = dict(described.options[FLOW])
  if model.image_tokens and 'shift_by_tokens' in options:
    options['image_tokens'] = model.image_tokens
  return dataclasses.replace(
      described, options={FLOW: options},
      schedule=dict(described.schedule) | {'num_train_steps': model.time})


def _origin(source, options):
  return Origin(source, {'name': FLOW, 'num_train_steps': _STEPS}, FLOW,
                {FLOW: {'spacing': 'uniform'} | options})
