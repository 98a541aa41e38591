"""Scores images against a reference, and against the full-precision model's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msfp_jax import data
from msfp_jax.metrics import collect
from msfp_jax.metrics import evidence as evidence_lib
from msfp_jax.metrics import features
from msfp_jax.metrics import lpips as lpips_lib
from msfp_jax.metrics import naming
from msfp_jax.metrics import registry
from msfp_jax.metrics import stats_file


class Scorer:
  """Measures images against a reference and the first images it saw.

  Computes those of `registry.METRICS` for which the feature network and the
  reference bring what they need.
  """

  def __init__(self, network: features.FeatureNetwork,
               reference: stats_file.Reference,
               lpips: lpips_lib.Lpips | None = None,
               named_only: bool = False):
    """Checks that the reference can be compared with.

    Args:
      network: the feature network.
      reference: statistics of the data by that network. Where it has vectors,
        as many of the images' are kept for the metrics that need them. With
        `stats_file.NOTHING` there are those to full precision alone.
      lpips: compares image with image; None: nothing does.
      named_only: leave out what is not named after the features: of images
        that another scorer measures too.

    Raises:
      ValueError: the reference is another network's, or the images are none
        that `lpips` can compare.
    """
    # What the reference does not tell, as files of other tools, cannot differ.
    odd = [f'{name}: {reference.provenance[name]!r} there, {value!r} here'
           for name, value in network.provenance.items()
           if reference.provenance.get(name, value) != value]
    if reference.pool is not None and (
        len(reference.pool.mean) != network.dim):
      odd.append(f'{len(reference.pool.mean)} features there, {network.dim} '
                 'here')
    if reference.vectors is not None and len(
        reference.vectors) < registry.LEAST_VECTORS:
      odd.append(f'{len(reference.vectors)} vectors there, '
                 f'{registry.LEAST_VECTORS} needed')
    if odd:
      raise ValueError('the reference statistics are of other features, so no '
                       f'distance to them means anything ({"; ".join(odd)}); '
                       'make them anew with eval.py --make_stats')
    if lpips:
      lpips.check(network.image_shape)
    self._network, self._reference, self._lpips = network, reference, lpips
    self._named_only, self._full = named_only, None

  @property
  def metric(self) -> str:
    """The name of the Frechet distance: fd_<features>, or fid."""
    return self._network.metric

  @property
  def provenance(self) -> Mapping[str, Any]:
    """The conditions of the metrics: network, reference, vectors, settings."""
    found = {**self._network.provenance, 'reference': {
        name: value for name, value in self._reference.provenance.items()
        if name not in self._network.provenance}}
    if self._reference.vectors is not None:
      found['reference']['vectors'] = len(self._reference.vectors)
    # Of all that later calls compute, the first one's metrics included.
    for metric in self._computed(first=False).values():
      found |= metric.settings
    return found | (self._lpips.provenance if self._lpips else {})

  @property
  def least_samples(self) -> int:
    """The least number of images that the metrics can be taken of."""
    return max(metric.least for metric in self._computed(first=False).values())

  def score(self, images: data.Images) -> dict[str, float]:
    """The metrics of images; later calls also compare with the first call's.

    Args:
      images: uint8, of the network's shape; the first call's must stay
        readable.

    Returns:
      {column: value}, without the metrics that cannot be computed.
    """
    vectors = self._reference.vectors
    seen = collect.collect(
        images, self._network, self._wanted(),
        0 if vectors is None else len(vectors))
    evidence = evidence_lib.Evidence(
        seen, self._reference, self._full, self._lpips)
    found = {}
    for name, metric in self._computed(first=self._full is None).items():
      value = metric.compute(evidence)
      if value is not None:
        found[naming.column(name, self._network.provenance)] = value
    # The first call's images are full precision's, by the contract above.
    self._full = self._full or seen
    return found

  def _computed(self, first: bool) -> dict[str, registry.Metric]:
    """The metrics for which there is what they need."""
    there = evidence_lib.at_hand(
        self._network.brings, self._reference, first, self._lpips)
    return {name: metric for name, metric in registry.METRICS.items()
            if there.issuperset(metric.needs)
            and (naming.is_named(name) or not self._named_only)}

  def _wanted(self) -> set[str]:
    """The statistics of a set that some metric needs."""
    return {need.partition('.')[2]
            for metric in self._computed(first=False).values()
            for need in metric.needs}


class Several:
  """One scorer of all that there is, and others of what is named after theirs.

  So that a row has distances on several networks: a choice that is better by
  one and worse by the other is no better.
  """

  def __init__(self, first: Scorer, others: Sequence[Scorer] = ()):
    """Takes the scorers.

    Args:
      first: whose metrics are all computed.
      others: made with `named_only`, on other networks.

    Raises:
      ValueError: two of one network.
    """
    self._all = [first, *others]
    check_metrics(scorer.metric for scorer in self._all)

  @property
  def provenance(self) -> Mapping[str, Any]:
    """The first one's; the others' as a list, 'more_features'."""
    first, *others = (scorer.provenance for scorer in self._all)
    return {**first, **({'more_features': others} if others else {})}

  @property
  def least_samples(self) -> int:
    """The least number of images that all metrics can be taken of."""
    return max(scorer.least_samples for scorer in self._all)

  def score(self, images: data.Images) -> dict[str, float]:
    """The metrics of all; see `Scorer.score`."""
    found = {}
    for scorer in self._all:
      found |= scorer.score(images)
    return found


def check_metrics(names: Iterable[str]) -> None:
  """Raises ValueError if two networks would give metrics of one name."""
  names = list(names)
  if twice := {name for name in names if names.count(name) > 1}:
    raise ValueError(f'{sorted(twice)} would be measured twice: name each '
                     'feature network once')
