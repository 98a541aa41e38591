"""Reference statistics that samples are compared with, made or read."""

from collections.abc import Sequence
import os
import pathlib
from typing import Any

from absl import logging

from msfp_jax import data
from msfp_jax.base import devices
from msfp_jax.base import files
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import collect
from msfp_jax.metrics import features
from msfp_jax.metrics import lpips
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file
from msfp_jax.run import eval_settings


def load(source: str) -> data.Images:
  """The images of a source.

  Args:
    source: 'NAME:PATH' or 'NAME' of a data set (see `data.DATASETS`), or the
      path of a folder or an `.npz`.

  Raises:
    ValueError, FileNotFoundError: see `data.load`.
  """
  name, _, path = source.partition(':')
  # A folder may have a data set's name, or a colon in its path: what is there
  # wins.
  if name in data.DATASETS and not os.path.exists(source):
    return data.load(name, path)
  return data.load('images', source)


def run(source: str, path: str, feature_name: str, *, weights: str = '',
        preprocessing: str = 'tf', num_vectors: int = 0) -> str:
  """Writes the statistics of a source's images: eval.py --make_stats.

  Args:
    source: see `load`.
    path: of the `.npz`, see `stats_file.save`.
    feature_name: see `features.get`, as are `weights` and `preprocessing`.
    weights: of Inception.
    preprocessing: likewise.
    num_vectors: feature vectors kept in the file at most.

  Returns:
    A line that says what was written.

  Raises:
    ValueError: no images, another network than there is, or a path of a folder.
    OSError: files that are not there or cannot be written.
  """
  if num_vectors < 0:
    raise ValueError(f'vectors={num_vectors}: must be at least 0')
  files.check_target(path)
  images = load(source)
  network = features.get(feature_name, tuple(images.shape[1:]),
                         weights=weights, preprocessing=preprocessing)
  reference = stats_file.measure(images, network, source, num_vectors)
  stats_file.save(path, reference)
  return (f'{path}: {len(images):,} images of {images.shape[1:]}, features '
          f'{network.name!r} ({network.dim})')


def reference_of(images: data.Images | None, network: features.FeatureNetwork,
                 *, dataset: str, file: str = '', num_vectors: int = 0,
                 path: pathlib.Path | None = None,
                 needed: bool = True) -> stats_file.Reference:
  """Statistics of a file, or of the data.

  Args:
    images: the data; None where there are none.
    network: the feature network.
    dataset: the data's name, for the record.
    file: of statistics, config.eval.reference, see `stats_file.locate`; '' for
      those of the data.
    num_vectors: feature vectors wanted beside them; 0 for none.
    path: where those of the data are kept, and looked for.
    needed: whether to raise where there is nothing, as `stats_file.NOTHING`
      would do.

  Raises:
    ValueError: neither a reference nor data, or no statistics file.
  """
  if file:
    return _read(stats_file.locate(file, network.name), num_vectors)
  if images is None and not needed:
    return stats_file.NOTHING
  if images is None:
    raise ValueError(
        f'nothing to compare with on {network.name}: set config.eval.reference '
        '(of more_features: more_references) to a file of statistics, or '
        'config.data.name to a data set')
  # Only `sample_store.claim` puts this file at risk: it deletes it where
  # network or data changed, so what is found fits.
  if path is not None and devices.agreed(path.is_file()):
    return stats_file.load(path)
  found = stats_file.measure(images, network, dataset, num_vectors)
  if path is not None:
    devices.by_first(
        lambda: stats_file.save(path, found), 'the reference is written')
  return found


def read_given(cfg: eval_settings.EvalSettings,
               networks: Sequence[features.FeatureNetwork],
               images: data.Images | None, needed: bool = True
               ) -> list[stats_file.Reference | None]:
  """What needs no data: statistics that files hold, checked, by network.

  Args:
    cfg: with a file of statistics for each network, or none.
    networks: of `eval_settings.feature_networks`.
    images: the data; None where there are none.
    needed: as of `reference_of`.

  Returns:
    None for those that the data have to be measured for.

  Raises:
    ValueError: see `reference_of` and `scorer.Scorer`.
  """
  found = []
  for network, file in zip(networks, cfg.references, strict=True):
    if not file and images is not None:
      found.append(None)
      continue
    reference = reference_of(None, network, dataset='', file=file,
                             num_vectors=cfg.vectors, needed=needed)
    scorer_lib.Scorer(network, reference)  # of other features: refused
    found.append(reference)
  return found


def scorer_of(cfg: eval_settings.EvalSettings,
              networks: Sequence[features.FeatureNetwork],
              pair_network: lpips.Lpips | None, images: data.Images | None,
              given: Sequence[stats_file.Reference | None], *, dataset: str,
              folder: pathlib.Path | None = None) -> scorer_lib.Several:
  """Scores by all networks, each against statistics of its own.

  Args:
    cfg: says how many vectors are kept of the data.
    networks: of `eval_settings.feature_networks`.
    pair_network: of `eval_settings.pair_network`.
    images: the data; None where none of them is needed.
    given: of `read_given`.
    dataset: the data's name, for the record.
    folder: where statistics of the data are kept, and looked for.

  Raises:
    ValueError: see `scorer.Scorer`.
  """
  scorers = []
  for network, reference in zip(networks, given, strict=True):
    first = not scorers
    if reference is None:
      name = 'reference' if first else f'reference_{network.metric}'
      reference = reference_of(
          images, network, dataset=dataset, num_vectors=cfg.vectors,
          path=folder and folder / f'{name}.npz')
    scorers.append(scorer_lib.Scorer(
        network, reference, pair_network if first else None,
        named_only=not first))
  return scorer_lib.Several(scorers[0], scorers[1:])


def identities(cfg: eval_settings.EvalSettings,
               networks: Sequence[features.FeatureNetwork],
               source: Sequence[Any]) -> list[Any]:
  """What tells references from others: files' digests, or the data.

  Args:
    cfg: names the files.
    networks: whose they are.
    source: what tells data from others.
  """
  return [classifier_files.digest(stats_file.locate(file, network.name))
          if file else list(source)
          for file, network in zip(cfg.references, networks, strict=True)]


def _read(file: pathlib.Path, num_vectors: int) -> stats_file.Reference:
  found = stats_file.load(file)
  vectors = found.vectors if num_vectors else None
  if vectors is not None:
    # At equal distances: a file may hold its images in order of classes.
    vectors = collect.spread(vectors, num_vectors)
  elif num_vectors:
    logging.warning('%s holds no feature vectors: no kernel distance, '
                    'precision and recall', file)
  return found._replace(vectors=vectors, provenance={
      **found.provenance, 'file': os.path.basename(file),
      'file_sha256': classifier_files.digest(file)})
