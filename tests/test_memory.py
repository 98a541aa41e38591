"""What a step needs of memory: said before it runs, refused where it lacks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.base import devices
from msfp_jax.base import errors
from msfp_jax.tune import memory
from msfp_jax.tune import remat
from msfp_jax.tune import step as step_lib

DATA = jnp.ones((500, 1000))  # 2 MB
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
STATE = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)  # 4 MB


@functools.partial(jax.jit, donate_argnums=0)
def update(state, data):
  # The product of 20 MB is needed at once: of its sorted rows each is used.
  wide = jnp.tile(data, (10, 1)) @ state
  return state + jnp.sort(wide, axis=0)[:1000], {'loss': wide.max()}


def make_step():
  return step_lib.Step(update, lambda state: (DATA,), (DATA,))


def test_what_a_program_needs_is_counted_once():
  need = memory.need_of(make_step().compile(STATE))
  # The state, which the result takes the place of, and the data.
  assert need.kept == pytest.approx(6e6, rel=0.01)
  assert 20e6 <= need.temporary < 90e6
  assert str(need).startswith(
      f'{need.total / 1e9:.3g} GB of each device: 0.006 GB of weights')


def test_a_step_that_fits_is_compiled_once(caplog, monkeypatch):
  step = make_step()
  with caplog.at_level('INFO', 'absl'):
    memory.check('toy', step, STATE, limit=1e9)
  assert 'toy: a step needs 0.0' in caplog.text
  assert '; there are 1 GB' in caplog.text

  def never(*unused):
    raise AssertionError('compiled again')

  # What runs is what was asked about.
  expected, _ = update(jnp.ones((1000, 1000)), DATA)
  monkeypatch.setattr(jax.stages.Lowered, 'compile', never)
  found, scalars = step(jnp.ones((1000, 1000)))
  np.testing.assert_array_equal(found, expected)
  assert scalars['loss'] > 0


@dataclasses.dataclass(frozen=True)
class Settings:
  batch_size: int = 12
  accumulate: int = 1
  remat: str = 'none'


def sized(settings):
  """A step that needs a tenth of a megabyte for each row at once."""
  rows = settings.batch_size // settings.accumulate
  size = 25_000 * rows if settings.remat == 'none' else 12_500 * rows

  def toy(state):
    values = jnp.sin(jnp.arange(float(size)) + state)
    return state + jnp.sort(values)[0], {}

  return step_lib.Step(jax.jit(toy), lambda state: (), ())


def remedies(settings):
  return memory.remedies('toy', settings, devices.layout(), sized)


def need(**changes):
  step = sized(dataclasses.replace(Settings(), **changes))
  return memory.need_of(step.compile(SCALAR)).total


def test_remedies_begin_with_what_costs_the_least_time():
  assert [remedy.flags for remedy in remedies(Settings(accumulate=2))] == [
      '--config.toy.remat=products', '--config.toy.remat=blocks', *(
          f'{more}--config.toy.accumulate={count}' for count in (3, 4, 6, 12)
          for more in ('', '--config.toy.remat=blocks '))]
  assert [remedy.flags for remedy in remedies(
      Settings(batch_size=4, remat='blocks'))] == [
          '--config.toy.accumulate=2', '--config.toy.accumulate=4']


@pytest.mark.parametrize('fits, flags', [
    ({'remat': 'products'}, '--config.toy.remat=products'),
    ({'remat': 'blocks', 'accumulate': 3},
     '--config.toy.remat=blocks --config.toy.accumulate=3')], ids=str)
def test_a_step_that_does_not_fit_is_refused_with_flags_that_make_it(
    fits, flags):
  limit, step = need(**fits), sized(Settings())
  with pytest.raises(errors.MemoryLackError) as caught:
    memory.check('toy', step, SCALAR, limit=limit,
                 remedies=remedies(Settings()))
  said = str(caught.value)
  assert said.startswith(f'toy: a step needs {need() / 1e9:.3g} GB of each')
  assert f'and {limit / 1e9:.3g} GB are there' in said
  assert f'It fits with {flags} ({limit / 1e9:.3g} GB)' in said


def test_a_model_without_blocks_is_told_of_parts_alone():
  def build(settings):
    step = sized(settings)
    if settings.remat != 'none':
      def compile(unused_state):
        raise remat.NoBlocksError('the model has no blocks')
      step.compile = compile
    return step

  with pytest.raises(errors.MemoryLackError, match='It fits with '
                     r'--config.toy.accumulate=2 \('):
    memory.check('toy', build(Settings()), SCALAR, limit=need(accumulate=2),
                 remedies=memory.remedies(
                     'toy', Settings(), devices.layout(), build))


def test_nothing_fits():
  with pytest.raises(errors.MemoryLackError, match='No other way to compute it '
                     'fits either: take more devices'):
    memory.check('toy', sized(Settings()), SCALAR, limit=100.0,
                 remedies=remedies(Settings()))


def test_a_compiler_that_refuses_is_understood():
  """As those of chips do, whose memory is all that there is."""
  class Refusing:
    held = ()

    def compile(self, state):
      raise jax.errors.JaxRuntimeError(
          'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nMore')

  with pytest.raises(errors.MemoryLackError, match=r'toy: a step does not fit '
                     r'\(RESOURCE_EXHAUSTED: Ran out .* hbm.\). It fits with '
                     '--config.toy.remat=products'):
    memory.check('toy', Refusing(), SCALAR, limit=need(remat='products'),
                 remedies=remedies(Settings()))


def test_what_is_there(monkeypatch, tmp_path):
  """What is free, and what of the step's own is in use already."""
  (tmp_path / 'meminfo').write_text(
      'MemTotal: 32000000 kB\nMemAvailable: 8000000 kB\n')
  monkeypatch.setattr(memory, '_FREE', tmp_path / 'meminfo')
  monkeypatch.setattr(memory, '_GROUP', tmp_path)
  monkeypatch.setattr(jax, 'local_device_count', lambda: 4)
  assert memory.available() == 8000000 * 1024 // 4
  assert memory.available([DATA]) == 8000000 * 1024 // 4 + 2_000_000
  (tmp_path / 'memory.max').write_text('max\n')  # a group without a limit
  (tmp_path / 'memory.current').write_text('1000000000\n')
  assert memory.available() == 8000000 * 1024 // 4
  (tmp_path / 'memory.max').write_text('3000000000\n')
  stat = tmp_path / 'memory.stat'
  stat.write_text('anon 600000000\ninactive_file 300000000\n')
  assert memory.available() == 2_300_000_000 // 4
  stat.write_text('anon 1000000000\n')
  assert memory.available() == 2_000_000_000 // 4
  (tmp_path / 'meminfo').unlink()
  assert memory.available([DATA]) == 0  # nobody knows


def test_what_an_accelerator_says(monkeypatch):
  class Device:
    platform = 'gpu'

    def memory_stats(self):
      return {'bytes_limit': 10**10, 'bytes_in_use': 3 * 10**9}

  monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
  assert memory.available([DATA]) == 7 * 10**9 + 2_000_000
