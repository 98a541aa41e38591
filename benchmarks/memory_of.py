"""What memory one call takes: in a process of its own, for `streaming`.

  python -m benchmarks.memory_of pack SRC DST '{"recipe": "nvfp4"}'
  python -m benchmarks.memory_of load SRC '{}'

Prints the bytes of Python, JAX and this package, and those that came on top of
them at the peak; Linux only.
"""

import json
import sys
from typing import NamedTuple

import jax

import msfp_jax as msfp


class Memory(NamedTuple):
  """In bytes.

  Attributes:
    before: of Python, JAX and this package.
    peak: what came on top of it.
  """

  before: int
  peak: int


def _read(field: str) -> int:
  with open('/proc/self/status') as file:
    line, = (line for line in file if line.startswith(field))
  return 1024 * int(line.split()[1])


def _pack(source, target, options):
  options = json.loads(options)
  if 'spec' in options:
    options['spec'] = msfp.QuantSpec.load(options['spec'])
  return lambda: msfp.pack_streamed(source, target, **options)


def _load(source, options):
  options = json.loads(options)
  return lambda: msfp.load(source, **options)


def main(call: str, *arguments: str) -> None:
  work = {'pack': _pack, 'load': _load}[call](*arguments)
  jax.numpy.zeros(1).block_until_ready()
  before = _read('VmRSS')
  kept = work()
  jax.block_until_ready(getattr(kept, 'arrays', None))
  print(json.dumps(Memory(before, _read('VmHWM') - before)))


if __name__ == '__main__':
  main(*sys.argv[1:])
