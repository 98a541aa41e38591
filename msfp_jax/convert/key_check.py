"""Keys of a foreign configuration: none is passed over in silence.

Each code base has its lists: keys that are read, each with its kind of value
(`key_values`), keys of which only some values are computed here, and keys that
change nothing. What is on none of them may be anything, and is refused.
"""

from collections.abc import Collection, Mapping
from typing import Any

from msfp_jax.convert.key_values import Kind


def odd(given: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]],
        known: Collection[str], by_level: Collection[str] = (),
        place: str = '') -> list[str]:
  """Lists what of a configuration is not computed here, by key.

  Args:
    given: the configuration.
    only: {key: the values of it that are computed}.
    known: all keys with a meaning here, those of `only` among them.
    by_level: those of `only` that may be lists, of which each value counts.
    place: of the keys, for the texts: 'model.params.'.
  """
  texts = [
      f'{place}{key}={given[key]!r} ({one_of(allowed)})'
      for key, allowed in only.items() if key in given
      and any(value not in allowed for value in (
          given[key] if key in by_level and isinstance(given[key], list)
          and given[key] else [given[key]]))]
  return texts + [f'{place}{key}={given[key]!r} (unknown)'
                  for key in given if key not in known]


def wrong(given: Mapping[str, Any], kinds: Mapping[str, Kind],
          place: str = '') -> list[str]:
  """Lists the keys whose values are not of their kind.

  Args:
    given: the configuration; it need not have all keys.
    kinds: {key: what it may be}.
    place: of the keys, for the texts.
  """
  return [f'{place}{key}={given[key]!r} (must be {kind.what})'
          for key, kind in kinds.items()
          if key in given and not kind.has(given[key])]


def one_of(allowed: Collection[Any]) -> str:
  """'must be True', or 'must be one of ...' where there is a choice."""
  first, *others = allowed
  return (f'must be one of {list(allowed)}' if others else f'must be {first!r}')


def refuse(what: str, texts: Collection[str]) -> None:
  """Raises ValueError if there are texts; `what` is 'this UNet'."""
  if not texts:
    return
  unknown = any(text.endswith('(unknown)') for text in texts)
  raise ValueError(f'{what} does not support: ' + '; '.join(sorted(texts)) + (
      '. An unknown key that changes nothing of what the trained model '
      'computes may be deleted from the file' if unknown else ''))
