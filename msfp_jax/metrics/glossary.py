"""Tables for README: the columns of results and the feature networks."""

from msfp_jax.base import markdown
from msfp_jax.metrics import features
from msfp_jax.metrics import naming
from msfp_jax.metrics import registry


def columns() -> str:
  """Every column, in Markdown."""
  rows = {}
  # Read off the registry: a new metric is in the table without more ado. Those
  # of one meaning share a line.
  for name, column in (registry.METRICS | registry.FACTS).items():
    source = getattr(column, 'source', '')
    meaning = column.meaning + (f' ({source})' if source else '')
    rows.setdefault((column.better, meaning), []).extend(
        f'`{spelling}`' for spelling in naming.spellings(name))
  return markdown.table(['column', 'good is', 'meaning'], [
      [', '.join(names), *rest] for rest, names in rows.items()], aligned=False)


def networks() -> str:
  """Every feature network, in Markdown."""
  return markdown.table(['FEATURES', 'what they are'], [
      [f'`{name}:PATH`' if network.from_file else f'`{name}`', network.meaning]
      for name, network in features.NETWORKS.items()], aligned=False)
