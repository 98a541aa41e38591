"""Names of metrics, which tell the features that they are measured on.

A distance on one network's features says nothing about one on another's, so
that the network's name stands in the metric's: `fd_digits`, `fd_random`.
Inception's metrics have the names that everyone uses, `fid` and `kid`.
"""

from collections.abc import Mapping
import re
from typing import Any

# Feature network -> {kind of metric: its usual name on that network}.
USUAL = {
    'inception': {
        'fd': 'fid', 'fd_spatial': 'sfid', 'kd': 'kid', 'is': 'is',
        'precision': 'precision', 'recall': 'recall'},
}
_DEFAULT_PREPROCESSING = 'tf'  # the one that a name does not tell
_KIND = re.compile(r'{(\w+)}')


def named(kind: str, provenance: Mapping[str, Any]) -> str:
  """The name of a kind of metric on some features.

  Args:
    kind: such as 'fd'.
    provenance: of the features, as `FeatureNetwork.provenance` and
      results.json have it: 'features' and, where there are several,
      'preprocessing'.
  """
  network = str(provenance['features'])
  name = USUAL.get(network, {}).get(kind, f'{kind}_{network}')
  preprocessing = provenance.get('preprocessing', _DEFAULT_PREPROCESSING)
  if preprocessing != _DEFAULT_PREPROCESSING:
    name += f'_{preprocessing}'
  return name


def column(name: str, provenance: Mapping[str, Any]) -> str:
  """A metric's column in the results: '{fd}_to_fp' -> 'fd_digits_to_fp'.

  Args:
    name: of the metric; kinds that are named after the features stand in
      braces.
    provenance: as of `named`.
  """
  return _KIND.sub(lambda found: named(found[1], provenance), name)


def is_named(name: str) -> bool:
  """Whether a metric, named as in `column`, is called after its features."""
  return bool(_KIND.search(name))


def spellings(name: str) -> list[str]:
  """How a column may be called, for people: ['fd_FEATURES_to_fp', 'fid_to_fp'].

  Args:
    name: as of `column`.
  """
  return list(dict.fromkeys(
      column(name, {'features': network}) for network in ('FEATURES', *USUAL)))
