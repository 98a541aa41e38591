"""Bytes of packed files from shapes alone, against files that were written."""

import dataclasses
import functools
import json
import math

import flux_oracle
import marks
import numpy as np
import pytest

from benchmarks import packed_bytes
import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig
from msfp_jax.packed import streamed
from msfp_jax.quant import recipes
from msfp_jax.quant import roles
from msfp_jax.quant.fit import Seen

# Widths of 24, 36, 40 and 96: of groups of 16, 32 and 64 the last are short.
SMALL = dataclasses.replace(
    flux_oracle.TINY, num_layers=1, num_single_layers=1, num_heads=3,
    head_dim=8, axes_dims=(2, 4, 2), text_dim=40, pooled_dim=36)
MODEL, PLAN = Flux(SMALL), diffusion.flow_plan(2)
SEARCHED = 'int', 'unsigned_weights', 'mixup_weights'
# One of those whose weights are stored alike.
DIRECT = 'quartz_weights', 'nvfp4', 'int4_group', 'svdquant'
EVERY = (*DIRECT, *SEARCHED)


@functools.cache
def params():
  return flux_oracle.params_of(flux_oracle.state_of(SMALL))


@functools.cache
def activations():
  """What calibration would see: some channels are large, for SVDQuant."""
  rng, found = np.random.default_rng(0), {}
  for name, (inner, _) in flux_oracle.layers(SMALL).items():
    rows = rng.standard_normal((24, inner)).astype(np.float32)
    rows[:, ::13] *= 40
    if roles.follows_activation(name):
      rows = np.maximum(rows, np.float32(-0.17))
    found[name] = Seen(rows.ravel()[:512], float(rows.min()),
                       float(rows.max()), rows, np.abs(rows).max(0))
  return found


def exceptions_of(recipe):
  """Layers of 8 bits, but where all formats of 8 bits would be searched."""
  return {} if recipe in SEARCHED else None


@pytest.fixture
def packed(tmp_path, recipe):
  """(spec, the file that it becomes)."""
  spec = msfp.calibrate(
      MODEL, params(), recipe=recipe, activations=activations(),
      exceptions=exceptions_of(recipe))
  path = tmp_path / 'a.safetensors'
  msfp.save(path, msfp.pack(MODEL, params(), spec, PLAN))
  return spec, path


def part_of(name):
  if '.norm' in f'.{name}' and '.linear' in name:
    return 'adaLN'
  return ('single blocks' if name.startswith('single_') else
          'double blocks' if name.startswith('transformer_') else
          'embedders, last layer')


def parts_in(path):
  """({part: bytes}, {tensor: (shape, type)}), read from the file itself."""
  content = path.read_bytes()
  size = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8:8 + size])
  metadata = header.pop('__metadata__')
  found = dict.fromkeys(packed_bytes.PARTS, 0)
  found['header'] = 8 + size
  for name, tensor in header.items():
    begin, end = tensor['data_offsets']
    if name != 'channels':
      found[part_of(name)] += end - begin
  for name, _, _, letters, *_ in json.loads(metadata['layers']):
    outputs = header[f'{name}.codes']['shape'][-1]
    found[part_of(name)] += 4 * len(letters) * outputs
  for name, number in json.loads(metadata['vectors']).items():
    found[part_of(name.replace('/', '.'))] += 4 * number
  assert sum(found.values()) == len(content)
  return found, {name: (tuple(tensor['shape']), tensor['dtype'])
                 for name, tensor in header.items()}


@pytest.mark.parametrize('recipe', marks.slow(DIRECT, EVERY))
def test_a_file_has_the_bytes_that_shapes_say(packed, recipe):
  """To the byte, header included, and each part; and the spec is foreseen."""
  spec, path = packed
  job = packed_bytes.job_of(MODEL, PLAN)
  expected, tensors = parts_in(path)
  assert packed_bytes.bytes_of(streamed.contents_of(job, spec)) == expected
  held = streamed.contents_of(job, packed_bytes.spec_of(
      recipe, job, exceptions_of(recipe)))
  kinds = {'uint8': 'U8', 'float32': 'F32'}
  foreseen = {name: (shape.shape, kinds[shape.dtype.name])
              for name, shape in held.shapes.items()}
  if recipe == 'mixup_weights':
    # A layer has zero points or none, as its weights are best kept.
    tensors.pop('channels')
    foreseen.pop('channels')
  assert foreseen == tensors
  if not recipes.get(recipe).needs:
    assert packed_bytes.bytes_of(held) == expected


def test_parameters_by_part():
  found = packed_bytes.parameters_of(packed_bytes.job_of(MODEL, PLAN))
  expected = dict.fromkeys(packed_bytes.PARTS, 0)
  for name, shape in flux_oracle.shapes(SMALL).items():
    expected[part_of(name)] += math.prod(shape)
  assert found == expected


@pytest.mark.slow
def test_the_published_size():
  """A file of FLUX.1-schnell's size was written once: docs/usage.md."""
  job = packed_bytes.job_of(Flux(FluxConfig()), diffusion.flow_plan(20))
  sizes = packed_bytes.bytes_of(streamed.contents_of(
      job, packed_bytes.spec_of('nvfp4', job)))
  assert round(sum(sizes.values()) / 1e6) == 8545
  numbers = packed_bytes.parameters_of(job)
  assert sum(numbers.values()) == 11_891_178_560
  # Single blocks: codes, scales of 16 and of a tensor, biases, and two norms
  # of a head's width.
  channels = 3072
  layers = {'q': (1, 1), 'k': (1, 1), 'v': (1, 1), 'mlp': (1, 4),
            'attn': (1, 1), 'gelu': (4, 1)}
  expected = 0
  for name, (inner, outer) in layers.items():
    weights = inner * outer * channels**2
    expected += weights // 2 + weights // 16 + 4
    expected += 0 if name == 'gelu' else 4 * outer * channels
  assert sizes['single blocks'] == 38 * (expected + 2 * 4 * 128)


@pytest.mark.slow
def test_companions_have_the_published_numbers():
  found = packed_bytes.companions()
  assert found['autoencoder'] == 83_819_683
  assert found["CLIP-L's text encoder"] == 123_060_480
  assert found["T5-XXL's encoder"] == 4_762_310_656


def test_what_stands_around_and_is_not_known_is_refused():
  class Other(packed_bytes.FindAround):
    """Of one's own."""

  with pytest.raises(ValueError, match='Other.*not known'):
    packed_bytes._around(Other(), (16, 16), 4)
