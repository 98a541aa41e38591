"""Turns Matplotlib's drawings into SVG that stands inside an HTML page.

A drawing is made once, in stand-in colours; in the page they are CSS variables,
so that it follows the reader's light or dark mode. Its text stays text, in the
page's font. The same input gives the same bytes.
"""

from collections.abc import Callable
import io
import re
from xml.etree import ElementTree

import markupsafe
import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msfp_jax.report import numbers

# Of a drawing, in units of its viewBox: about CSS pixels on a phone, where it
# fills the column, so that text of this size is never below 11 pixels there.
WIDTH = 360
_FONT_SIZE = 12
# Stand-in colour -> CSS variable (templates/style.css).
_VARIABLES = {
    '#000001': 'ink', '#000002': 'muted', '#000003': 'rule',
    '#000004': 'blue', '#000005': 'orange', '#000006': 'green',
    '#000007': 'purple', '#000008': 'paper'}
_STAND_INS = {name: colour for colour, name in _VARIABLES.items()}
INK, MUTED, RULE, PAPER = (
    _STAND_INS[name] for name in ('ink', 'muted', 'rule', 'paper'))
# Colours that series take in this order.
BLUE, ORANGE, GREEN, PURPLE = SERIES = [
    _STAND_INS[name] for name in ('blue', 'orange', 'green', 'purple')]
# Series differ in these as well: not everyone sees the colours.
DASHES = ['-', (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
MARKERS = ['o', 's', '^', 'D']

_STYLE = {
    'axes.axisbelow': True, 'axes.edgecolor': MUTED, 'axes.grid': True,
    'axes.labelcolor': INK, 'axes.linewidth': 0.8, 'axes.spines.right': False,
    'axes.spines.top': False, 'axes.titlelocation': 'left',
    'axes.titlesize': _FONT_SIZE, 'axes.unicode_minus': True,
    'font.family': ['DejaVu Sans'], 'font.size': _FONT_SIZE,
    'grid.color': RULE, 'grid.linewidth': 0.6, 'hatch.linewidth': 0.8,
    'legend.fontsize': _FONT_SIZE, 'legend.frameon': False,
    'legend.handlelength': 1.8,
    'lines.linewidth': 1.8, 'svg.fonttype': 'none', 'svg.hashsalt': 'report',
    'text.color': INK, 'text.parse_math': False, 'xtick.color': MUTED,
    'xtick.labelcolor': INK, 'ytick.color': MUTED, 'ytick.labelcolor': INK,
}


def draw(id: str, height: float, label: str, paint: Callable[[Figure], None]
         ) -> markupsafe.Markup:
  """Draws an <svg> element.

  Args:
    id: begins the ids inside, so that drawings of one page do not collide.
    height: in units of which the drawing is `WIDTH` wide.
    label: what is seen, in words with true numbers, for those who do not.
    paint: draws on the figure it is given.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure((WIDTH / 72, height / 72), layout='constrained')
    paint(figure)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format='svg', transparent=True,
        metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
  # Matplotlib's file is of a document of its own; what follows makes it an
  # element of a page: without namespaces, metadata and fixed colours, with ids
  # of its own.
  root = ElementTree.fromstring(buffer.getvalue())
  _strip(root)
  _rename_ids(root, id)
  view_box = root.get('viewBox')
  root.attrib.clear()
  root.attrib |= {'viewBox': view_box, 'role': 'img', 'aria-label': label}
  return markupsafe.Markup(ElementTree.tostring(root, encoding='unicode'))


def _strip(root: ElementTree.Element) -> None:
  """Takes out namespaces and metadata; colours become the page's variables."""
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag.endswith(('}metadata', '}style')):
        parent.remove(child)
  for element in root.iter():
    element.tag = element.tag.rpartition('}')[2]
    element.text = (element.text or '').strip() or None
    element.tail = None
    for name in list(element.attrib):
      value = element.attrib.pop(name)
      if value in _VARIABLES:  # an attribute cannot hold a variable
        name, value = 'style', f'{name}: {value}'
      if name == 'style':
        value = re.sub(r'font-family:[^;]*;? ?', '', value)
        value = re.sub(r'#00000[1-8]\b',
                       lambda m: f'var(--{_VARIABLES[m[0]]})', value)
      if name == 'd':
        value = ' '.join(value.split())
      element.set(name.rpartition('}')[2], value)


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
  """Numbers the ids that something refers to, and drops the others."""
  # ids are referred to as '#id' and 'url(#id)', in any attribute.
  text = ' '.join(value for e in root.iter() for value in e.attrib.values())
  # In order of first use: equal drawings get equal ids, whatever Matplotlib
  # counted.
  used = dict.fromkeys(re.findall(r'#([\w-]+)', text))
  new = {old: f'{prefix}-{i}' for i, old in enumerate(used)}
  refer = lambda m: '#' + new[m[1]]
  for element in root.iter():
    old = element.attrib.pop('id', None)
    for name, value in element.attrib.items():
      element.set(name, re.sub(r'#([\w-]+)', refer, value))
    if old in new:
      element.set('id', new[old])


def log_axis(axes: Axes, axis: str) -> None:
  """Makes axis 'x' or 'y' logarithmic, with labels that need no TeX."""
  getattr(axes, f'set_{axis}scale')('log')
  low, high = getattr(axes, f'get_{axis}lim')()
  line = getattr(axes, f'{axis}axis')
  # Over a few decades, 2 and 5 have ticks as well.
  few = high < 200 * low
  line.set_major_locator(ticker.LogLocator(
      subs=(1, 2, 5) if few else (1,), numticks=6))
  line.set_major_formatter(lambda value, _: numbers.tick(value))
  line.set_minor_formatter(ticker.NullFormatter())


def legend_above(axes: Axes, columns: int = 2) -> None:
  """Names the series above the drawing, where they cover nothing."""
  axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=columns,
              borderaxespad=0.2, columnspacing=1.2, handletextpad=0.5)
