"""Evidence that metrics are computed from, and the names to ask for it by."""

from collections.abc import Callable, Collection
import dataclasses
from typing import Any

from msfp_jax.metrics import collect
from msfp_jax.metrics import lpips as lpips_lib
from msfp_jax.metrics import stats_file

_OF_SETS = tuple(field.name for field in dataclasses.fields(collect.Seen))
_OF_REFERENCES = ('pool', 'spatial', 'vectors')
# All that a metric may need: 'own.images', 'reference.pool', ...
NAMES = frozenset([
    *(f'{side}.{name}' for side in ('own', 'full') for name in _OF_SETS),
    *(f'reference.{name}' for name in _OF_REFERENCES),
    *(f'lpips.{name}' for name in lpips_lib.TRUNKS)])


class Evidence:
  """Observations of one set of images, and of those it is compared with.

  Attributes:
    own: of the images that are measured.
    reference: of the data.
    full: of the images that the full-precision model makes from the same
      noise; None where these are the ones that are measured.
    lpips: a network that compares pairs of images, or None.
  """

  def __init__(self, own: collect.Seen, reference: stats_file.Reference,
               full: collect.Seen | None = None,
               lpips: lpips_lib.Lpips | None = None):
    self.own, self.reference, self.full = own, reference, full
    self.lpips = lpips
    self._results = {}

  def once(self, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed for the first metric that asks, and kept.

    Args:
      function: of its arguments alone.
      *args: the same objects where the result is to be the same.
    """
    # By identity: arrays cannot be hashed, and to compare them would cost as
    # much as to compute.
    key = (function, *map(id, args))
    if key not in self._results:
      # The arguments are kept, so that no other object gets their id.
      self._results[key] = function(*args), args
    return self._results[key][0]


def at_hand(brings: Collection[str], reference: stats_file.Reference,
            first: bool, lpips: lpips_lib.Lpips | None = None
            ) -> frozenset[str]:
  """Which of NAMES there are.

  Args:
    brings: the statistics that the feature network gives of a set.
    reference: of the data; with vectors, those of every set are kept.
    first: whether the images are the full-precision model's own.
    lpips: a network that compares pairs of images, if there is one.
  """
  # A metric on vectors needs them of both sides: where the reference has none,
  # none of the images' are kept either.
  of_data = {name for name in _OF_REFERENCES
             if getattr(reference, name) is not None}
  of_set = {'images', *brings, *(of_data & {'vectors'})}
  return frozenset([
      *(f'{side}.{name}' for side in (('own',) if first else ('own', 'full'))
        for name in of_set),
      *(f'reference.{name}' for name in of_data),
      *([f'lpips.{lpips.name}'] if lpips else [])])
