"""What an experiment takes of an origin, for tests of origins."""

from configs import common
from msfp_jax.diffusion import origin as origin_lib


def choose(origin, **typed):
  """Chooses with a config in which only `typed` was typed."""
  config = common.get_config()
  for field, value in typed.items():
    part, _, name = field.partition('_')
    config[part][name] = value
  return origin_lib.choose(origin, config.schedule, config.sampler)
