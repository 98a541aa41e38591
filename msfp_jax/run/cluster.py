"""The processes of a run, and the mesh of their devices."""

import dataclasses
import re

import jax
import ml_collections

from msfp_jax.base import arguments
from msfp_jax.base import devices

AUTO = 'auto'
# After what JAX says when an exchange between processes fails.
_LOST = ('This process and the others of its run no longer reach each other: '
         'the log of the one that ended first says why. Start all of them '
         'again; the run goes on from its last checkpoint')
# How it says so, in errors of several types: by a status of XLA's and by what
# exchanges.
_STATUS = re.compile(
    r'\b(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|'
    r'UNAVAILABLE|UNKNOWN): .*(gloo|nccl|barrier|coordination|heartbeat)',
    re.IGNORECASE | re.DOTALL)
_HEARTBEAT = 30  # seconds without a word, after which a process counts as lost


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """How many processes a run has, and how its devices share the work.

  Attributes:
    model: devices that share the large weights among them; the rest of the
      devices split batches.
    coordinator: '' for one process; AUTO where JAX finds the others by itself
      (TPU pods; SLURM and Open MPI, with a process for each GPU); or HOST:PORT
      of the first process, and then:
    num_processes: in all.
    process_id: of this one, from 0.
    memory: gigabytes that a step may need of each device; 0: what is free.

  Raises:
    ValueError: fields that do not go together.
  """

  model: int
  coordinator: str
  num_processes: int
  process_id: int
  memory: float

  def __post_init__(self):
    arguments.check_fields('config.mesh', self, {
        'model': arguments.COUNT, 'num_processes': arguments.COUNT_OR_NONE,
        'memory': arguments.RATE})
    named = self.coordinator not in ('', AUTO)
    given = bool(self.num_processes) or self.process_id != -1
    if named and not 0 <= self.process_id < self.num_processes:
      raise ValueError(
          f'config.mesh: coordinator={self.coordinator!r} needs num_processes '
          'and process_id, from 0 to one less; got '
          f'num_processes={self.num_processes}, process_id={self.process_id}')
    if named and not self.coordinator.rpartition(':')[2].isdecimal():
      raise ValueError(f'config.mesh.coordinator={self.coordinator!r}: must be '
                       f"HOST:PORT, {AUTO!r}, or '' for one process")
    if given and not named:
      raise ValueError(
          'config.mesh: num_processes and process_id are for a coordinator '
          f'HOST:PORT; with coordinator={self.coordinator!r} leave them out')


def join(config: ml_collections.ConfigDict) -> None:
  """Makes this process one of a run's; before JAX is used in any other way.

  Raises:
    ValueError: see `MeshSettings`.
    OSError: the other processes do not come.
  """
  settings = MeshSettings(**config.mesh)
  if not settings.coordinator:
    return
  given = {}
  if settings.coordinator != AUTO:
    given = {'coordinator_address': settings.coordinator,
             'num_processes': settings.num_processes,
             'process_id': settings.process_id,
             # Under SLURM it would leave each process one GPU.
             'cluster_detection_method': 'deactivate'}
  # CPUs exchange by gloo, which other devices do not look at.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # It would take SIGTERM away from training, and elsewhere from everybody.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
        **given, heartbeat_timeout_seconds=_HEARTBEAT)
  except (RuntimeError, ValueError) as error:
    raise OSError(
        f'config.mesh.coordinator={settings.coordinator!r}: the processes of '
        f'this run do not find each other ({error}); start all of them with '
        'the same coordinator and num_processes') from error


def lost(error: BaseException) -> str:
  """What to say of an error where an exchange between processes failed.

  Returns:
    Its first line, and what to do; '' of other errors.
  """
  text = str(error)
  if not _STATUS.search(text):
    return ''
  return f'{text.splitlines()[0]}\n{_LOST}'


def is_joined() -> bool:
  """Whether this process is one of several."""
  return jax.distributed.is_initialized()


def memory(config: ml_collections.ConfigDict) -> float:
  """Bytes of each device by config.mesh; 0: as the device says."""
  return MeshSettings(**config.mesh).memory * 1e9


def layout(config: ml_collections.ConfigDict) -> devices.Layout:
  """The layout that config.mesh asks for; ValueError if devices lack."""
  return devices.layout(MeshSettings(**config.mesh).model)
