"""Origin: the schedule and the sampler that a checkpoint was made for.

A model is trained on one noise schedule and published with a sampler. Both are
the defaults of a run on it; what a user types goes before, field by field.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from absl import logging
import numpy as np

from msfp_jax import diffusion
from msfp_jax.diffusion.plan import SamplerPlan
from msfp_jax.diffusion.schedules import FlowSchedule
from msfp_jax.diffusion.schedules import make_schedule
from msfp_jax.diffusion.schedules import NoiseSchedule
from msfp_jax.diffusion.schedules import Schedule
from msfp_jax.diffusion.schedules import WITHOUT_BETAS

# Values of the fields of config.schedule and config.sampler that say nothing.
UNSET_SCHEDULE = {'name': '', 'num_train_steps': 0, 'beta_start': 0.0,
                  'beta_end': 0.0}
UNSET_SAMPLER = {'name': '', 'spacing': '', 'convention': '', 'offset': -1,
                 'clip': -1.0, 'variance': '', 'shift': 0.0,
                 'shift_by_tokens': (), 'image_tokens': 0, 'shift_type': '',
                 'shift_terminal': -1.0}
# Of models that are trained here, or say nothing: DDPM's (Ho et al. 2020).
SCHEDULE = {'name': 'linear', 'num_train_steps': 1000, 'beta_start': 1e-4,
            'beta_end': 0.02}
SAMPLER = 'ddim'
# Of flow matching, by its name as a schedule and as a sampler.
FLOW = 'flow'
# Of Origin's fields, in JSON.
_TYPES = {'source': str, 'schedule': dict, 'sampler': str, 'options': dict,
          'refused': dict, 'predicts': str}


@dataclasses.dataclass(frozen=True)
class Origin:
  """What a checkpoint says of its schedule and its sampler.

  Attributes:
    source: the file that says so, for messages; '' where there is none.
    schedule: options of `make_schedule`; or {'betas': all of them}; empty where
      nothing tells.
    sampler: the checkpoint's own, of `make_plan`; '' if that is none of ours.
    options: {sampler: its options}, also of those that are not its own.
    refused: {sampler: why it cannot be had from this checkpoint}, '' for its
      own where that is none of ours.
    predicts: of `models.prediction.KINDS`: the noise, v or x_0. 'eps' of flow
      matching too: what its sampler steps by is what the model predicts.

  Raises:
    ValueError: it predicts v or x_0 of no noise schedule.
  """

  source: str = ''
  schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sampler: str = SAMPLER
  options: Mapping[str, Mapping[str, Any]] = dataclasses.field(
      default_factory=dict)
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  predicts: str = 'eps'

  def __post_init__(self):
    if self.predicts != 'eps' and is_flow(self.schedule):
      raise ValueError(f'predicts={self.predicts!r}: models of flow matching '
                       'predict its velocity, which needs no schedule')

  def to_json(self) -> str:
    """For the headers of files; every number survives."""
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> 'Origin':
    """The inverse. Raises TypeError or ValueError for what it is not."""
    found = cls(**json.loads(text))
    for field, kind in _TYPES.items():
      value = getattr(found, field)
      if not isinstance(value, kind):
        raise TypeError(f'{field} is {value!r}, no {kind.__name__}')
    if odd := [name for name, options in found.options.items()
               if not isinstance(options, dict)]:
      raise TypeError(f'options of {odd} are no objects')
    return found

  def noise_schedule(self) -> Schedule:
    """The schedule that the model was trained on, as far as is known."""
    if 'betas' in self.schedule:
      return NoiseSchedule(np.asarray(self.schedule['betas'], np.float64))
    return make_schedule(**(self.schedule or SCHEDULE))


def is_flow(schedule: Mapping[str, Any]) -> bool:
  """Whether fields of a schedule are those of flow matching."""
  return isinstance(schedule, Mapping) and schedule.get('name') == FLOW


def trained_on(schedule: Mapping[str, Any]) -> Origin:
  """What a model that is trained here says: its schedule, and a sampler."""
  return Origin(schedule=schedule,
                sampler=FLOW if is_flow(schedule) else SAMPLER)


@dataclasses.dataclass(frozen=True)
class Chosen:
  """A schedule and a sampler, and what they were made of.

  Attributes:
    schedule: of the forward process.
    plan: the sampler.
    schedule_fields: {field: value} of the schedule.
    sampler_fields: {field: value} of the sampler, `name` among them.
  """

  schedule: Schedule
  plan: SamplerPlan
  schedule_fields: Mapping[str, Any]
  sampler_fields: Mapping[str, Any]


def choose(origin: Origin, schedule: Mapping[str, Any],
           sampler: Mapping[str, Any]) -> Chosen:
  """What was typed, and for the rest what the checkpoint says.

  Args:
    origin: of the checkpoint; Origin() where there is none.
    schedule: fields of config.schedule; those of UNSET_SCHEDULE say nothing.
    sampler: of config.sampler, likewise.

  Raises:
    ValueError: the checkpoint's sampler is none of ours and none was typed; or
      what was typed contradicts the checkpoint, or is no schedule or sampler.
  """
  typed = _typed(schedule, UNSET_SCHEDULE)
  fields = _schedule_fields(origin, typed)
  _log('schedule', origin, origin.schedule, fields, typed)
  made = (NoiseSchedule(np.asarray(fields['betas'], np.float64))
          if 'betas' in fields else make_schedule(**fields))
  _check_kind(origin, made)
  if origin.predicts != 'eps' and not np.array_equal(
      made.betas, origin.noise_schedule().betas):
    raise ValueError(
        f'the model predicts {origin.predicts}, which has a meaning on its own '
        f'schedule alone, that of {origin.source}: leave config.schedule out')
  typed = _typed(sampler, UNSET_SAMPLER)
  name = typed.get('name') or origin.sampler
  if 'name' not in typed and not origin.schedule and is_flow(fields):
    name = FLOW  # typed over a model of which nothing is known
  if why := origin.refused.get(name):
    raise ValueError(f'{origin.source}: {why}')
  said = dict(origin.options.get(name, {}))
  own = dict(said)
  if typed.get('convention', own.get('convention')) != own.get('convention'):
    own.pop('offset', None)  # a convention has its own
  if 'shift' in typed:  # in place of one by the size of the image
    own.pop('shift_by_tokens', None)
  options = own | {field: value for field, value in typed.items()
                   if field != 'name'}
  _log('sampler', origin, {'name': origin.sampler} | said,
       {'name': name} | options, typed)
  return Chosen(made, diffusion.make_plan(made, name, **options), fields,
                {'name': name} | diffusion.sampler_defaults(name) | options)


def _check_kind(origin, made):
  """Raises ValueError for a schedule of another kind than the checkpoint's."""
  flow = isinstance(made, FlowSchedule)
  if origin.schedule and is_flow(origin.schedule) != flow:
    kinds = ['the noise on a noise schedule', 'the velocity of flow matching']
    raise ValueError(
        f'{origin.source or "the model"} predicts {kinds[not flow]}, and '
        f'config.schedule asks for {kinds[flow]}: leave config.schedule out')


def _typed(fields, unset):
  return {field: value for field, value in dict(fields).items()
          if field not in unset or value != unset[field]}


def _schedule_fields(origin, typed):
  """The checkpoint's fields under those that were typed."""
  own = dict(origin.schedule)
  if 'betas' in own:
    if typed and typed.keys() != UNSET_SCHEDULE.keys():
      raise ValueError(
          f'{origin.source} has the betas of its schedule one by one: to take '
          f'another, set all of config.schedule, not {sorted(typed)} alone')
    return typed or own
  # An offset is the cosine's alone, and betas are what it has not.
  if typed.get('name', own.get('name')) != own.get('name'):
    own.pop('offset', None)
  fields = SCHEDULE | own | typed
  if fields['name'] in WITHOUT_BETAS:
    betas = {'beta_start', 'beta_end'}
    if odd := sorted(betas & typed.keys()):
      raise ValueError(
          f'config.schedule.{odd[0]}={typed[odd[0]]}: the {fields["name"]} '
          'schedule has no betas to choose; leave it out, or set '
          'config.schedule.name as well')
    fields = {key: value for key, value in fields.items() if key not in betas}
  return fields


def _log(what, origin, own, fields, typed):
  """Says what a run takes, whose it is, and what else the checkpoint has."""
  text = lambda values: ', '.join(
      f'{name}={_short(value)}' for name, value in values.items())
  logging.info('%s: %s', what, text(fields))
  if not origin.source:
    return
  if not own:
    logging.warning('nothing tells the %s of %s: took %s', what, origin.source,
                    text(fields))
    return
  logging.info('%s of %s: %s', what, origin.source, text(own))
  other = [f'{name}={_short(value)} in place of {_short(own[name])}'
           for name, value in typed.items()
           if name in own and value != own[name]]
  if other:
    logging.warning('%s: as typed, %s of %s', what, ', '.join(other),
                    origin.source)


def _short(value):
  return (f'[{len(value)} numbers]' if isinstance(value, list | tuple)
          else value)
