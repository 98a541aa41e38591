"""The table of results."""

import types

from msfp_jax.run import evaluate


def test_rows_that_differ_by_a_colon_do_not_share_samples(tmp_path):
  """A recipe of one's own may have the name of another with its bits."""
  cfg = types.SimpleNamespace(num_samples=4, batch_size=2)
  experiment = types.SimpleNamespace(image_shape=(8, 8, 1))
  folders = [evaluate._store(experiment, cfg, tmp_path, name).folder
             for name in ('mine_w6a6', 'mine:w6a6')]
  assert folders[0] != folders[1]
  assert {folder.parent for folder in folders} == {tmp_path}


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
