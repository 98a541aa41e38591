"""The memory of decoding large images, from XLA's own analysis; nothing runs.

  python -m benchmarks.decoding --side=1024

Of FLUX's first stage, whose weights are not even made: the temporary memory of
the compiled program, undivided and by rows.
"""

from collections.abc import Sequence

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from msfp_jax import convert
from msfp_jax.models import autoencoder
from msfp_jax.models import decode_rows

_SIDE = flags.DEFINE_integer('side', 1024, 'Of the images, in pixels.')
_BATCH = flags.DEFINE_integer('batch', 1, 'Images.')
_ROWS = flags.DEFINE_multi_integer(
    'rows', [0, 64, 32, 16], 'At a time; 0: undivided.')
FLUX = autoencoder.AutoencoderConfig(
    z_channels=16, embed_dim=16, quant_conv=False, scale=0.3611, shift=0.1159)


def temporary(side: int, batch: int, rows: int) -> int:
  """Bytes beside parameters and images that XLA's program takes.

  Args:
    side: of the images, a multiple of the first stage's stride.
    batch: images.
    rows: decoded at a time; 0 for all of the batch at once.
  """
  model = autoencoder.Autoencoder(FLUX)
  latent = side // FLUX.stride
  z = jax.ShapeDtypeStruct((batch, latent, latent, FLUX.embed_dim), jnp.float32)
  decode = lambda params, z: (
      decode_rows.decode(model, params, z, rows) if rows else
      model.apply({'params': params}, z, method='decode'))
  compiled = jax.jit(decode).lower(
      convert.abstract_autoencoder(model), z).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def main(unused_argv: Sequence[str]) -> None:
  print(f'{_BATCH.value} x {_SIDE.value} x {_SIDE.value} pixels, '
        f'{jax.devices()[0].device_kind}')
  for rows in _ROWS.value:
    size = temporary(_SIDE.value, _BATCH.value, rows)
    print(f'{f"{rows} rows" if rows else "undivided":>10}: {size / 1e9:.2f} GB',
          flush=True)


if __name__ == '__main__':
  app.run(main)
