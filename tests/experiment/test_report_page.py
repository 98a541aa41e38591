"""The report.html of a whole run: what is in it, and that it stands alone."""

import re

import page as page_lib
import pytest
import runs

from msfp_jax.run import evaluate

SECTIONS = ['overview', 'results', 'samples', 'layers', 'histograms',
            'strategies', 'timesteps', 'routing', 'curves']
# Each with an image or a drawing.
SHOWN = SECTIONS[2:3] + SECTIONS[4:]


@pytest.fixture(scope='module')
def html(reported):
  return (reported / 'report.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def page(html):
  return page_lib.Page(html)


def parts(html):
  """Splits the page, {section: its HTML}."""
  found = re.findall(r'<section id="(\w+)"(.*?)</section>', html, re.S)
  return dict(found)


def test_all_sections_are_there_in_order_and_linked(page, html):
  assert [attrs['id'] for attrs in page.all('section')] == SECTIONS
  assert [attrs['href'] for attrs in page.all('a')] == [
      f'#{name}' for name in SECTIONS]
  for name, part in parts(html).items():
    assert re.search(r'<h2 [^>]*>[^<]+</h2>', part), name


def test_the_page_is_well_formed(page):
  assert not page.open
  assert len(page.ids) == len(set(page.ids))
  targets = [value.removeprefix('#') for _, attrs in page.elements
             for name, value in attrs.items()
             if name == 'aria-labelledby' or value and value.startswith('#')]
  assert targets and set(targets) <= set(page.ids)


def test_nothing_is_loaded_from_elsewhere(page, html):
  addresses = [value for _, attrs in page.elements
               for name, value in attrs.items()
               if name in ('src', 'href', 'action', 'data', 'poster')]
  assert addresses
  assert all(address.startswith(('#', 'data:')) for address in addresses)
  assert 'url(http' not in html and '@import' not in html
  assert not re.search(r'(https?:)?//\w', re.sub(r'base64,[^"]+', '', html))


def test_every_figure_has_an_alt_text_with_numbers_and_a_caption(html):
  found = parts(html)
  for name in SHOWN:
    figures = re.findall(r'<figure>(.*?)</figure>', found[name], re.S)
    assert figures, name
    for figure in figures:
      assert re.search(r'<figcaption>.{4,}</figcaption>', figure, re.S), name
      alt, = re.findall(r'(?:aria-label|alt)="([^"]+)"', figure)
      assert re.search(r'\d', alt), alt
      assert '<svg' not in figure or 'role="img"' in figure


def test_the_command_and_the_config_are_in_it(page):
  assert 'python eval.py --workdir=<run> & more' in page.text
  assert '"num_updates": 6' in page.text


def test_the_tables_hold_every_row_and_layer(page):
  for name in ('fp', 'msfp', 'tuned', 'conv_in', 'conv_out'):
    assert name in page.text
  assert len(page.all('img')) == 4 + 2  # data and rows; two of the slider


def test_without_asking_there_is_none(trained):
  """No report is written where eval.report is False, as it is in the tests."""
  assert not (trained / 'report.html').exists()


@pytest.mark.long
def test_the_same_command_writes_the_same_page(copy, npz, html):
  evaluate.run(runs.config_of(npz, {'eval.report': True}), str(copy),
               'python eval.py --workdir=<run> & more')
  assert (copy / 'report.html').read_text(encoding='utf-8') == html
