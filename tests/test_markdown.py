"""Tables of text."""

from msfp_jax.base import markdown

ROWS = [['a', '1', ''], ['long name', '', '22']]


def test_aligned_columns_are_as_wide_as_their_widest_cell():
  assert markdown.table(['', 'x', 'yyy'], ROWS).splitlines() == [
      '|           | x | yyy |',
      '|-----------|---|-----|',
      '| a         | 1 |     |',
      '| long name |   | 22  |']


def test_columns_that_are_not_aligned_have_no_filling():
  found = markdown.table(['', 'x', 'yyy'], ROWS, aligned=False)
  assert found.splitlines() == [
      '|  | x | yyy |', '|---|---|---|', '| a | 1 |  |',
      '| long name |  | 22 |']


def test_a_table_may_be_empty():
  assert markdown.table(['a'], []).splitlines() == ['| a |', '|---|']
