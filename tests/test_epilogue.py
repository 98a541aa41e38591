"""Layers whose kernels scale by row or group, against float64.

Through the door, with the chips' kernels in Pallas's interpreters: inputs with
scales and zeros of a token, pixel or image, weights with zero points, and
scales of groups.
"""

import functools
import itertools

import jax
from kernel_cases import Case
from kernel_cases import conv_case
from kernel_cases import prepared
import pytest

from msfp_jax.kernels import choice
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat

INTERPRETED = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason='the interpreter of GPUs is complete since jax 0.11')


def block(fmt, *options):
  return Block(FPFormat.parse(fmt), *options)


# A dense layer of 3 x 5 tokens, convolutions of 2 images.
dense = functools.partial(Case, (3, 5, 37), (37, 9))
conv = functools.partial(conv_case, (2, 5, 6, 7), (3, 3, 7, 9), padding=1)
pointwise = functools.partial(conv_case, (2, 5, 6, 7), (1, 1, 7, 9))
CASES = {
    'scales of tokens': dense('E2M1', 'E2M1', inputs=block('E2M1', 'token')),
    'scales and zeros of tokens': dense(
        'E3M0', 'UE2M2', inputs=block('UE2M2', 'token')),
    'scales of tokens, 8 bits': dense(
        'E2M1', 'E1M6', inputs=block('E1M6', 'token')),
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
    'groups of weights': Case(
        (9, 130), (130, 9), 'E2M1', 'UE2M2', act_zero=-0.3, weights=block(
            'E1M2', 'group', 64)),
    'groups of weights, by token': Case(
        (2, 3, 4, 128), (128, 9), 'E2M1', 'UE2M2',
        inputs=block('UE2M2', 'token'), weights=block('E2M1', 'group', 128)),
    'groups of weights, window': conv_case(
        (2, 5, 6, 70), (3, 3, 70, 9), 'E2M1', 'UE2M2', padding=1, act_zero=-0.3,
        weights=block('E1M2', 'group', 64)),
    'NVFP4 weights': Case(
        (9, 192), (192, 9), 'E2M1', 'UE2M2', act_zero=-0.3, weights=block(
            'E2M1', 'group', 16, 'e4m3', True)),
    'NVFP4': Case(
        (9, 160), (160, 9), 'E2M1', 'E2M1',
        inputs=block('E2M1', 'group', 16, 'e4m3', True),
        weights=block('E2M1', 'group', 16, 'e4m3', True)),
    'MXFP4, window': conv_case(
        (2, 5, 6, 64), (3, 3, 64, 9), 'E2M1', 'E2M1', padding=1,
        inputs=block('E2M1', 'group', 32, 'e8m0'),
        weights=block('E2M1', 'group', 32, 'e8m0')),
    'MXFP4 weights, window': conv_case(
        (2, 5, 6, 64), (3, 3, 64, 9), 'E2M1', 'E2M1', padding=1,
        inputs=block('UE2M2', 'image'),
        weights=block('E2M1', 'group', 32, 'e8m0')),
    'groups of 16 in bfloat16': Case(
        (9, 144), (144, 9), 'E2M1', 'UE2M2', act_zero=-0.3, weights=block(
            'E1M2', 'group', 16, 'bf16')),
    'groups of both, zeros of weights': Case(
        (9, 80), (80, 9), 'UE2M2', 'E2M1', zero=-1.0,
        inputs=block('E1M2', 'group', 16, 'bf16')),
    'groups of both': Case(
        (9, 160), (160, 9), 'E2M1', 'E2M1',
        inputs=block('E1M2', 'group', 64, 'bf16'),
        weights=block('E1M2', 'group', 32, 'bf16')),
    'far levels': dense('UE4M0', 'E2M1', zero=-1.0),
}


# Each part of the epilogue once; the rest are slow.
QUICK = ('scales and zeros of tokens', 'scales of pixels, by 2',
         'zeros of both, by image', 'groups of weights, by token',
         'NVFP4')
CARRIERS = {'mosaic_tpu': ('int8', 'bf16', 'fp8'),
            'mosaic_gpu': ('int8', 'fp8')}


def chip_cases():
  """(name, implementation, carrier) that are taken."""
  for name, chip in itertools.product(CASES, CARRIERS):
    taken = CARRIERS[chip]
    if 'FP4' in name:
      taken = ('bf16',) if chip == 'mosaic_tpu' else taken
    elif 'groups' in name:
      taken = {'mosaic_tpu': (), 'mosaic_gpu': taken}[chip]
    elif '8 bits' in name:
      taken = [carrier for carrier in taken if carrier != 'fp8']
    elif name == 'far levels':
      taken = ('fp8',)
    for carrier in taken:
      marks = [] if name in QUICK and carrier == taken[0] else [
          pytest.mark.slow]
      if chip == 'mosaic_gpu':
        marks.append(INTERPRETED)
      yield pytest.param(name, chip, carrier, marks=marks)


@pytest.mark.parametrize('name, implementation, carrier', list(chip_cases()))
def test_layers(monkeypatch, name, implementation, carrier):
  ops, case = choice.ops_of(implementation), CASES[name]
  for op in ('matmul', 'conv'):
    monkeypatch.setattr(ops, op, functools.partial(
        getattr(ops, op), interpret=True))
  # fp8 has no offsets: zero points of both sides cost it a digit.
  case.assert_close(
      case.run(prepared(case.packed, implementation), carrier=carrier,
               implementation=implementation),
      rtol=1e-5 if carrier == 'fp8' else 1e-6)
