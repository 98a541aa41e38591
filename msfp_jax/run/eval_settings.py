"""Settings of an evaluation: read, and refused before any work."""

from collections.abc import Sequence
import dataclasses
import pathlib

from msfp_jax.base import arguments
from msfp_jax.base import devices
from msfp_jax.metrics import features
from msfp_jax.metrics import lpips
from msfp_jax.metrics import preprocess
from msfp_jax.metrics import registry
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file
from msfp_jax.run import sample_store

# Networks of which there can be statistics in the package.
_OF_CIFAR10 = ('resnet56', 'cifar_resnet', 'squeezenet')
_RULES = {
    **dict.fromkeys(('num_samples', 'batch_size', 'pictures'),
                    arguments.COUNT),
    **dict.fromkeys(('layer_images', 'sensitivity_images'),
                    arguments.COUNT_OR_NONE),
    'vectors': (lambda value: arguments.COUNT_OR_NONE[0](value) and (
        value == 0 or value >= registry.LEAST_VECTORS),
                f'0 or at least {registry.LEAST_VECTORS}'),
    **dict.fromkeys(('report', 'timing'), arguments.FLAG),
    'keep': arguments.one_of(('', *sample_store.FORMS)),
    'preprocessing': arguments.one_of(preprocess.CONVENTIONS),
}


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """Settings of an evaluation; configs/common.py has the usual ones.

  Attributes:
    rows: what `methods.make_row` knows; 'all' for every recipe.
    num_samples: images of each.
    batch_size: images at once.
    features: the feature network, see `features.get`.
    more_features: others, on which what is named after its features is measured
      too.
    more_references: as `reference`, of each of these; () for those of the data.
    inception: the file of Inception's weights; '' for a download.
    preprocessing: of Inception's images.
    lpips: by what LPIPS compares images, see `lpips.load`; '' for without.
    reference: a file of statistics to compare with; '' for those of the data.
    vectors: feature vectors kept of each set; 0 for none.
    keep: the form in which all samples stay, a key of `sample_store.FORMS`, or
      ''.
    pictures: images a row in samples/methods.png.
    report: whether report.html is written.
    layer_images: by which every layer's error is measured; 0: none is.
    sensitivity_images: by which it is measured what each layer and step costs
      the images, see `sensitivity`; 0: it is not.
    timing: whether sampling is timed, which no other run repeats.

  Raises:
    ValueError: settings that no evaluation can work with.
  """

  rows: Sequence[str]
  num_samples: int
  batch_size: int
  features: str
  more_features: Sequence[str]
  more_references: Sequence[str]
  inception: str
  preprocessing: str
  lpips: str
  reference: str
  vectors: int
  keep: str
  pictures: int
  report: bool
  layer_images: int
  sensitivity_images: int
  timing: bool

  def __post_init__(self):
    arguments.check_fields('config.eval', self, _RULES)
    if self.features in self.more_features or (
        len(set(self.more_features)) < len(self.more_features)):
      raise ValueError(
          f'config.eval.more_features={tuple(self.more_features)}: beside '
          f'{self.features!r} one is named twice')
    if self.more_references and (
        len(self.more_references) != len(self.more_features)):
      raise ValueError(
          f'config.eval.more_references={tuple(self.more_references)}: must be '
          f'one for each of more_features={tuple(self.more_features)}, or none')
    for name, file in zip(self.networks, self.references, strict=True):
      # The one thing about a reference that is known without a network.
      if stats_file.is_shipped(file) and name.partition(':')[0] not in (
          _OF_CIFAR10):
        raise ValueError(
            f'the statistics {file!r} that ship with the package are of '
            f'{_OF_CIFAR10}, not of {name!r}: name a file of statistics, or '
            "'' for those of the data")

  @property
  def networks(self) -> tuple[str, ...]:
    """Names of all feature networks, the first before the others."""
    return (self.features, *self.more_features)

  @property
  def references(self) -> tuple[str, ...]:
    """A file of statistics for each of them; '' for those of the data."""
    return (self.reference,
            *(self.more_references or ('',) * len(self.more_features)))


def check(cfg: EvalSettings, layout: devices.Layout | None = None) -> None:
  """Raises for settings that do not fit this machine or its files.

  Raises:
    ValueError: a batch that the devices cannot share, or an unknown network.
    FileNotFoundError: a reference or weights that are not there.
  """
  layout = layout or devices.layout()
  layout.check_batch('config.eval.batch_size', cfg.batch_size)
  if cfg.sensitivity_images and layout.num_sharing > 1:
    raise ValueError(
        f'config.eval.sensitivity_images={cfg.sensitivity_images}: is measured '
        f'on one device, which config.mesh.model={layout.num_sharing} says '
        'cannot hold the model')
  for field, file in (('reference', cfg.reference),
                      ('features', features.check(cfg.features)),
                      *(('more_features', features.check(name))
                        for name in cfg.more_features),
                      *(('more_references', file)
                        for file in cfg.more_references),
                      ('inception', cfg.inception),
                      ('lpips', lpips.check(cfg.lpips))):
    shipped = 'reference' in field and stats_file.is_shipped(file)
    if file and not shipped and not pathlib.Path(file).expanduser().is_file():
      raise FileNotFoundError(f'no file at {file}, which config.eval.{field} '
                              'names')


def feature_networks(cfg: EvalSettings, image_shape: tuple[int, int, int]
                     ) -> list[features.FeatureNetwork]:
  """The networks that are asked for, on images of (H, W, C).

  Raises:
    ValueError: see `features.get`; or two names of one network.
  """
  found = [features.get(name, image_shape, weights=cfg.inception,
                        preprocessing=cfg.preprocessing)
           for name in cfg.networks]
  scorer_lib.check_metrics(network.metric for network in found)
  return found


def pair_network(cfg: EvalSettings, image_shape: tuple[int, int, int]
                 ) -> lpips.Lpips | None:
  """The network by which images are compared one by one, if any is.

  Args:
    cfg: says which.
    image_shape: (H, W, C).

  Raises:
    FileNotFoundError, ValueError: see `lpips.load`, and ValueError for images
      that it cannot compare.
  """
  if not cfg.lpips:
    return None
  found = lpips.load(cfg.lpips)
  found.check(image_shape)
  return found
