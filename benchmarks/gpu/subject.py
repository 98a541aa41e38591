"""The model that stages c measure: CIFAR-10's UNet, or a toy of it."""

import pathlib

from benchmarks import packed_models
from msfp_jax.models.unet import UNetConfig
from msfp_jax.quant import spec as spec_lib

_TOY = UNetConfig(image_size=8, ch=8, ch_mult=(1,), num_res_blocks=0,
                  attn_resolutions=(), norm_groups=4, dropout=0.0)


def make(folder: pathlib.Path, num_steps: int, dry: bool
         ) -> packed_models.Subject:
  """Calibrates the model once; stages and calls that follow find its spec.

  Args:
    folder: of the stage; the spec lies beside it.
    num_steps: of the sampler.
    dry: whether the toy is made; it replaces benchmarks/packed_models' model in
      this process.
  """
  if dry:
    packed_models.CONFIG = _TOY
  path = folder.parent / f'spec_{num_steps}.json'
  spec = spec_lib.QuantSpec.load(path) if path.is_file() else None
  subject = packed_models.make(num_steps, spec)
  if spec is None:
    subject.spec.save(path)
  return subject
