"""Each section of the report shows what is in the data."""

import base64
import io
import json
import types

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import page as page_lib
from PIL import Image
import pytest

from msfp_jax.metrics import registry
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static
from msfp_jax.report import curves
from msfp_jax.report import histograms
from msfp_jax.report import layers_table
from msfp_jax.report import overview
from msfp_jax.report import page
from msfp_jax.report import results_table
from msfp_jax.report import routing
from msfp_jax.report import samples
from msfp_jax.report import section as section_lib
from msfp_jax.report import strategies
from msfp_jax.report import timesteps

EVIL = '<script>alert("1")</script>'
ROWS = [
    {'name': 'fp', 'weight_bits': 32, 'act_bits': 32, 'fd_x': 1.0,
     'bytes': 4000},
    {'name': EVIL, 'weight_bits': 4, 'act_bits': 4, 'fd_x': 3.0,
     'psnr_to_fp': 21.0, 'bytes': 1000},
    {'name': 'msfp', 'weight_bits': 4, 'act_bits': 4, 'fd_x': 2.0,
     'psnr_to_fp': 20.0, 'bytes': 1000}]


def quantizer(fmt, scale=0.5, zero_point=None):
  return Static(
      FPFormat.parse(fmt), jnp.float32(scale),
      None if zero_point is None else jnp.float32(zero_point))


def layer(kind, fmt, mse=1.0, signed_mse=1.0, role='conv'):
  return spec_lib.LayerSpec(
      role, kind, quantizer('E2M1'), quantizer(fmt),
      stats={'act_mse': mse, 'act_signed_mse': signed_mse,
             'weight_mse': 0.25})


def silu(count, seed=0):
  x = np.random.default_rng(seed).standard_normal(count)
  return (x / (1 + np.exp(-x))).astype(np.float32)


def test_the_best_of_the_quantized_rows_wins():
  best = lambda name, rows=ROWS: results_table.best(
      rows, name, registry.columns({'features': 'x'})[name])
  assert best('fd_x') == 2.0  # not full precision's 1.0
  assert best('psnr_to_fp') == 21.0
  assert best('weight_bits') is None
  assert best('fd_x', ROWS[:2]) is None  # alone


def test_sizes_are_compared_with_full_precision():
  full, small, _ = results_table.sizes(ROWS)
  assert full['percent'] == '100.00' and small['percent'] == '25.00'
  assert small['ratio'] == '4.00 times smaller'


@pytest.mark.parametrize('count, side, shown', [
    (16, 16, 16), (100, 16, 16), (15, 16, 9), (1, 16, 1), (16, 128, 16),
    (16, 256, 4), (16, 512, 1), (16, 1024, 1)])
def test_few_images_are_embedded_where_they_are_large(count, side, shown):
  assert samples.count_shown(count, side, side) == shown


@pytest.mark.parametrize('channels', [1, 3])
def test_an_embedded_image_is_the_image(channels):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
  head, content = samples.data_uri(image).split(',')
  assert head == 'data:image/png;base64'
  with Image.open(io.BytesIO(base64.b64decode(content))) as opened:
    np.testing.assert_array_equal(
        np.asarray(opened).reshape(image.shape), image)


def test_rows_of_layers():
  layers = {'a': layer('AAL', 'UE2M2', 0.5, 2.0),
            'b': spec_lib.LayerSpec('conv', 'NAL')}
  a, b = layers_table.rows(layers)
  assert a == [1, 'a', 'conv', 'AAL', 'UE2M2', 0.5, None, 0.5, 4.0, 'E2M1',
               0.25]
  assert b == [2, 'b', 'conv', 'NAL'] + [None] * 7


def test_the_error_of_a_grid_by_hand():
  """E2M1 at scale 1 rounds 5.2 to 6 and 0.6 to 0.5."""
  grid = histograms.grid_of(
      quantizer('E2M1', 1.0), np.asarray([5.2, 0.6, -3.0], np.float32))
  assert grid.name == 'E2M1' and len(grid.levels) == 15
  assert grid.mse == pytest.approx((0.8**2 + 0.1**2) / 3, rel=1e-5)
  moved = histograms.grid_of(
      quantizer('UE2M2', 0.5, -0.25), np.zeros(1, np.float32))
  assert moved.levels[0] == -0.25 and moved.levels[-1] == 3.25


def test_layers_worth_looking_at():
  seen = {name: Seen(np.asarray([-1.0, 1.0]) * size)
          for name, size in zip('abcdefg', (1, 1, 1, 1, 1, 10, 1), strict=True)}
  layers = {
      'a': layer('AAL', 'UE2M2', 1, 2), 'b': layer('AAL', 'UE2M2', 1, 4),
      'c': layer('AAL', 'UE2M2', 1, 3, 'temb_proj'),
      'd': layer('AAL', 'E2M1', 1, 1),  # signed won
      'e': layer('NAL', 'E2M1', 0.1, 0.1), 'f': layer('NAL', 'E2M1', 1, 1),
      'g': layer('NAL', 'E4M3', 9, 9)}  # 8 bits
  assert histograms.choose(layers, seen) == (['b', 'c', 'a'], ['e', 'f'])


def test_strategies_on_an_input_of_known_errors():
  """SiLU of a normal input; errors by brute force on coarser grids."""
  found = strategies.search(
      {'x': Seen(silu(20_000))}, 4)['x']
  assert list(found) == list(strategies.STRATEGIES)
  assert found['signed FP'] == pytest.approx(6.1e-3, rel=0.1)
  assert found['unsigned FP'] == pytest.approx(2.3e-2, rel=0.1)
  assert 1.7e-3 < found['unsigned FP + zero point'] < 2.06e-3
  assert found['signed FP + zero point'] <= found['signed FP'] * (1 + 1e-9)


def test_shares_and_what_they_have_in_common():
  a, b = np.asarray([1.0, 3.0]), np.asarray([6.0, 2.0])
  np.testing.assert_allclose(timesteps.shares(a), [25, 75])
  assert timesteps.overlap(a, b) == pytest.approx(25 + 25)
  assert timesteps.overlap(a, 7 * a) == pytest.approx(100)
  assert not timesteps.shares(np.zeros(2)).any()


REAL = np.asarray([0.9, 0.4567891, 1e-3])


def test_real_timesteps_are_drawn_where_they_are():
  """Also those of flows, which end at 1."""
  figure = timesteps._shape(
      'x', REAL, 'loss', np.asarray([1.0, 3.0, 1.0]), np.asarray([9.0, 1, 1]))
  assert 'Largest at t\u00a0=\u00a00.4568 and t\u00a0=\u00a00.9;' in (
      figure.caption)
  axes = timesteps._axes(matplotlib.figure.Figure(), REAL)
  left, right = axes.get_xlim()
  assert left == pytest.approx(0.918) and right == pytest.approx(-0.018)


def test_a_router_over_real_timesteps():
  figure = routing._shares(REAL, {'a': np.asarray([0, 1, 1])})
  assert 'bank 0: 100% at t = 0.9, 0% at t = 0.001' in figure.caption


def test_the_share_of_each_bank():
  choices = {'a': np.asarray([0, 1, 1]), 'b': np.asarray([0, 0, 1]),
             'c': np.asarray([2, 0, 1])}
  np.testing.assert_allclose(routing.bank_shares(choices), [
      [2 / 3, 2 / 3, 0], [0, 1 / 3, 1], [1 / 3, 0, 0]])


def test_curves_are_means_over_whole_periods():
  steps, values = np.arange(1.0, 8.0), np.asarray([1, 3, 2, 4, 10, 0, 9])
  centre, mean, low, high = curves.binned(steps, values, 2, 100)
  assert centre.tolist() == [1.5, 3.5, 5.5, 7]
  assert mean.tolist() == [2, 3, 5, 9]
  assert low.tolist() == [1, 2, 0, 9] and high.tolist() == [3, 4, 10, 9]
  for few in (1, 2, 3):
    assert len(curves.binned(steps, values, 2, few)[0]) <= few


def test_curves_are_read_and_grouped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('\n'.join(json.dumps(row) for row in (
      {'step': 1, 'f/other': 5, 'f/bank_0': 1, 'f/t': 9, 'f/mse': None,
       'f/loss': 2},
      {'step': 2, 'f/bank_0': 0.5, 'f/t': 3, 'f/mse': 4, 'f/loss': 1})))
  found = curves.read(path)
  assert [a.tolist() for a in found['f/loss']] == [[1, 2], [2, 1]]
  assert [a.tolist() for a in found['f/mse']] == [[2], [4]]
  assert {title: list(names) for title, names in
          curves.grouped(found).items()} == {
      'loss': ['f/loss', 'f/mse'], 'share of each bank': ['f/bank_0'],
      'other': ['f/other']}
  # The last line of a training that was killed.
  path.write_text('{"step": 1, "f/loss": 3}\n{"st')
  assert [a.tolist() for a in curves.read(path)['f/loss']] == [[1], [3]]


def source(**changes):
  """Makes a run of full precision and two models; one has a hostile name."""
  full = spec_lib.LayerSpec('conv', 'NAL')
  fields = {
      'workdir': '', 'command': EVIL, 'row': EVIL,
      'results': {'dataset': EVIL, 'num_samples': 9, 'features': 'x',
                  'rows': ROWS, 'prompts': [EVIL, 'a cat']},
      'pictures': {name: np.zeros((4, 8, 8, 1), np.uint8)
                   for name in ('data', 'fp', EVIL)},
      'deployed': types.SimpleNamespace(choices={}), 'layers': {'a': full},
      'experiment': types.SimpleNamespace(
          plan=types.SimpleNamespace(num_steps=2))}
  return section_lib.Source(**fields | changes)


@pytest.mark.parametrize(
    'room', [layers_table, histograms, strategies, timesteps, routing, curves])
def test_sections_without_data_are_left_out(room, tmp_path):
  assert room.section(source(workdir=str(tmp_path))) is None


def test_the_overview_tells_what_is_quantized():
  experiment = types.SimpleNamespace(
      config={'seed': 7},
      plan=types.SimpleNamespace(timesteps=[500, 0]))
  text = lambda given: overview.section(given).content['text']
  given = source(experiment=experiment, row='fp')
  assert text(given) == 'Nothing is quantized.'
  results = given.results | {'reference': {'file': 'r.npz', 'vectors': 1234}}
  facts = dict(overview.section(
      source(experiment=experiment, results=results)).content['facts'])
  assert facts['reference: file'] == 'r.npz'
  assert facts['reference: vectors'] == '1,234'
  layers = {'a': layer('AAL', 'UE2M2'), 'b': layer('AAL', 'E2M1'),
            'c': layer('NAL', 'E2M1')}
  assert text(source(
      experiment=experiment, row='msfp', layers=layers)) == (
      'Shown in detail is msfp: fd_x 2.000 (full precision 1.000), 1,000 '
      'bytes (4,000). 3 of its 3 layers are quantized. AALs: 2, 1 of them in '
      'an unsigned format; NALs: 1.')


def test_what_comes_from_files_is_escaped():
  given = source(layers={EVIL: layer('AAL', 'UE2M2')})
  drawn = histograms._figure(  # a layer's name in a drawing
      'histogram-0', EVIL, layer('NAL', 'E2M1'), silu(256))
  html = page.render(page.title(given), [
      results_table.section(given), samples.section(given),
      layers_table.section(given),
      section_lib.figures('drawn', EVIL, EVIL, EVIL, [drawn])])
  found = page_lib.Page(html)
  assert len(found.all('script')) == 1
  assert EVIL not in html
  assert found.text.count(EVIL) >= 9
  assert 'a cat' in found.text
  assert EVIL in [attrs.get('data-method') for attrs in found.all('img')]
  assert [attrs['href'] for attrs in found.all('a')] == [
      '#results', '#samples', '#layers', '#drawn']
