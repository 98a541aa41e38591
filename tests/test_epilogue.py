"""Layers whose kernels scale and shift by row, against float64.

Through the door, with the chips' kernels in Pallas's interpreters: inputs with
scales and zeros of a token, pixel or image, and weights with zero points.
"""

import functools

import jax
from kernel_cases import Case
from kernel_cases import conv_case
from kernel_cases import prepared
import pytest

from msfp_jax.kernels import choice
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat

KERNELS = [
    'mosaic_tpu', pytest.param('mosaic_gpu', marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 11),
        reason='the interpreter of GPUs is complete since jax 0.11'))]


def block(fmt, shared):
  return Block(FPFormat.parse(fmt), shared)


# A dense layer of 3 x 5 tokens, convolutions of 2 images.
dense = functools.partial(Case, (3, 5, 37), (37, 9))
conv = functools.partial(conv_case, (2, 5, 6, 7), (3, 3, 7, 9), padding=1)
pointwise = functools.partial(conv_case, (2, 5, 6, 7), (1, 1, 7, 9))
CASES = {
    'scales of tokens': dense('E2M1', 'E2M1', inputs=block('E2M1', 'token')),
    'scales and zeros of tokens': dense(
        'E3M0', 'UE2M2', inputs=block('UE2M2', 'token')),
    'scales of pixels, by 2': pointwise(
        'E2M1', 'E1M2', inputs=block('E1M2', 'token'), strides=2),
    # Pixels beyond the border have no zero.
    'scales and zeros of images': conv(
        'E1M2', 'UE2M2', inputs=block('UE2M2', 'image')),
    'images by 2, without bias': conv(
        'E2M1', 'E2M1', inputs=block('E2M1', 'image'), strides=2, bias=False),
    'zeros of weights': conv('UE2M2', 'E2M1', zero=-1.0),
    'zeros of signed weights': dense('E2M1', 'UE1M3', zero=0.3, act_zero=-0.3),
    'zeros of both': conv('UE3M1', 'UE3M1', zero=-1.2, act_zero=-0.3),
    'zeros of both, by image': conv(
        'UE1M3', 'UE2M2', zero=-1.0, inputs=block('UE2M2', 'image')),
    'zeros of both, by token': dense(
        'UE2M2', 'UE3M1', zero=-1.0, inputs=block('UE3M1', 'token')),
    'far levels': dense('UE4M0', 'E2M1', zero=-1.0),
}


# Each part of the epilogue once; the rest are slow.
QUICK = ('scales and zeros of tokens', 'scales of pixels, by 2',
         'zeros of both, by image')


@pytest.mark.parametrize('implementation', KERNELS)
@pytest.mark.parametrize('name, carrier', [
    pytest.param(name, carrier, marks=[] if (
        carrier == 'int8' and name in QUICK) else pytest.mark.slow)
    for name in CASES for carrier in ('int8', 'bf16', 'fp8')
    if carrier == 'fp8' or name != 'far levels'])
def test_layers(monkeypatch, name, carrier, implementation):
  ops, case = choice.ops_of(implementation), CASES[name]
  for op in ('matmul', 'conv'):
    monkeypatch.setattr(ops, op, functools.partial(
        getattr(ops, op), interpret=True))
  if carrier == 'bf16' and implementation == 'mosaic_gpu':
    with pytest.raises(ValueError, match='x is bfloat16'):
      case.run(implementation=implementation, carrier=carrier)
    return
  # fp8 has no offsets: zero points of both sides cost it a digit.
  case.assert_close(
      case.run(prepared(case.packed, implementation), carrier=carrier,
               implementation=implementation),
      rtol=1e-5 if carrier == 'fp8' else 1e-6)
