"""report.html in headless Chromium, from file:// (`make browser`)."""

import os
import shutil

import pytest

pytestmark = pytest.mark.browser

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update',
         '--disable-sync']
NAMES = ('chromium', 'chromium-browser', 'google-chrome')


def executable():
  named = os.environ.get('CHROMIUM')
  found = named or next(filter(None, map(shutil.which, NAMES)), None)
  if found is None or shutil.which(found) is None:
    pytest.fail(
        f'no Chromium: {named or " or ".join(NAMES)} is not there. Install it '
        '(Debian, Ubuntu: apt-get install chromium), or name one: '
        'CHROMIUM=/path/to/chrome make browser', pytrace=False)
  return found


@pytest.fixture(scope='module')
def browser():
  try:
    from playwright import sync_api
  except ImportError:
    pytest.fail('no playwright: `make browser` installs it (or pip install -r '
                'tests/browser-requirements.txt)', pytrace=False)
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=executable(), args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(params=[(scheme, width) for scheme in ('light', 'dark')
                        for width in (390, 1280)],
                ids=lambda p: f'{p[0]}-{p[1]}')
def page(request, browser, reported):
  """The page, which must neither complain nor ask for anything else."""
  scheme, width = request.param
  context = browser.new_context(
      color_scheme=scheme, viewport={'width': width, 'height': 844})
  page = context.new_page()
  complaints, requests = [], []
  page.on('console', lambda message: complaints.append(message.text))
  page.on('pageerror', lambda error: complaints.append(str(error)))
  page.on('request', lambda request: requests.append(request.url))
  address = (reported / 'report.html').as_uri()
  page.goto(address)
  yield page
  context.close()
  assert not complaints
  asked = [url for url in requests if not url.startswith('data:')]
  assert asked == [address]


def test_every_section_and_figure_is_seen(page):
  sections = page.query_selector_all('main > section')
  assert len(sections) == 9
  figures = page.query_selector_all('figure svg, figure img, .stack img')
  assert len(figures) > 12
  for element in sections + figures:
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    assert element.is_visible() and box['width'] > 100 and box['height'] > 50
    assert box['x'] >= 0
    assert box['x'] + box['width'] <= page.viewport_size['width']


def test_the_page_does_not_scroll_sideways(page):
  assert page.evaluate('document.documentElement.scrollWidth') <= (
      page.viewport_size['width'])


def test_texts_in_drawings_are_readable(page):
  """Texts in drawings are at least 11 pixels high."""
  sizes = page.evaluate('''() => [...document.querySelectorAll('svg text')].map(
      (text) => parseFloat(getComputedStyle(text).fontSize)
          * text.getScreenCTM().a)''')
  assert len(sizes) > 50
  upright = [size for size in sizes if size > 1]  # turned ones have a = 0
  assert min(upright) >= 11


def test_the_mode_changes_ink_and_paper(page):
  paper, ink = page.evaluate('''() => [
      getComputedStyle(document.body).backgroundColor,
      getComputedStyle(document.querySelector('svg text')).fill]''')
  light = page.evaluate("matchMedia('(prefers-color-scheme: light)').matches")
  brightness = lambda colour: sum(map(int, colour[4:-1].split(',')))
  assert (brightness(paper) > brightness(ink)) == light


def test_the_slider_works_by_keyboard_and_shows_what_is_chosen(page):
  slider = page.locator('.compare input[type=range]')
  cut = lambda: page.evaluate(
      "document.querySelector('.stack').style.getPropertyValue('--cut')")
  slider.focus()
  assert cut() == '50%'
  page.keyboard.press('ArrowRight')
  assert cut() == '51%'
  page.keyboard.press('Home')
  assert cut() == '0%'
  source = lambda selector: page.locator(selector).get_attribute('src')
  page.locator('.compare select[data-side=left]').select_option('data')
  assert source('.stack img[data-side=left]') == source(
      'img[data-method=data]')
  assert source('.stack img[data-side=right]') == source(
      'img[data-method=tuned]')


def column(page, index):
  return [cell.get_attribute('data-value') for cell in
          page.query_selector_all(
              f'#layers-table tbody tr:not([hidden]) '
              f'td:nth-child({index + 1})')]


def test_a_heading_sorts_and_the_class_filters(page):
  headings = page.locator('#layers-table th')
  index = [text.strip() for text in headings.all_inner_texts()].index('MSE')
  before = column(page, index)
  for order, state in ((1, 'ascending'), (-1, 'descending')):
    headings.nth(index).locator('button').press('Enter')
    assert headings.nth(index).get_attribute('aria-sort') == state
    values = [float(value) for value in column(page, index) if value]
    assert values == sorted(values)[::order]
  assert sorted(column(page, index)) == sorted(before)
  page.locator('#layers-filter select').select_option('AAL')
  kinds = column(page, 3)
  assert set(kinds) == {'AAL'} and len(kinds) < len(before)
