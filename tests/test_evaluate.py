"""The table of results."""

from msfp_jax.run import evaluate


def test_the_table_is_aligned_and_empty_where_nothing_was_computed():
  results = {'features': 'x', 'rows': [
      {'name': 'fp', 'weight_bits': 32, 'fd': 1.23456, 'bytes': 2597316},
      # What is of every layer is no column.
      {'name': 'tuned', 'weight_bits': 4, 'fd': 12345.6, 'psnr': 20.0,
       'bytes': 400, 'sqnr': {'output': {'conv_in': 9.0}}}]}
  assert evaluate.table(results).splitlines() == [
      '| name  | weight_bits | fd    | bytes     | psnr   |',
      '|-------|-------------|-------|-----------|--------|',
      '| fp    | 32          | 1.235 | 2,597,316 |        |',
      '| tuned | 4           | 12346 | 400       | 20.000 |']
