"""All metrics, as data: the one place that a new metric is added to.

A metric is an entry of METRICS. The scorer computes those for which there is
what they need; results.json, the tables, the report and README's glossary read
the rest of the entry. Elsewhere no metric and no feature network is named.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from msfp_jax.metrics import class_checks
from msfp_jax.metrics import evidence as evidence_lib
from msfp_jax.metrics import frechet
from msfp_jax.metrics import inception_score
from msfp_jax.metrics import kernel_distance
from msfp_jax.metrics import lpips
from msfp_jax.metrics import naming
from msfp_jax.metrics import neighbours
from msfp_jax.metrics import similarity
from msfp_jax.metrics.evidence import Evidence

HIGH, LOW = 'high', 'low'
# Vectors of a set that all metrics on vectors can work with.
LEAST_VECTORS = neighbours.K + 1


def plain(value: Any) -> str:
  """A number in a table: '2,597,316', '12346', '23.636', '0.00123'."""
  if isinstance(value, float):
    if abs(value) >= 1000:
      return f'{value:.0f}'
    return f'{value:.3g}' if 0 < abs(value) < 0.1 else f'{value:.3f}'
  return f'{value:,}' if isinstance(value, int) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """A column of the results.

  Attributes:
    meaning: in plain English, without which way is better.
    better: HIGH, LOW, or '' where neither is.
    format: a value as text.
  """

  meaning: str
  better: str = ''
  format: Callable[[Any], str] = plain

  def __post_init__(self):
    if self.better not in (HIGH, LOW, ''):
      raise ValueError(f"better={self.better!r}: must be {HIGH!r}, {LOW!r} or "
                       "''")

  @property
  def verdict(self) -> str:
    """'high is good', 'low is good' or ''."""
    return self.better and f'{self.better} is good'

  def best(self, values: list[float]) -> float | None:
    """The best of some values; None where there is nothing to win."""
    if not self.better or not values:
      return None
    return max(values) if self.better == HIGH else min(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(Column):
  """A column that is computed from images.

  Attributes:
    needs: what must be at hand, of `evidence.NAMES`. A metric for which
      something is missing is left out of the results.
    compute: of the evidence; None where it cannot be computed after all,
      which leaves it out as well.
    source: where it is defined.
    least: images that it needs.
    settings: what else its values hold for; goes into results.json.
  """

  needs: tuple[str, ...]
  compute: Callable[[Evidence], float | None]
  source: str = ''
  least: int = 1
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    super().__post_init__()
    if unknown := set(self.needs) - evidence_lib.NAMES:
      raise ValueError(f'a metric needs {sorted(unknown)}: must be of '
                       f'{sorted(evidence_lib.NAMES)}')


def _kernel(e: Evidence) -> kernel_distance.Distance:
  return e.once(
      kernel_distance.distance, e.own.vectors, e.reference.vectors)


def _shares(e: Evidence) -> neighbours.PrecisionRecall:
  return e.once(
      neighbours.precision_recall, e.own.vectors, e.reference.vectors)


def _ssim(e: Evidence) -> float | None:
  if not similarity.can_ssim(e.own.images.shape):
    return None
  return similarity.ssim(e.own.images, e.full.images)


_VECTORS = ('own.vectors', 'reference.vectors')
_IMAGES = ('own.images', 'full.images')
_SPLITS = {'is_splitting': inception_score.SPLITTING}

# Name -> metric, in the order of the results. Kinds in braces are named after
# the features, see `naming.column`.
# An entry on the features' vectors, on a classifier, on pairs of images: all
# the same to the scorer, which asks only whether `needs` are at hand.
METRICS: dict[str, Metric] = {
    '{fd}': Metric(
        needs=('own.pool', 'reference.pool'), better=LOW, least=2,
        compute=lambda e: frechet.frechet_distance(
            e.own.pool, e.reference.pool),
        meaning='Fréchet distance to the data: how far apart the Gaussians of '
        'both sets\' features are; compares only with itself on the same '
        'features and at an equal number of images',
        source='Heusel et al. 2017'),
    '{fd_spatial}': Metric(
        needs=('own.spatial', 'reference.spatial'), better=LOW, least=2,
        compute=lambda e: frechet.frechet_distance(
            e.own.spatial, e.reference.spatial),
        meaning='the same on features that know places: of Inception, 2,023 of '
        'the 17 x 17 map of Mixed_6d',
        source='Nash et al. 2021, ADM'),
    '{kd}': Metric(
        needs=_VECTORS, better=LOW, least=2,
        compute=lambda e: _kernel(e).mean,
        meaning='kernel distance to the data (cubic polynomial): mean over '
        '100 random subsets of 1,000 images, or of all where there are no '
        'more',
        source='Bińkowski et al. 2018, torch-fidelity'),
    '{kd}_std': Metric(
        needs=_VECTORS, least=2, compute=lambda e: _kernel(e).std,
        meaning='its standard deviation over the subsets, where there are '
        'some'),
    '{precision}': Metric(
        needs=_VECTORS, better=HIGH, least=LEAST_VECTORS,
        compute=lambda e: _shares(e).precision,
        meaning='share of the images that lie among the data\'s, by third '
        'neighbours',
        source='Kynkäänniemi et al. 2019, ADM'),
    '{recall}': Metric(
        needs=_VECTORS, better=HIGH, least=LEAST_VECTORS,
        compute=lambda e: _shares(e).recall,
        meaning='share of the data\'s images that lie among the model\'s',
        source='Kynkäänniemi et al. 2019, ADM'),
    '{is}': Metric(
        needs=('own.class_score',), better=HIGH,
        least=inception_score.NUM_SPLITS, settings=_SPLITS,
        compute=lambda e: e.own.class_score.mean,
        meaning='inception score: are images of one class each, and of all '
        'classes together? Mean over 10 splits',
        source='Salimans et al. 2016, torch-fidelity'),
    '{is}_std': Metric(
        needs=('own.class_score',), least=inception_score.NUM_SPLITS,
        compute=lambda e: e.own.class_score.std,
        meaning='its standard deviation over the splits'),
    'confidence': Metric(
        needs=('own.probabilities',),
        compute=lambda e: class_checks.confidence(e.own.probabilities),
        meaning='how sure the classifier is of its classes, 0 to 1'),
    'class_balance': Metric(
        needs=('own.probabilities',),
        compute=lambda e: class_checks.class_balance(e.own.probabilities),
        meaning='how evenly the classes appear; 1 is even'),
    '{fd}_to_fp': Metric(
        needs=('own.pool', 'full.pool'), better=LOW, least=2,
        compute=lambda e: frechet.frechet_distance(e.own.pool, e.full.pool),
        meaning='Fréchet distance to the full-precision model\'s images'),
    '{fd_spatial}_to_fp': Metric(
        needs=('own.spatial', 'full.spatial'), better=LOW, least=2,
        compute=lambda e: frechet.frechet_distance(
            e.own.spatial, e.full.spatial),
        meaning='the same on features that know places'),
    'psnr_to_fp': Metric(
        needs=_IMAGES, better=HIGH,
        compute=lambda e: similarity.psnr(e.own.images, e.full.images),
        meaning='peak signal-to-noise ratio in dB, image by image to those '
        'that full precision makes from the same noise, mean; 100 for equal '
        'ones'),
    'ssim_to_fp': Metric(
        needs=_IMAGES, better=HIGH, compute=_ssim,
        meaning='structural similarity to the same images, 1 for equal ones; '
        'of images of 11 pixels and more',
        source='Wang et al. 2004'),
    **{f'lpips_{name}_to_fp': Metric(
        needs=(*_IMAGES, f'lpips.{name}'), better=LOW,
        compute=lambda e: e.lpips.distance(e.own.images, e.full.images),
        meaning='how unlike the same images look, 0 for equal ones: LPIPS 0.1 '
        f'on {" or ".join(trunk.title for trunk in lpips.TRUNKS.values())}, '
        'where `config.eval.lpips` names the weights',
        source='Zhang et al. 2018') for name in lpips.TRUNKS},
    'label_agreement': Metric(
        needs=('own.probabilities', 'full.probabilities'), better=HIGH,
        compute=lambda e: class_checks.label_agreement(
            e.own.probabilities, e.full.probabilities),
        meaning='share of the images in which the classifier sees the same '
        'class as in the full-precision model\'s'),
}

# What rows hold beside the metrics.
FACTS: dict[str, Column] = {
    'weight_bits': Column(
        meaning='bits of the weights, but for the exceptions'),
    'act_bits': Column(
        meaning='bits of the layers\' inputs, but for the exceptions'),
    'bytes': Column(
        better=LOW, meaning='size with weights packed at their bits; all '
        'banks, scales and zero points counted'),
    'bits_per_weight': Column(
        better=LOW, meaning='bits that the layers store for each of their '
        'weights, exceptions, scales, zero points, shifts, branches and banks '
        'counted'),
    'bits_per_act': Column(
        better=LOW, meaning='bits of each element of the layers\' inputs, for '
        'one image, exceptions, scales, zero points and shifts counted'),
    'bytes_kept': Column(
        better=LOW, meaning='what a model that quantizes differences keeps of '
        'each image from step to step, in float32'),
    'sqnr_mean': Column(
        better=HIGH, meaning='signal-to-quantization-noise ratio of a layer\'s '
        'output in dB, each layer by itself on full precision\'s input, mean '
        'over the layers'),
    'sqnr_min': Column(
        better=HIGH, meaning='the same of the worst layer'),
    'seconds': Column(
        better=LOW, meaning='time to sample one image, of a batch and on the '
        'machine at hand; of quantized models simulated, with their weights as '
        'float32 levels'),
    'seconds_packed': Column(
        better=LOW, meaning='the same with the weights as packed codes'),
}


def columns(provenance: Mapping[str, Any]) -> dict[str, Column]:
  """{column of the results: what it is}.

  Args:
    provenance: of the features, see `naming.named`, and of more features, see
      `scorer.Several`; results.json has it.
  """
  networks = [provenance, *provenance.get('more_features', ())]
  return FACTS | {naming.column(name, network): metric for network in networks
                  for name, metric in METRICS.items()}
