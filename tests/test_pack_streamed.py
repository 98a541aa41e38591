"""Checkpoints packed layer by layer: the bytes of the ordinary path."""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import flux_oracle
import jax
import jax.numpy as jnp
import lora_files
import marks
import ml_dtypes
import numpy as np
import pytest
import tiny

import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax.base import lock
from msfp_jax.base import version
from msfp_jax.convert import native
from msfp_jax.convert import piecewise
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.packed import streamed
from msfp_jax.quant import roles
from msfp_jax.quant.calibrate import check_model
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.quantizers import Full

FLUX = dataclasses.replace(
    flux_oracle.GUIDED, num_layers=1, num_single_layers=1)
# Few layers, two of them 3x3.
UNET = UNet(UNetConfig(
    image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1,),
    num_res_blocks=0, attn_resolutions=(), norm_groups=4, dropout=0.0))
NAME = 'packed.safetensors'


@functools.cache
def small_params():
  return jax.jit(UNET.init)(
      jax.random.key(0), tiny.noise(0, batch=1), jnp.zeros(1))['params']


@pytest.fixture
def source(tmp_path):
  """A small UNet in a file of ours."""
  path = tmp_path / 'in' / 'unet.safetensors'
  native.save_pretrained(path, UNET, small_params())
  return path


@pytest.fixture
def target(tmp_path):
  return tmp_path / 'out' / NAME


def ordinary(source, path, **options):
  """`load_pretrained`, `calibrate`, `pack` and `save`: bytes and spec."""
  model, params = msfp.load_pretrained(str(source))
  spec = msfp.calibrate(model, params, **options)
  msfp.save(path, msfp.pack(
      model, params, spec, msfp.load_plan(str(source))), command='c')
  return path.read_bytes(), spec


def pack(source, target, **options):
  """The streamed file's bytes; nothing but it may be left."""
  msfp.pack_streamed(source, target, about={'command': 'c'}, **options)
  assert [path.name for path in target.parent.iterdir()] == [target.name]
  return target.read_bytes()


@functools.cache
def by_structure():
  """What calibration would see: minima that tell AALs from NALs."""
  model = flux_oracle.Flux(FLUX)
  layers = check_model(model, convert.abstract_params(model))
  return {name: Seen(minimum=-0.17 if roles.follows_activation(name) else -2.0,
                     maximum=3.0) for name in layers}


@pytest.mark.slow
@pytest.mark.parametrize('recipe, options', [
    ('quartz', {}), ('nvfp4', {}),
    ('int4_group', {'bits': 32, 'act_bits': 4}),
    ('mxfp4', {'bits': 6, 'act_bits': 3, 'exceptions': 'skip-8'})])
def test_flux_in_shards_as_by_the_ordinary_path(
    tmp_path, target, recipe, options):
  state = {name: value.astype(ml_dtypes.bfloat16)
           for name, value in flux_oracle.state_of(FLUX).items()}
  source = flux_oracle.save_folder(tmp_path / 'flux', state, FLUX, shards=3)
  seen = {'activations': by_structure()} if recipe == 'quartz' else {}
  expected, spec = ordinary(
      source, tmp_path / 'a.safetensors', recipe=recipe, **options, **seen)
  assert pack(source, target, recipe=recipe, **options) == expected
  target.unlink()
  assert pack(source, target, spec=spec) == expected


@pytest.mark.parametrize('recipe, bits', [
    ('signed_fp', 3), pytest.param('msfp', 5, marks=pytest.mark.long)])
def test_weights_alone_are_searched(source, target, tmp_path, recipe, bits):
  expected, _ = ordinary(source, tmp_path / 'a.safetensors', recipe=recipe,
                         bits=bits, act_bits=32)
  assert pack(source, target, recipe=recipe, bits=bits, act_bits=32) == expected


def test_loras_are_merged_before(source, target, tmp_path):
  """The bytes of the ordinary path."""
  halves = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
  file = lora_files.write(tmp_path / 'lora.safetensors', lora_files.kohya(
      {'mid_block_attentions_0_to_q': halves}))
  model, params = msfp.load_pretrained(str(source))
  changed = tmp_path / 'in' / 'changed.safetensors'
  native.save_pretrained(changed, model, msfp.merge_loras(
      params, [(msfp.load_lora(file, model), 0.5)]))
  expected, _ = ordinary(changed, tmp_path / 'a.safetensors', recipe='nvfp4')
  plain, _ = ordinary(source, tmp_path / 'b.safetensors', recipe='nvfp4')
  assert pack(source, target, loras=[(file, 0.5)]) == expected != plain
  with pytest.raises(ValueError, match='belongs|is no LoRA for this model'):
    lora_files.write(file, lora_files.kohya({'conv_9': halves}))
    msfp.pack_streamed(source, target, loras=[(file, 0.5)])


def check_spec(tmp_path, source, target, spec, plan):
  """Through the spec's own file."""
  path = tmp_path / 'a.safetensors'
  msfp.save(path, msfp.pack(UNET, small_params(), spec, plan), command='c')
  spec.save(tmp_path / 'spec.json')
  loaded = msfp.QuantSpec.load(tmp_path / 'spec.json')
  assert pack(source, target, spec=loaded, plan=plan) == path.read_bytes()


def test_a_spec_by_hand(source, target, tmp_path):
  """Static scales of weights and inputs, a layer in full precision."""
  spec = tiny.by_hand(small_params())
  layers = dict(spec.layers)
  layers['conv_out'] = dataclasses.replace(
      layers['conv_out'], weight=Full())
  check_spec(tmp_path, source, target,
             dataclasses.replace(spec, layers=layers), tiny.PLAN)


@pytest.mark.parametrize('recipe', marks.slow(
    ['svdquant_nvfp4'], ['msfp', 'msfp+gptq', 'svdquant_nvfp4']))
def test_a_spec_that_saw_inputs(source, target, tmp_path, recipe):
  """Scales of inputs, weights that were rounded, branches beside products."""
  plan = msfp.make_plan(tiny.SCHEDULE, 'ddim', num_steps=2)
  check_spec(tmp_path, source, target, msfp.calibrate(
      UNET, small_params(), recipe=recipe, batches=tiny.noise(0, batch=2),
      plan=plan), plan)


@pytest.fixture
def untraced(monkeypatch):
  """To trace the model each time is what takes time."""
  monkeypatch.setattr(
      streamed.calibrate_lib, 'check_model', lambda *unused: None)


class Killed(BaseException):
  """Nobody catches it, as nobody does SIGKILL."""


def die_at(monkeypatch, count):
  """The process dies instead of the count-th time that it touches the disk."""
  calls = itertools.count(1)
  for name in ('fsync', 'replace', 'posix_fallocate'):
    real = getattr(os, name)

    def call(*args, real=real):
      if next(calls) == count:
        raise Killed
      return real(*args)
    monkeypatch.setattr(os, name, call)


@pytest.mark.usefixtures('untraced')
@pytest.mark.parametrize('options', [
    {'recipe': 'int4_group'},
    pytest.param({'recipe': 'int', 'act_bits': 32}, marks=pytest.mark.long)],
                         ids=['data-free', 'searched'])
def test_killed_anywhere_and_resumed(source, target, monkeypatch, options):
  expected = pack(source, target, **options)
  target.unlink()
  done = kills = 0
  # Some deaths leave nothing new behind: others come between these.
  for count in itertools.chain(range(1, 6), itertools.cycle((4, 9, 12))):
    assert kills < 99
    with monkeypatch.context() as patched:
      die_at(patched, count)
      try:
        actual = pack(source, target, **options)
        break
      except Killed:
        kills += 1
    assert not target.exists()
    journal = streamed_folder(target) / 'journal.jsonl'
    if journal.exists():
      lines = journal.read_bytes().count(b'\n')
      assert lines >= done  # what was done stays done
      done = lines
  assert kills > 5
  assert actual == expected


def streamed_folder(target):
  return target.with_name(target.name + streamed.SUFFIX)


@pytest.mark.usefixtures('untraced')
def test_a_torn_line_is_done_again(source, target, monkeypatch):
  expected = pack(source, target)
  target.unlink()
  with monkeypatch.context() as patched:
    die_at(patched, 9)
    with pytest.raises(Killed):
      pack(source, target)
  folder = streamed_folder(target)
  journal = (folder / 'journal.jsonl').read_bytes()
  (folder / 'journal.jsonl').write_bytes(journal[:-5])
  assert pack(source, target) == expected


@pytest.mark.usefixtures('untraced')
def test_death_between_naming_and_tidying(source, target, monkeypatch):
  expected = pack(source, target)
  target.unlink()

  def die(*unused):
    raise Killed
  with monkeypatch.context() as patched:
    patched.setattr(piecewise.journal_lib.Journal, 'remove', die)
    with pytest.raises(Killed):
      pack(source, target)
  assert target.read_bytes() == expected
  with monkeypatch.context() as patched:
    patched.setattr(piecewise.PiecewiseFile, 'write', die)
    assert pack(source, target) == expected


@pytest.mark.usefixtures('untraced')
def test_another_job_is_not_continued(source, target, monkeypatch):
  with monkeypatch.context() as patched:
    die_at(patched, 9)
    with pytest.raises(Killed):
      pack(source, target)
  kept = (streamed_folder(target) / 'journal.jsonl').read_bytes()
  for change in ({'recipe': 'mxfp4'}, {'bits': 6}, {'num_steps': 3},
                 {'ema': False}):
    with pytest.raises(ValueError, match='another job.*delete .*partial'):
      pack(source, target, **change)
  with monkeypatch.context() as patched:
    patched.setattr(version, 'VERSION', '0.0.1')
    with pytest.raises(ValueError, match="another job.*'job'"):
      pack(source, target)
  os.utime(source, ns=(0, 0))
  with pytest.raises(ValueError, match="another job.*'job'"):
    pack(source, target)
  assert (streamed_folder(target) / 'journal.jsonl').read_bytes() == kept


@pytest.mark.parametrize('options, message', [
    ({'recipe': 'msfp'}, r"looks at \['values'\].*pass a spec.*act_bits=32"),
    ({'recipe': 'nvfp5'}, 'must be one of'),
    ({'bits': 9}, '9 bits'),
    ({'roles': {'any': '.*'}, 'recipe': 'quartz'}, r"looks at \['extremes'\]"),
    ({'roles': {'conv': 'conv_.*'}}, 'no rule covers layer'),
    ({'spec': msfp.QuantSpec('nvfp4', {})}, 'does not fit the model'),
    ({'spec': msfp.QuantSpec('nvfp4', {}), 'recipe': 'nvfp4', 'bits': 4},
     'recipe, bits beside a spec')])
def test_refused_before_anything_is_made(source, target, options, message):
  with pytest.raises(ValueError, match=message):
    pack(source, target, **options)
  assert not target.parent.exists()


def test_a_name_that_is_none(source, tmp_path):
  with pytest.raises(ValueError, match='must end in .safetensors'):
    msfp.pack_streamed(source, tmp_path / 'out' / 'packed.bin')


@pytest.mark.parametrize('options', [
    {}, {'recipe': 'msfp', 'act_bits': 32}], ids=['data-free', 'searched'])
def test_a_full_disk_is_told_before_work(source, target, monkeypatch, options):
  monkeypatch.setattr(
      shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(9, 9, 0))
  monkeypatch.setattr(native.restore_lib.Place, 'read', None)
  with pytest.raises(OSError, match=r'packed.safetensors will take [\d,]+ '
                     'bytes, and its disk has 0 left'):
    pack(source, target, **options)
  assert not target.parent.exists()


def test_weights_that_are_not_finite_are_named(tmp_path, target, monkeypatch):
  params = jax.tree.map(np.array, small_params())
  params['conv_out']['kernel'][0, 0, 0, 0] = np.nan
  source = tmp_path / 'in' / 'bad.safetensors'
  with monkeypatch.context() as patch:  # as of a tool that does not look
    patch.setattr(native, 'check_finite', lambda tensors: None)
    native.save_pretrained(source, UNET, params)
  with pytest.raises(ValueError, match='conv_out.kernel holds 1 values'):
    pack(source, target)
  assert not target.exists()


def test_one_process_at_a_time(source, target):
  with lock.hold(streamed_folder(target)):
    with pytest.raises(ValueError, match='in use: process'):
      pack(source, target)


def test_the_command_names_missing_shards(tmp_path):
  source = flux_oracle.save_folder(
      tmp_path / 'flux', flux_oracle.state_of(FLUX), FLUX, shards=3)
  gone = sorted(source.glob('*.safetensors'))[1:]
  for path in gone:
    path.unlink()
  target = tmp_path / 'out' / NAME
  done = subprocess.run(
      [sys.executable, '-m', 'msfp_jax.packed', str(source), str(target)],
      cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
      check=False)
  assert done.returncode == 1
  assert all(path.name in done.stderr for path in gone)
  assert 'Traceback' not in done.stderr
  assert not target.parent.exists()


@pytest.mark.slow
def test_the_command_takes_loras_and_a_sampler(source, target, tmp_path):
  """LoRAs with a strength, or without one: 1."""
  down, up = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
  files = [lora_files.write(tmp_path / f'{name}.safetensors', lora_files.kohya(
      {f'mid_block_attentions_0_to_{name}': (down, up)})) for name in 'qk']
  done = subprocess.run(
      [sys.executable, '-m', 'msfp_jax.packed', str(source), str(target),
       f'--lora={files[0]}=0.5', f'--lora={files[1]}',
       '--sampler=dpm_solver', '--num_steps=5'],
      cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
      check=False)
  assert done.returncode == 0, done.stderr
  actual = target.read_bytes()
  target.unlink()
  msfp.pack_streamed(
      source, target, loras=[(files[0], 0.5), (files[1], 1)],
      plan=msfp.load_plan(str(source), num_steps=5, name='dpm_solver'))
  assert target.read_bytes() == actual


@pytest.mark.slow
def test_the_command_takes_a_spec_or_a_recipe(target):
  done = subprocess.run(
      [sys.executable, '-m', 'msfp_jax.packed', 'x', str(target),
       '--spec=spec.json', '--bits=w8a8'],
      cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
      check=False)
  assert done.returncode == 1
  assert "--spec says what ['bits'] say" in done.stderr
