"""The works that Hopper's kernel chooses blocks for, for tests."""

from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import measured


def record(monkeypatch):
  """Lists every work that is asked about; blocks are the formula's."""
  asked = []

  def choose(work):
    asked.append(work)
    return blocks_lib.ranked(work)[0]

  monkeypatch.setattr(measured, 'choose', choose)
  return asked
