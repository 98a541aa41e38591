"""The picture of layers by methods holds all of them, readable."""

import re
import types

import page as page_lib
import pytest

from msfp_jax.report import heat_map
from msfp_jax.report import page

EVIL = '<script>alert("1")</script>'
LAYERS = [f'down.{i}.conv' for i in range(64)] + [EVIL]
METHODS = [f'method {i}' for i in range(14)] + [EVIL]


def section(rows):
  return heat_map.section(types.SimpleNamespace(results={'rows': rows}))


def row(name, output, **parts):
  return {'name': name, 'weight_bits': 4, 'act_bits': 4,
          'sqnr': {'output': output, **parts}}


def cells(rows):
  """{(layer, method): attributes and text} of the rendered page."""
  html = page.render('title', [section(rows)])
  body = html[html.index('<tbody>'):html.index('</tbody>')]
  names = [re.sub('<.*?>', '', name) for name in re.findall(
      r'<th scope="col">(.*?)</th>', html)]
  found = {}
  for line in re.findall(r'<tr>(.*?)</tr>', body):
    layer, = re.findall(r'<th scope="row">(.*?)</th>', line)
    for name, cell in zip(
        names, re.findall(r'<td(.*?)</td>', line), strict=True):
      found[layer, name] = cell
  return html, found


def test_every_layer_and_method_has_its_number():
  values = {(layer, name): 5.0 + i + 2 * j for i, layer in enumerate(LAYERS)
            for j, name in enumerate(METHODS)}
  html, found = cells([row(name, {layer: values[layer, name]
                                  for layer in LAYERS}) for name in METHODS])
  escaped = lambda name: name.replace('<', '&lt;').replace(
      '>', '&gt;').replace('"', '&#34;')
  assert len(found) == 65 * 15
  for (layer, name), value in values.items():
    assert found[escaped(layer), escaped(name)].endswith(f'>{value:.0f}')
  parsed = page_lib.Page(html)
  assert EVIL not in html and not parsed.open
  assert len(parsed.all('script')) == 1
  # Only the figure scrolls sideways.
  scroll = html.index('<div class="scroll"')
  assert html.index('<figure class="wide">') < scroll < html.index(
      '<table class="heat">')


def test_colours_tell_above_and_below_the_median():
  _, found = cells([row('a', {'x': 10.0, 'y': 20.0, 'z': 30.0})])
  assert 'var(--orange) 55%' in found['x', 'a']
  assert ' 0%' in found['y', 'a']
  assert 'var(--blue) 55%' in found['z', 'a']


@pytest.mark.parametrize('value, part', [
    (15.0, '--blue) 28%'), (5.0, '--orange) 28%'), (99.0, '--blue) 55%')])
def test_colours_grow_up_to_where_text_is_readable(value, part):
  assert part in heat_map.shade(value, middle=10.0, reach=10.0)


def test_a_title_tells_what_weights_and_input_cost():
  _, found = cells([row('a', {'x': 18.04}, weight={'x': 21.26}),
                    row('b', {'y': 3.0})])
  assert 'title="18.0 dB, weights alone 21.3 dB"' in found['x', 'a']
  assert 'title="not quantized, or without error"' in found['y', 'a']
  assert found['y', 'a'].endswith('>')


def test_the_best_and_the_worst_in_words():
  text = section([row('a', {'x': 10.0, 'y': 30.0}),
                  row('b', {'x': 12.0, 'y': 31.0})]).content['label']
  assert text == ('Highest on average: b, 21.5 dB. Lowest: a on x, 10.0 dB.')


def test_without_errors_there_is_no_picture():
  assert section([{'name': 'fp', 'weight_bits': 32},
                  row('a', {})]) is None
