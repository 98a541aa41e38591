"""Parses an HTML page, for the tests of the report."""

from html import parser

VOID = {'meta', 'link', 'img', 'input', 'br', 'wbr'}


class Page(parser.HTMLParser):
  """A page's elements in order, as (tag, attributes), and its visible text.

  Attributes:
    elements: [(tag, {attribute: value})].
    text: all of it but styles and scripts.
    open: tags that were never closed, or closed in a wrong order.
  """

  def __init__(self, html: str):
    super().__init__()
    self.elements, self.text, self.open = [], '', []
    self.feed(html)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, f'</{tag}> within {self.open}'
    self.open.pop()

  def handle_data(self, data):
    if not self.open or self.open[-1] not in ('style', 'script'):
      self.text += data

  def all(self, tag):
    """The attributes of all elements of a tag."""
    return [attrs for name, attrs in self.elements if name == tag]

  @property
  def ids(self):
    return [attrs['id'] for _, attrs in self.elements if 'id' in attrs]
