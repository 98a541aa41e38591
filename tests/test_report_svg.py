"""Drawings inside the page: colours, ids, text, the same bytes."""

import pathlib
import re
from xml.etree import ElementTree

import pytest

from msfp_jax.report import numbers
from msfp_jax.report import svg

STYLE = (pathlib.Path(svg.__file__).parent / 'templates/style.css').read_text()


def paint(figure):
  axes = figure.add_subplot()
  axes.plot([1, 20, 300], [1e-6, 0.02, 3], color=svg.BLUE, label='<b> $x$')
  axes.fill_between([1, 300], 1e-6, 1, color=svg.ORANGE, alpha=0.3, hatch='//')
  svg.log_axis(axes, 'y')
  svg.legend_above(axes)


@pytest.fixture(scope='module')
def drawn():
  return svg.draw('one', 200, 'a "label" & more', paint)


def test_it_says_what_is_seen_and_scales(drawn):
  root = ElementTree.fromstring(drawn)
  assert root.tag == 'svg'
  assert root.attrib == {'viewBox': '0 0 360 200', 'role': 'img',
                         'aria-label': 'a "label" & more'}


def test_all_colours_are_variables_of_the_style_sheet(drawn):
  assert not re.search('#[0-9a-f]{6}', drawn)
  used = set(re.findall(r'var\(--(\w+)\)', drawn))
  assert {'ink', 'blue', 'orange'} <= used
  assert used <= set(re.findall(r'--(\w+): #', STYLE))


def test_ids_are_those_referred_to_under_the_drawings_name(drawn):
  ids = re.findall(r' id="([^"]+)"', drawn)
  assert ids and len(ids) == len(set(ids))
  assert all(name.startswith('one-') for name in ids)
  assert set(re.findall(r'#([\w-]+)', drawn)) == set(ids)


def test_text_stays_text_of_readable_size(drawn):
  root = ElementTree.fromstring(drawn)
  texts = {element.text: element.get('style') for element in root.iter('text')}
  assert '<b> $x$' in texts
  assert {'0.01', '1'} <= texts.keys()
  for style in texts.values():
    # 358 pixels are what a phone 390 wide leaves of it.
    size = float(re.search(r'font-size: ([\d.]+)px', style)[1])
    assert size * 358 / svg.WIDTH >= 11
    assert 'family' not in style


def test_the_same_drawing_has_the_same_bytes(drawn):
  assert svg.draw('one', 200, 'a "label" & more', paint) == drawn


def luminance(colour):
  """Computes the relative luminance of WCAG 2.2."""
  channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
  r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055)**2.4
             for c in channels)
  return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
  low, high = sorted(map(luminance, (a, b)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('mode', [0, 1], ids=['light', 'dark'])
def test_text_and_marks_have_contrast(mode):
  blocks = re.findall(r':root \{(.*?)\}', STYLE, re.S)
  assert len(blocks) == 2
  colours = dict(re.findall(r'--(\w+): (#[0-9a-f]{6})', blocks[mode]))
  for name in ('ink', 'muted', 'blue'):
    assert contrast(colours[name], colours['paper']) >= 4.5, name
  assert contrast(colours['ink'], colours['raised']) >= 4.5
  assert contrast(colours['ink'], colours['mark']) >= 4.5
  for name in ('blue', 'orange', 'green', 'purple'):
    assert contrast(colours[name], colours['paper']) >= 3, name


@pytest.mark.parametrize('value, text', [
    (0, '0'), (0.0123456, '0.0123'), (1.23456e-5, '1.23·10⁻⁵'), (12.34, '12.3'),
    (999.9, '1,000'), (123456.0, '123,456'), (-0.25, '-0.250'),
    (2.5e12, '2.50·10¹²')])
def test_numbers_have_three_significant_digits(value, text):
  assert numbers.significant(value) == text


@pytest.mark.parametrize('value, text', [
    (1, '1'), (0.001, '0.001'), (10000, '10000'), (1e-5, '10⁻⁵'),
    (2e-7, '2·10⁻⁷'), (1e6, '10⁶')])
def test_ticks_need_no_tex(value, text):
  assert numbers.tick(value) == text
