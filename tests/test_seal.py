"""Digests: no damage to a file of ours loads as another content."""

import json
import logging

from damaged_ours import OURS as DAMAGED
import jax.numpy as jnp
import numpy as np
from packed_files import assert_equal
from packed_files import rewrite
import pytest
import tiny
import toy

from msfp_jax.base import seal
from msfp_jax.convert import native
from msfp_jax.diffusion.origin import Origin
from msfp_jax.metrics import frechet
from msfp_jax.metrics import stats_file
from msfp_jax.models import unet
from msfp_jax.packed import file as packed_file
from msfp_jax.quant import numbers
from msfp_jax.quant.spec import QuantSpec


def of_packed(path):
  packed_file.save(path, toy.deployed().packed(), command='by hand')
  first = packed_file.load(path, model=toy.Toy())
  return first, lambda: packed_file.load(path, model=toy.Toy()), assert_equal


def of_spec(path):
  toy.spec().save(path)
  same = lambda a, b: np.testing.assert_equal(a.to_json(), b.to_json())
  return QuantSpec.load(path), lambda: QuantSpec.load(path), same


def of_stats(path):
  rng = np.random.default_rng(0)
  gaussian = lambda size: frechet.Gaussian(
      rng.standard_normal(size), np.eye(size), 7)
  stats_file.save(path, stats_file.Reference(
      gaussian(4), gaussian(3), {'features': 'digits'},
      np.float32(rng.standard_normal((5, 4)))))

  def same(a, b):
    np.testing.assert_equal(a.provenance, b.provenance)
    np.testing.assert_array_equal(a.vectors, b.vectors)
    for one, other in ((a.pool, b.pool), (a.spatial, b.spatial)):
      for field in ('mean', 'cov', 'num_samples'):
        np.testing.assert_array_equal(
            getattr(one, field), getattr(other, field))

  return stats_file.load(path), lambda: stats_file.load(path), same


def of_native(path):
  model = unet.UNet(tiny.CONFIG)
  native.save_pretrained(path, model, tiny.params(tiny.UNET), seed='0')
  return native.load_pretrained(path), lambda: native.load_pretrained(
      path), lambda a, b: tiny.assert_trees_equal(a[1], b[1])


OURS = {'packed': of_packed, 'spec': of_spec, 'stats': of_stats}
COUNTS = [pytest.param(50, id='some'),
          pytest.param(1000, id='1000', marks=pytest.mark.slow)]


@pytest.fixture(params=OURS)
def file(request, tmp_path):
  path = tmp_path / request.param
  return path, *OURS[request.param](path)


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('cut', [False, True])
def test_damage_is_refused_or_makes_no_difference(file, count, cut):
  """Bits flipped one at a time, the header's as often; or the end cut off."""
  path, first, load, same = file
  content = path.read_bytes()
  rng = np.random.default_rng(1)
  refused = 0
  for i in range(count):
    if cut:
      damaged = content[:rng.integers(len(content))]
    else:
      damaged = bytearray(content)
      place = rng.integers(len(content) if i % 2 else min(600, len(content)))
      damaged[place] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    try:
      found = load()
    except ValueError as error:
      refused += 1
      assert str(error)
    else:
      same(found, first)
  assert refused > 0.7 * count


def test_a_teacher_of_ours_is_sealed(tmp_path):
  path = tmp_path / 'model.safetensors'
  _, load, _ = of_native(path)
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match='is damaged, or was changed'):
    load()


@pytest.mark.parametrize('old', [False, True])
def test_damage_to_a_teachers_header_is_seen_without_its_tensors(
    tmp_path, old):
  path = tmp_path / 'model.safetensors'
  origin = Origin('a', {'name': 'linear', 'beta_end': 0.02})
  native.save_pretrained(path, tiny.UNET, tiny.params(tiny.UNET), origin)
  assert native.load_origin(path).schedule['beta_end'] == 0.02
  content = path.read_bytes()
  if old:  # a header's digest by no name is none; then all of it is read
    content = content.replace(b'header_digest', b'header_digost')
    path.write_bytes(content)
    with pytest.raises(ValueError, match='is damaged, or was changed'):
      native.load_origin(path)
  path.write_bytes(content.replace(b'0.02', b'0.03'))
  with pytest.raises(ValueError, match='is damaged, or was changed'):
    native.load_origin(path)
  with pytest.raises(ValueError, match='is damaged, or was changed'):
    native.load_pretrained(path)


def test_older_files_load_with_a_warning(file, caplog):
  path, first, load, same = file
  with caplog.at_level(logging.WARNING):
    same(load(), first)
  assert not caplog.records
  if path.name == 'packed':
    rewrite(path)
  elif path.name == 'spec':
    content = json.loads(path.read_text())
    del content['digest']
    path.write_text(json.dumps(content))
  else:
    with np.load(path) as arrays, open(path.with_name('old'), 'wb') as opened:
      np.savez(opened, **{name: value for name, value in arrays.items()
                          if name != 'digest'})
    path.with_name('old').rename(path)
  with caplog.at_level(logging.WARNING):
    same(load(), first)
  assert 'has no digest' in caplog.text


def test_other_tools_statistics_load_without_a_word(tmp_path, caplog):
  np.savez(tmp_path / 'theirs.npz', mu=np.zeros(3), sigma=np.eye(3))
  with caplog.at_level(logging.WARNING):
    assert stats_file.load(tmp_path / 'theirs.npz').pool.num_samples is None
  assert not caplog.records


def test_a_spec_that_was_changed_on_purpose(tmp_path):
  path = tmp_path / 'spec.json'
  text = toy.spec().to_json()
  path.write_text(text.replace('conv_in', 'conv_on'))
  with pytest.raises(ValueError, match="delete 'digest' from it"):
    QuantSpec.load(path)
  # How it is written does not matter, nor in which order.
  path.write_text(json.dumps(json.loads(text), indent=3, sort_keys=True))
  assert QuantSpec.load(path).to_json() == text


def test_digests_tell_all_parts_apart():
  """Values, types, shapes, names, header; not the order of the latter."""
  base = {'a': np.zeros(4, np.uint8), 'b': np.zeros((), jnp.bfloat16)}
  digest = lambda content, arrays: seal.digest_of(
      content, {name: lambda value=value: value
                for name, value in arrays.items()})
  found = [digest({'x': 1}, arrays) for arrays in (
      base, base | {'a': np.zeros(4, np.int8)}, {'a': base['a']},
      base | {'a': np.zeros((2, 2), np.uint8)}, base | {'b': np.zeros(1)},
      {'c': base['a'], 'b': base['b']},
      base | {'a': np.uint8([0, 0, 0, 1])})] + [digest({'x': 2}, base)]
  assert len({*found}) == len(found)
  assert digest({'y': 2, 'x': 1}, base) == digest({'x': 1, 'y': 2}, base)
  strided = {**base, 'a': np.zeros(8, np.uint8)[::2]}
  assert digest({'x': 1}, strided) == found[0]


@pytest.mark.parametrize('bits', [
    3, 6, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (5, 7))])
def test_codes_take_their_bits_in_a_file(tmp_path, bits):
  """Codes of a layer, by the sizes of files of b and of 8 bits."""
  def size(bits):
    fmt = str(numbers.formats_of_width(bits, True)[0])
    row = toy.layer(toy.quantizer(fmt, 64), toy.quantizer(fmt))
    kernel = np.zeros((1, 3, 3, 64, 64), np.float32)
    weight = row.weight.quantize_banks(kernel)
    model = toy.deployed()
    layers = dict(model.layers)
    layers['conv_in'] = toy.make_layer(weight, row, jnp.zeros(64))
    path = tmp_path / f'{bits}.safetensors'
    packed_file.save(path, type(model)(
        model.model, model.params, layers, {}, model.plan).packed())
    return path.stat().st_size

  saved = (size(8) - size(bits)) * 8 / (9 * 64 * 64)
  np.testing.assert_allclose(saved, 8 - bits, atol=0.03)


def test_json_with_a_digest(tmp_path):
  path = tmp_path / 'a.json'
  seal.write_json(path, {'fid': 3.25, 'more': {'b': [1, None]}})
  assert seal.read_json(path, '') == {'fid': 3.25, 'more': {'b': [1, None]}}
  path.write_text(path.read_text().replace('3.25', '3.24'))
  with pytest.raises(ValueError, match='a.json is damaged.*; delete it'):
    seal.read_json(path, 'delete it')
  path.write_text('{"fid": 3.25}')  # as earlier versions wrote it
  assert seal.read_json(path, '') == {'fid': 3.25}
  path.write_text('[]')
  with pytest.raises(ValueError, match='a.json is damaged.*; delete it'):
    seal.read_json(path, 'delete it')


@pytest.mark.parametrize('name', ["shipped model", "shipped digits' classifier",
                                  'shipped weights of LPIPS'])
def test_files_of_the_package_are_what_was_shipped(name, tmp_path):
  kind = DAMAGED[name]
  path = kind.write(tmp_path)
  kind.read(path)
  content = bytearray(path.read_bytes())
  content[-9] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match='is damaged.*install msfp-jax again'):
    kind.read(path)
