"""What the TPU kernels' steps cost, from the schedules that libtpu makes.

  python -m benchmarks.tpu_cost v6e

No TPU is needed, only libtpu. Prints, for a chip of v5e, v6e and 7x, to how
many bundles of instructions (about one a cycle) steps are scheduled: first
single tiles, with the weights decoded in different ways in each step; then the
kernels with their own blocks. The parts of a kernel are, as far as the compiler
keeps them apart, decoding (once a tile of channels), for convolutions the
placing of patches (once a group of rows, or each step), the product (each
step), and the result (once a group of rows).
"""

from collections.abc import Callable
import functools
import glob
import os
import re
import sys
import tempfile

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from msfp_jax.kernels import carriers
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_tpu import decode as decode_lib
from msfp_jax.kernels.mosaic_tpu import ops as mosaic_tpu
from msfp_jax.quant import numbers as numbers_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.run import cli

TOPOLOGIES = {'v5e': 'v5e:2x2', 'v6e': 'v6e:2x2', '7x': 'tpu7x:2x2x1'}
# Without these libtpu looks for a TPU, and for other processes that use it.
LIBTPU_ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
WEIGHTS = numbers_lib.formats_of_width(4, signed=True)
# x and channels of the result, as in Stable Diffusion's U-Net.
MATMULS = (((4096, 320), 320), ((4096, 320), 1280), ((1024, 640), 640),
           ((512, 1280), 1280), ((512, 5120), 1280))
CONVS = (((2, 64, 64, 320), 320), ((2, 32, 32, 640), 640),
         ((2, 32, 32, 1920), 640), ((2, 16, 16, 1280), 1280),
         ((2, 8, 8, 2560), 1280))


def sharding(chip: str) -> jax.sharding.NamedSharding:
  """Returns a sharding on one device of a chip that need not be there."""
  device = topologies.get_topology_desc(
      platform='tpu', topology_name=TOPOLOGIES[chip]).devices[0]
  return jax.sharding.NamedSharding(
      jax.sharding.Mesh([device], ('x',)), jax.sharding.PartitionSpec())


def _bundles(on: jax.sharding.NamedSharding, dumps: str, name: str,
             function: Callable, *args) -> list[int]:
  """Counts the scheduled bundles of the parts of the kernel `name`.

  Parts are what branches part: what each step does and what some skip. Those
  of less than 50 bundles, the machinery between steps, are left out.
  """
  args = [jax.ShapeDtypeStruct(*a, sharding=on) for a in args]
  jax.jit(function).trace(*args).lower(lowering_platforms=('tpu',)).compile()
  # The clock begins the names of dumps, so that the last is the newest.
  found = glob.glob(f'{dumps}/*{name}*[0-9]-final_bundles.txt')
  parts, branched = [0], False
  with open(max(found)) as file:
    for line in file:
      if bundle := re.match(r'\s*0x[0-9a-f]+ +(\w+)? *:', line):
        if bundle[1] or branched:
          parts.append(0)
        parts[-1] += 1
        branched = 'sbr.rel' in line
  return [part for part in parts if part >= 50]


def _widened(packed, fmt, carrier):
  """Decodes in the obvious way: one code in a 32-bit lane."""
  words = packed.astype(jnp.int32)
  decoded = []
  for code in (words & 15, words >> 4):
    exponent = (code & 7) >> fmt.mantissa_bits
    mantissa = code & (2**fmt.mantissa_bits - 1)
    value = jnp.where(exponent == 0, mantissa, (
        mantissa + 2**fmt.mantissa_bits) << (jnp.maximum(exponent, 1) - 1))
    value = jnp.where(code > 7, -value, value)
    if carrier != 'int8':
      value = value.astype(jnp.float32)
    decoded.append(value.astype(carriers.DTYPES[carrier][0]))
  return decoded


def _decompressed(packed, flags, carrier):
  """Decodes QuaRTZ's weights."""
  return decode_lib.decode(packed, FPFormat.parse('E1M2'), carrier, flags,
                           FPFormat.parse('E1M6'))


def _tile(bundles, name, carrier, rows, decode=None, flag_group=0):
  """Counts a step of [rows, 512] x [512, 256], with decoding in each step.

  With flag_group, decode is handed FLAGs too.
  """
  depth, columns = 512, 256
  held, sums = carriers.DTYPES[carrier]

  def kernel(x, w, *flags_and_out):
    *flags, out = flags_and_out
    @pl.when(pl.program_id(2) == 0)
    def _():
      out[...] = jnp.zeros_like(out)

    weights = jnp.concatenate(decode(
        w[...], *[ref[:, 0] for ref in flags])) if decode else w[...]
    out[...] += lax.dot(x[...], weights, preferred_element_type=sums)

  packed = depth // 2 if decode else depth
  flags, specs = [], []
  if flag_group:
    shape = packed // flag_group, columns
    flags = [((2, 2, shape[0], 2 * columns), jnp.uint8)]
    specs = [pl.BlockSpec((2, 1, *shape), lambda i, j, k: (0, k, 0, j))]
  function = pl.pallas_call(
      kernel, grid=(2, 2, 2), name=name,
      in_specs=[pl.BlockSpec((rows, depth), lambda i, j, k: (i, k)),
                pl.BlockSpec((packed, columns), lambda i, j, k: (k, j)),
                *specs],
      out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
      out_shape=jax.ShapeDtypeStruct((2 * rows, 2 * columns), sums),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary')))
  count = bundles(
      name, function, ((2 * rows, 2 * depth), held),
      ((2 * packed, 2 * columns), jnp.uint8 if decode else held), *flags)
  return count, rows * depth * columns


def _tiles(bundles: Callable[..., list[int]], chip: str, carrier: str):
  """Yields (what, (bundles, products)) of tiles, plain and decoded."""
  for rows in (256, 1024):
    for plain in ('bf16', carrier):
      yield f'{rows} rows, {plain} weights', _tile(
          bundles, f'plain_{plain}_{rows}', plain, rows)
    for fmt in WEIGHTS:
      for how, decode in (('packed', decode_lib.decode),
                          ('widened', _widened)):
        yield f'{rows} rows, {fmt} to {carrier}, {how}', _tile(
            bundles, f'{how}_{fmt}_{rows}', carrier, rows,
            functools.partial(decode, fmt=fmt, carrier=carrier))
    exact = 'bf16' if carrier == 'fp8' else carrier  # which holds E1M6
    for group in (16, 32):
      yield f'{rows} rows, QuaRTZ by {group} to {exact}, packed', _tile(
          bundles, f'quartz_{group}_{rows}', exact, rows,
          functools.partial(_decompressed, carrier=exact), group)


def _kernels(bundles: Callable[..., list[int]], chip: str, carrier: str):
  """Yields (what, (bundles, products)) of steps of the kernels."""
  settings = {'fmt': WEIGHTS[1], 'out_dtype': jnp.bfloat16}
  size, dtype = carriers.DTYPES[carrier][0].dtype.itemsize, jnp.float32
  for x, n in MATMULS:
    cut = blocks_lib.matmul(x[0], x[1] // 2, n, size, 2, chip)
    yield f'matmul {x} to {n}: {cut}', (
        bundles('matmul', functools.partial(
            mosaic_tpu.matmul, **settings), (x, carriers.DTYPES[carrier][0]),
                ((x[1] // 2, n), jnp.uint8), ((n,), dtype), ((n,), dtype)),
        cut.rows * 2 * cut.half * cut.columns)
  for x, n in CONVS:
    cut = blocks_lib.conv(x[1:3], (3, 3), (1, 1), x[3] // 2, n, size, 2, chip)
    yield f'conv 3x3 {x} to {n}: {cut}', (
        bundles('conv', functools.partial(
            mosaic_tpu.conv, strides=(1, 1), padding=((1, 1), (1, 1)),
            **settings), (x, carriers.DTYPES[carrier][0]),
                ((3, 3, x[3] // 2, n), jnp.uint8), ((n,), dtype),
                ((*x[1:3], n), dtype)),
        cut.rows * x[2] * 3 * x[3] * cut.columns)


def main(argv: list[str]):
  if len(argv) != 2 or argv[1] not in TOPOLOGIES:
    sys.exit(f'{__doc__}\nerror: name a chip of {", ".join(TOPOLOGIES)}')
  chip = argv[1]
  carrier = blocks_lib.CHIPS[chip].carriers[0]
  jax.config.update('jax_platforms', 'cpu')
  blocks_lib.generation = lambda: chip
  with tempfile.TemporaryDirectory() as dumps:
    os.environ.update(LIBTPU_ENVIRONMENT, LIBTPU_INIT_ARGS=(
        f'--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true'))
    bundles = functools.partial(_bundles, sharding(chip), dumps)
    print(f'| {chip} | bundles of the parts | products |\n|---|---|---|')
    for make in (_tiles, _kernels):
      for what, (parts, products) in make(bundles, chip, carrier):
        print(f'| {what} | {" + ".join(map(str, parts))} | '
              f'{products / 1e6:.0f} M |', flush=True)


if __name__ == '__main__':
  cli.run(main)
