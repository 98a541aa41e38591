"""Metrics as data: their columns, and that one entry reaches everything."""

import pathlib
import re
import types

import numpy as np
import page as page_lib
import pytest
import runs

from msfp_jax.metrics import evidence as evidence_lib
from msfp_jax.metrics import features
from msfp_jax.metrics import glossary
from msfp_jax.metrics import naming
from msfp_jax.metrics import registry
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file
from msfp_jax.report import page
from msfp_jax.report import results_table
from msfp_jax.run import evaluate

ROOT = pathlib.Path(__file__).parents[1]
DIGITS, RANDOM, INCEPTION = (
    {'features': name} for name in ('digits', 'random', 'inception'))


def add(monkeypatch, name, **fields):
  """Registers a metric until the test ends."""
  entry = {'needs': ('own.images',), 'meaning': 'm'} | fields
  monkeypatch.setitem(registry.METRICS, name, registry.Metric(**entry))


def scorer_of(images, num_vectors=0):
  network = features.get('random', images.shape[1:])
  return scorer_lib.Scorer(
      network, stats_file.measure(images, network, 'test', num_vectors))


def test_the_columns_on_every_network_are_as_they_were():
  """Names that results.json has had; in the order of the results."""
  facts = ['weight_bits', 'act_bits', 'bytes', 'bits_per_weight',
           'bits_per_act', 'bytes_kept', 'sqnr_mean', 'sqnr_min', 'seconds',
           'seconds_packed']
  usual = [
      'fid', 'sfid', 'kid', 'kid_std', 'precision', 'recall', 'is', 'is_std',
      'confidence', 'class_balance', 'fid_to_fp', 'sfid_to_fp', 'psnr_to_fp',
      'ssim_to_fp', 'lpips_alex_to_fp', 'lpips_vgg_to_fp', 'label_agreement']
  assert list(registry.columns(INCEPTION)) == facts + usual
  assert list(registry.columns(INCEPTION | {'preprocessing': 'clean'})) == (
      facts + [
          'fid_clean', 'sfid_clean', 'kid_clean', 'kid_clean_std',
          'precision_clean', 'recall_clean', 'is_clean', 'is_clean_std',
          'confidence', 'class_balance', 'fid_clean_to_fp',
          'sfid_clean_to_fp', *usual[-5:]])
  assert list(registry.columns({'features': 'resnet20'})) == facts + [
      'fd_resnet20', 'fd_spatial_resnet20', 'kd_resnet20', 'kd_resnet20_std',
      'precision_resnet20', 'recall_resnet20', 'is_resnet20',
      'is_resnet20_std', 'confidence', 'class_balance', 'fd_resnet20_to_fp',
      'fd_spatial_resnet20_to_fp', *usual[-5:]]


def test_which_end_of_a_column_is_good():
  columns = registry.columns(INCEPTION)
  assert {name for name in columns if columns[name].better == 'low'} == {
      'fid', 'sfid', 'kid', 'fid_to_fp', 'sfid_to_fp', 'lpips_alex_to_fp',
      'lpips_vgg_to_fp', 'bytes', 'bits_per_weight', 'bits_per_act',
      'bytes_kept', 'seconds', 'seconds_packed'}
  assert {name for name in columns if columns[name].better == 'high'} == {
      'precision', 'recall', 'is', 'psnr_to_fp', 'ssim_to_fp',
      'label_agreement', 'sqnr_mean', 'sqnr_min'}


def test_a_kind_is_named_after_the_features_wherever_it_stands():
  assert naming.column('a_{new}_b', RANDOM) == 'a_new_random_b'
  assert naming.column('{new}', INCEPTION | {'preprocessing': 'pytorch'}) == (
      'new_inception_pytorch')
  assert naming.column('plain', DIGITS) == 'plain'


def test_one_entry_reaches_scores_tables_report_and_glossary(monkeypatch):
  """A metric that no other file knows."""
  add(monkeypatch, '{brightness}_to_fp', better='high', meaning='how <bright>',
      needs=('own.images', 'full.images'), settings={'scale': 255},
      compute=lambda e: float(np.mean(e.own.images) - np.mean(e.full.images)),
      format=lambda value: f'{value:.0f} levels', source='nobody')
  dark = np.maximum(runs.smooth(140, 8, 8, 1), 3) - 3
  scorer = scorer_of(dark)
  rows = [scorer.score(images) for images in (dark, dark + 1, dark + 3)]
  assert 'brightness_random_to_fp' not in rows[0]
  assert list(rows[1])[-1] == 'brightness_random_to_fp'
  assert [row['brightness_random_to_fp'] for row in rows[1:]] == [1, 3]
  assert scorer.provenance['scale'] == 255

  results = {**scorer.provenance, 'num_samples': 140, 'rows': [
      {'name': name, 'weight_bits': bits, 'act_bits': bits, **row, 'bytes': 9}
      for name, bits, row in zip(
          ('fp', 'one', 'two'), (32, 4, 4), rows, strict=True)]}
  heads, _, fp, one, _ = (
      [cell.strip() for cell in line.split('|')]
      for line in evaluate.table(results).splitlines())
  column = heads.index('brightness_random_to_fp')
  assert (fp[column], one[column]) == ('', '1 levels')

  section = results_table.section(
      types.SimpleNamespace(results=results, row='one'))
  html = page.render('title', [section])
  head, = (attrs for attrs in page_lib.Page(html).all('th')
           if attrs.get('title', '').startswith('how'))
  assert head['title'] == 'how <bright>; high is good'
  heads = dict(re.findall(
      r'<th scope="col" class="number"[^>]*>(\w+)(?:&nbsp;<span [^>]*>(.)<)?',
      html.replace('<wbr>', '')))
  assert {name: arrow for name, arrow in heads.items() if arrow} == {
      'fd_random': '↓', 'fd_random_to_fp': '↓', 'psnr_to_fp': '↑',
      'brightness_random_to_fp': '↑', 'bytes': '↓'}
  assert '<td class="number">1 levels</td>' in html
  assert '<td class="number best">3 levels<' in html
  assert ('| `brightness_FEATURES_to_fp`, `brightness_inception_to_fp` | high '
          '| how <bright> (nobody) |') in glossary.columns()


def test_without_what_it_needs_a_metric_is_left_out(monkeypatch):
  for name in sorted(evidence_lib.NAMES):
    add(monkeypatch, f'with {name}', needs=(name,), compute=lambda e: 1.0)
  add(monkeypatch, 'never', compute=lambda e: None)
  images = runs.smooth(140, 8, 8, 1)
  needed = lambda found: {name.removeprefix('with ') for name in found
                          if name.startswith('with ')}
  scorer = scorer_of(images)
  bare = {'own.images', 'own.pool', 'reference.pool'}
  assert needed(scorer.score(images)) == bare
  again = scorer.score(images)
  assert needed(again) == bare | {'full.images', 'full.pool'}
  assert 'never' not in again
  assert needed(scorer_of(images, 20).score(images)) == bare | {
      'own.vectors', 'reference.vectors'}


def test_what_is_asked_for_is_there(monkeypatch):
  """No statistic that a network brings is None where a metric needs it."""
  seen = {}
  for name in ('own.vectors', 'full.vectors', 'own.probabilities'):
    side, _, field = name.partition('.')
    add(monkeypatch, name, needs=(name,),
        compute=lambda e, side=side, field=field: seen.setdefault(
            (side, field), len(getattr(getattr(e, side), field))))
  images = runs.smooth(70, 16, 16, 1)
  network = features.get('digits', (16, 16, 1))
  scorer = scorer_lib.Scorer(
      network, stats_file.measure(images, network, 'test', 12))
  scorer.score(images)
  scorer.score(images)
  assert seen == {('own', 'vectors'): 12, ('full', 'vectors'): 12,
                  ('own', 'probabilities'): 70}


def test_results_that_metrics_share_are_computed_once():
  calls = []
  add_up = lambda *values: calls.append(values) or sum(values)
  given = evidence_lib.Evidence(None, None)
  assert [given.once(add_up, 1, 2), given.once(add_up, 1, 2)] == [3, 3]
  assert given.once(add_up, 1, 5) == 6
  assert calls == [(1, 2), (1, 5)]


def test_the_images_that_metrics_need(monkeypatch):
  images = runs.smooth(140, 8, 8, 1)
  scorer = scorer_of(images)
  assert scorer.least_samples == 2
  add(monkeypatch, 'many', least=17, compute=lambda e: 1.0)
  assert scorer.least_samples == 17


@pytest.mark.parametrize('fields, message', [
    ({'needs': ('own.smell',)}, r"needs \['own.smell'\]: must be of.*own.pool"),
    ({'better': 'up'}, "better='up': must be 'high', 'low' or ''")])
def test_an_entry_that_cannot_be(monkeypatch, fields, message):
  with pytest.raises(ValueError, match=message):
    add(monkeypatch, 'x', compute=lambda e: 1.0, **fields)


def test_uses_of_logits_that_there_are_not():
  apply = lambda params, images: features.Outputs(
      images.reshape(len(images), -1).astype(np.float32))
  for use, message in (('labels', r'class_score, probabilities, not'),
                       ('class_score', 'gives no logits')):
    with pytest.raises(ValueError, match=message):
      features.FeatureNetwork('n', (2, 2, 1), apply, {}, uses_of_logits=[use])


@pytest.mark.parametrize('value, text', [
    (2597316, '2,597,316'), (12345.6, '12346'), (23.6361, '23.636'),
    (0.97949, '0.979'), (0.012345, '0.0123'), (0.0, '0.000'),
    (-0.00123456, '-0.00123')])
def test_numbers_in_tables(value, text):
  assert registry.plain(value) == text


def test_readme_explains_the_columns_and_evaluation_md_the_features():
  """`python -m msfp_jax.metrics` prints both tables."""
  assert glossary.columns() in (ROOT / 'README.md').read_text('utf-8')
  assert glossary.networks() in (
      ROOT / 'docs/evaluation.md').read_text('utf-8')


def test_no_metric_or_network_is_named_where_they_are_used():
  """The scorer, the tables and the report work on entries alone."""
  folder = ROOT / 'msfp_jax'
  for path in (folder / 'metrics/scorer.py', folder / 'metrics/results.py',
               folder / 'metrics/collect.py', folder / 'metrics/evidence.py',
               folder / 'report/results_table.py'):
    text = path.read_text('utf-8')
    for name in features.NETWORKS:
      assert f"'{name}'" not in text, path
    for name in registry.METRICS:
      assert f"'{name}'" not in text, path
