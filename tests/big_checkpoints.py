"""Checkpoints of gigabytes, made shard by shard of random bfloat16."""

import json

import flux_oracle
import ml_dtypes
import numpy as np
import safetensors.numpy


def write_flux(folder, config, shards):
  """Writes diffusers' folder; returns the bytes of its weights."""
  shapes = flux_oracle.shapes(config)
  names, places = list(shapes), {}
  rng, total = np.random.default_rng(0), 0
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(
      json.dumps(flux_oracle.config_json(config)))
  for i, part in enumerate(np.array_split(np.arange(len(names)), shards)):
    file = f'part-{i + 1}-of-{shards}.safetensors'
    tensors = {names[j]: _random(rng, shapes[names[j]]) for j in part}
    safetensors.numpy.save_file(tensors, folder / file)
    total += sum(value.nbytes for value in tensors.values())
    places |= dict.fromkeys(tensors, file)
  (folder / 'diffusion_pytorch_model.safetensors.index.json').write_text(
      json.dumps({'weight_map': places}))
  return total


def _random(rng, shape):
  """Magnitudes of 2^-7 to 2^-5, of both signs."""
  bits = rng.integers(0, 2**16, shape, np.uint16)
  # bfloat16 is a sign, 8 bits of exponent, 7 of mantissa: all but the last bit
  # of the exponent is set.
  return (bits & np.uint16(0x80ff) | np.uint16(0x3c00)).view(
      ml_dtypes.bfloat16)
