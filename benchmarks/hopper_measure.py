"""Measures a case of `hopper_cases` on a GPU: whether right, and how fast."""

from collections.abc import Iterable, Iterator
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import hopper_absent
from benchmarks import hopper_cases
from benchmarks import hopper_checks
from benchmarks.hopper_cases import Case
from benchmarks.hopper_cases import Method

# Of bf16, of 8 bits, and of memory: the H200's as measured (8 bits: twice
# bf16), the H100's memory as its datasheet has it.
ROOFLINES = {'H200': (790e12, 1580e12, 4.3e12), 'H100': (790e12, 1580e12,
                                                         3.35e12)}
L2_BYTES = 50 * 2**20
LEAST = 0.15  # seconds of a run that is timed


def widens(hlo: str) -> bool:
  """Whether compiled code converts an 8-bit array before it multiplies."""
  types = dict(re.findall(r'%?([\w.-]+)(?: =|:) (\w+)\[', hlo))
  return any(
      types.get(operand) in ('s8', 'f8e4m3fn') and wide in ('f32', 'bf16')
      for wide, operand in re.findall(
          r'= (\w+)\[\S* convert\((?:\S+ )?%?([\w.-]+)\)', hlo))


def seconds(compiled, copies, least: float = LEAST, repeats: int = 3) -> float:
  """Times one product: the fastest of three runs of `least` seconds or more."""
  jax.block_until_ready(compiled(copies))
  best, calls = math.inf, 2
  for _ in range(repeats):
    while True:
      start = time.perf_counter()
      for _ in range(calls):
        y = compiled(copies)
      jax.block_until_ready(y)
      taken = time.perf_counter() - start
      if taken >= least:
        break
      calls = math.ceil(calls * min(10, 1.2 * least / taken + 1))
    best = min(best, taken / calls / len(copies))
  return best


def of_copies(function, args, size: int):
  """Compiles calls with inputs of their own, beyond the cache; and these.

  Args:
    function: what is timed.
    args: of a call.
    size: of what it reads and writes, in bytes.
  """
  count = max(1, min(16, math.ceil(4 * L2_BYTES / size)))
  copies = [jax.tree.map(jnp.copy, args) for _ in range(count)]
  function = jax.jit(function)  # lowered once for all copies
  return jax.jit(lambda copies: [
      function(*copy) for copy in copies]).lower(copies).compile(), copies


def measure(case: Case, method: Method, drawn, truth, roofline,
            least: float = LEAST) -> dict[str, Any]:
  """Measures a row: the time, whether right, and shares of the roofline."""
  x_bits = {'bf16': 16, 'int8': 8, 'fp8': 8}[method.carrier]
  size = case.bytes(x_bits, 4 if method.packed else x_bits)
  compiled, copies = of_copies(
      method.function, hopper_cases.arguments(method, drawn), size)
  error = float(largest_error(compiled(copies)[-1], *truth))
  # In the sum of magnitudes: y and the truth are rounded to bf16's 8 bits.
  bound = {'bf16': 2.0**-7, 'int8': 0.0,
           'fp8': hopper_checks.fp8_bound(case.length) + 2.0**-8}
  taken = seconds(compiled, copies, least)
  peak = roofline and roofline[0 if method.carrier == 'bf16' else 1]
  floor = roofline and max(case.flop / peak, size / roofline[2])
  row = {
      'us': taken * 1e6, 'tflops': case.flop / taken / 1e12,
      'tbps': size / taken / 1e12, 'share': floor and floor / taken,
      'error': error, 'working_set': size * len(copies)}
  if not error <= bound[method.carrier]:
    row['note'] = f'wrong: error {error:.2g} > {bound[method.carrier]:.2g}'
  elif method.carrier != 'bf16' and widens(compiled.as_text()):
    row['note'] = 'XLA widens the inputs'
  return row


@jax.jit
def largest_error(y, truth, magnitudes):
  """The largest |y - truth| of any element, over its sum of magnitudes."""
  return jnp.max(jnp.abs(y.astype(jnp.float32) - truth.astype(jnp.float32))
                 / magnitudes)


def truths(case: Case, drawn) -> tuple[jax.Array, jax.Array]:
  """Computes y by exact sums, and the sums of |x w|, scaled."""

  @jax.jit
  def run(x, w):
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    y = hopper_checks.exact(x, w, 1 if case.size else 0) * drawn['scale']
    return y.astype(jnp.bfloat16)

  x, w = jnp.asarray(drawn['x']), jnp.asarray(drawn['levels'])
  w = jnp.moveaxis(w, 0, -1)
  return run(x, w), run(jnp.abs(x), jnp.abs(w)).astype(jnp.float32)


def show(case: Case, method: Method, row, base: float | None) -> str:
  """Formats a row of the table; only right ones have a ratio."""
  cell = lambda key, form: format(row[key], form) if row.get(key) else ''
  ratio = (f'{base / row["us"]:.2f}x' if base and 'note' not in row else '')
  return ' | '.join([
      '', case.name, method.name, cell('us', '.1f'), ratio,
      cell('tflops', '.0f'), cell('tbps', '.2f'), cell('share', '.0%'),
      row.get('note', ''), '']).strip()


def run_case(case: Case, roofline, methods: Iterable[Method] | None = None,
             least: float = LEAST) -> Iterator[dict[str, Any]]:
  """Measures and prints the rows of a case; an error is a row's note.

  Args:
    case: what is computed.
    roofline: as in ROOFLINES, or None.
    methods: the ways; None for all of `hopper_cases.methods`.
    least: as for `seconds`.
  """
  drawn, base = hopper_cases.draw(case), None
  truth = truths(case, drawn)
  for method in hopper_cases.methods(case) if methods is None else methods:
    try:
      row = measure(case, method, drawn, truth, roofline, least)
    except Exception as error:  # noqa: BLE001 - the others go on
      row = {'note': hopper_absent.describe(error)}
    if method.carrier == 'bf16' and 'note' not in row:
      base = row['us']
    print(show(case, method, row, base), flush=True)
    yield dataclasses.asdict(case) | {
        'method': method.name, 'bf16_us': base, **row}
