"""What commands that turn a checkpoint SRC into a file DST are given."""

from collections.abc import Sequence

from absl import app
from absl import flags

CONFIG = flags.DEFINE_string(
    'config', None, 'config.json or CompVis yaml that describes the model.')
EMA = flags.DEFINE_bool(
    'ema', None, 'Take the moving average where the file has one; by default '
    'yes, unless the yaml says otherwise.')


def source_and_target(argv: Sequence[str]) -> tuple[str, str]:
  """SRC and DST of the command line, of which flags are taken already.

  Raises:
    app.UsageError: fewer arguments, or more.
  """
  if len(argv) != 3:
    raise app.UsageError('expected SRC and DST, got '
                         f'{len(argv) - 1} arguments')
  return argv[1], argv[2]
