"""What share of a device's speed a step gets."""

import jax
import jax.numpy as jnp
import pytest

from msfp_jax.tune import speed
from msfp_jax.tune import step as step_lib


def test_the_share_is_of_steps_of_their_work_at_their_rate():
  assert speed.Speed(2e9, 1e10).share(2.5) == '50% of 10 GFLOP/s'
  assert speed.Speed(0.0, 1e10).share(2.5) == ''


def test_a_steps_work_is_what_its_program_multiplies(monkeypatch):
  monkeypatch.setattr(speed, 'peak', lambda dtype: 1e9)
  x = jnp.ones((64, 128))
  step = step_lib.Step(
      jax.jit(lambda state, x: (state @ x.T @ x, {})), lambda state: (x,), (x,))
  assert speed.of(step, 'float32').flops == 0  # not compiled: not known
  step.compile(jax.ShapeDtypeStruct((32, 128), jnp.float32))
  found = speed.of(step, 'float32').flops
  assert found == pytest.approx(2 * 2 * 32 * 64 * 128, rel=0.05)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_device_multiplies_at_a_speed_that_there_is(dtype):
  assert 1e8 < speed.peak(dtype) < 1e16
