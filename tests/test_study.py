"""Many runs, one table: mean and spread, and what is not done twice.

Sampling and calibration are replaced by fakes here; tests/experiment/ runs
the real ones.
"""

import json
import pathlib
import textwrap
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import convert
from msfp_jax.base import errors
from msfp_jax.convert import native
from msfp_jax.models import unet
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.run import draws as draws_lib
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import study

CONFIG = """
    from configs import images

    def get_config(variant=''):
      config = images.get_config('smoke')
      config.pretrained = {model!r}
      config.data.path = {data!r}
      config.finetune.num_updates = 0
      config.quant.recipe = variant or 'msfp'
      return config

    STUDIES = {{'small': {{
        'seeds': (0, 1), 'metrics': ('fd_random', 'psnr_to_fp', 'bytes'),
        'groups': {{'one': {{'MSFP': 'msfp', 'INT 4': 'int'}},
                   'two': {{'signed': 'signed_fp'}}}}}}}}
"""


@pytest.fixture
def text(tmp_path):
  """Writes a study of random images and a model of zeros; returns its name."""
  rng = np.random.default_rng(0)
  np.savez(tmp_path / 'd.npz', rng.integers(0, 256, (200, 8, 8), np.uint8))
  config = unet.UNetConfig(
      image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1,),
      num_res_blocks=0, attn_resolutions=(), norm_groups=4)
  params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                        native.abstract_params(unet.UNet(config)))
  convert.save_pretrained(
      tmp_path / 'm.safetensors', unet.UNet(config), params)
  (tmp_path / 'c.py').write_text(textwrap.dedent(CONFIG).format(
      model=str(tmp_path / 'm.safetensors'), data=str(tmp_path / 'd.npz')))
  return f'{tmp_path}/c.py:small'


@pytest.fixture
def draws(monkeypatch):
  """Replaces sampling and calibration; lists the names of what was drawn."""
  names = []

  def generate(drawer, count, key, name, **rest):
    del drawer, rest
    names.append(name)
    seed = [*np.asarray(jax.random.key_data(key)), zlib.crc32(name.encode())]
    return np.random.default_rng(seed).integers(
        0, 256, (count, 8, 8, 1), np.uint8)

  def calibrate(self):
    return spec_lib.QuantSpec(self.quant.recipe, dict.fromkeys(
        interception.leaves(self.params, 'kernel'),
        spec_lib.LayerSpec('', '')))

  monkeypatch.setattr(draws_lib.generate, 'generate', generate)
  monkeypatch.setattr(study.measure.bits, 'input_shapes',
                      lambda *unused: {'conv_in': (1, 8, 8, 1)})
  monkeypatch.setattr(experiment_lib, 'collect', lambda *a, **k: {})
  monkeypatch.setattr(experiment_lib.Experiment, 'calibrate', calibrate)
  return names


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.slow
def test_a_study_collects_mean_and_spread(tmp_path, text, draws):
  work = tmp_path / 'work'
  table = study.run(text, str(work))
  assert draws == ['seed 0, fp', 'MSFP', 'INT 4', 'signed',
                   'seed 1, fp', 'MSFP', 'INT 4', 'signed']
  assert (work / 'table.md').read_text() == table
  found = json.loads((work / 'table.json').read_text())
  assert {group: list(rows) for group, rows in found.items()} == {
      'one': ['fp', 'MSFP', 'INT 4'], 'two': ['fp', 'signed']}
  for seed in (0, 1):
    row = json.loads((work / f'{seed}/one/MSFP.json').read_text())
    assert row['fd_random'] == found['one']['MSFP']['fd_random'][seed]
    config = json.loads((work / f'{seed}/one/MSFP/config.json').read_text())
    assert config['seed'] == seed
  values = found['one']['MSFP']['fd_random']
  assert values[0] != values[1]
  cell = f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}'
  assert f'| MSFP | {cell} |' in table
  assert 'psnr_to_fp' not in found['one']['fp']


@pytest.mark.slow
def test_the_same_study_again_measures_no_row_twice(tmp_path, text, draws):
  work = tmp_path / 'work'
  table = study.run(text, str(work))
  before = contents(work)
  (work / '1/one/INT 4.json').unlink()
  draws.clear()
  assert study.run(text, str(work)) == table
  assert draws == ['seed 1, fp', 'INT 4']
  assert contents(work) == before


@pytest.mark.slow
def test_parts_make_up_the_whole(tmp_path, text, draws):
  """Parts of a study, run one after the other, make up the whole."""
  parts = str(tmp_path / 'parts')
  part = study.run(text, parts, [1])
  assert '±' not in part and 'seed 0, fp' not in draws
  draws.clear()
  study.run(text, parts, groups=['two'])
  assert draws == ['seed 0, fp', 'signed']
  draws.clear()
  study.run(text, parts, [0], rows=['INT 4'])
  assert draws == ['seed 0, fp', 'INT 4']
  assert study.run(text, parts) == study.run(text, str(tmp_path / 'whole'))
  assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('part', ['quant', 'eval'])
def test_rows_of_another_config_are_not_passed_off(
    tmp_path, text, draws, part):
  """Not even where only the evaluation differs: its figures would mix."""
  work = tmp_path / 'work'
  study.run(text, str(work))
  before = contents(work)
  path = pathlib.Path(text.removesuffix(':small'))
  change = {'quant': 'config.quant.weight_bits = 6',
            'eval': 'config.eval.num_samples = 9'}[part]
  path.write_text(path.read_text().replace(
      '  return config', f'  {change}\n  return config'))
  with pytest.raises(errors.WorkdirError, match=f'  {part}[.]'):
    study.run(text, str(work))
  assert contents(work) == before


@pytest.mark.parametrize('arguments, message', [
    ({'seeds': [3]}, r'seeds \[3\] .* \[0, 1\]'),
    ({'groups': ['two', 'three']}, r"groups \['three'\] .* \['one', 'two'\]"),
    ({'rows': ['msfp']}, r"rows \['msfp'\] .* \['MSFP', 'INT 4', 'signed'\]"),
])
def test_parts_that_are_not_in_the_study(
    tmp_path, text, draws, arguments, message):
  with pytest.raises(ValueError, match=message):
    study.run(text, str(tmp_path / 'work'), **arguments)
  assert not draws and not (tmp_path / 'work').exists()


def test_a_study_or_file_that_is_not_there(tmp_path, text):
  with pytest.raises(ValueError, match=r"no study 'tall', only \['small'\]"):
    study.load_study(text.replace('small', 'tall'))
  with pytest.raises(ValueError, match=r"no study '', only \['small'\]"):
    study.load_study(text.removesuffix(':small'))
  with pytest.raises(FileNotFoundError, match='nope.py'):
    study.load_study(f'{tmp_path}/nope.py:small')


def test_what_has_no_place_in_a_table_is_refused(tmp_path, text):
  get_config, small = study.load_study(text)

  def measuring(variant=''):
    config = get_config(variant)
    config.eval.sensitivity_images = 4
    return config

  with pytest.raises(ValueError, match='sensitivity_images=4.*eval.py'):
    study.run_seed(measuring, small, 0, str(tmp_path / 'w'))


def test_a_file_without_studies():
  with pytest.raises(ValueError, match=r'images.py has no study .* \[\]'):
    study.load_study('configs/images.py:small')


def test_collect_takes_what_is_there(tmp_path):
  rows = {'seeds': (0, 1, 2), 'groups': {'g': {'a': '', 'b': ''}}}
  for seed, value in ((0, 1.0), (2, 4.0)):
    (tmp_path / f'{seed}/g').mkdir(parents=True)
    (tmp_path / f'{seed}/g/a.json').write_text(json.dumps({'fd': value}))
  assert study.collect(rows, (0, 1, 2), str(tmp_path)) == {
      'g': {'fp': {}, 'a': {'fd': [1.0, 4.0]}, 'b': {}}}


def test_the_table_by_hand():
  found = {'g': {'a': {'fd': [1.0, 2.0, 6.0], 'bytes': [1234, 1234, 1234]},
                 'b': {'fd': [2.5], 'bytes': []}}}
  assert study.table(found, ('fd', 'bytes')).splitlines() == [
      '**g**', '', '|  | fd | bytes | seeds |', '|---|---|---|---|',
      '| a | 3.00 ± 2.65 | 1,234 | 3 |', '| b | 2.50 |  | 1 |']


def test_small_numbers_keep_three_digits():
  found = {'g': {'a': {'s': [0.0123, 0.0125], 'n': [0.09]},
                 'b': {'s': [0.2, 0.3], 'n': [0.0]}}}
  lines = study.table(found, ('s', 'n')).splitlines()
  assert lines[4:] == ['| a | 0.0124 ± 0.0001 | 0.0900 |',
                       '| b | 0.25 ± 0.07 | 0.00 |']


def test_layers_stay_out_of_the_table(tmp_path):
  (tmp_path / '0/g').mkdir(parents=True)
  (tmp_path / '0/g/a.json').write_text(json.dumps(
      {'fd': 1.0, 'sqnr': {'output': {'conv': 9.0}}}))
  rows = {'groups': {'g': {'a': ''}}}
  assert study.collect(rows, (0,), str(tmp_path))['g']['a'] == {'fd': [1.0]}


@pytest.mark.slow
def test_a_base_sets_what_all_rows_share(tmp_path, text, draws, monkeypatch):
  """And seconds are measured on the first seed alone."""
  path = pathlib.Path(text.removesuffix(':small'))
  path.write_text(path.read_text().replace(
      "config.quant.recipe = variant or 'msfp'",
      "config.eval.timing = 'timed' in variant").replace(
          "'seeds'", "'base': 'timed', 'seeds'").replace(
              "'signed': 'signed_fp'", "'signed': 'timed,signed'"))
  monkeypatch.setattr(
      study.draws.generate.Drawer, 'seconds_per_image', lambda *_: 0.5)
  study.run(text, str(tmp_path / 'work'), rows=['signed'])
  for seed, expected in ((0, 0.5), (1, None)):
    for name in ('fp', 'signed'):
      row = json.loads((tmp_path / f'work/{seed}/two/{name}.json').read_text())
      assert row.get('seconds') == expected, (seed, name)
  # Of another base a row is refused.
  with pytest.raises(ValueError, match=r"row 'MSFP' .*\['eval.timing'\]"):
    study.run(text, str(tmp_path / 'other'), rows=['MSFP'])


@pytest.mark.slow
def test_what_is_measured_can_differ_from_the_study(tmp_path, text, draws):
  """Of every row; distances have columns where they were measured."""
  path = pathlib.Path(text.removesuffix(':small'))
  path.write_text(path.read_text().replace(
      "('fd_random', ", "('fd_squeezenet', 'kd_random', "))
  work = tmp_path / 'work'
  table = study.run(text, str(work), [0], measured={'vectors': 60})
  # Listed or not; and a column of another kind stays, empty or not.
  assert '| fd_random |' in table and 'fd_squeezenet' not in table
  assert '| kd_random |' in table
  for name in ('MSFP', 'INT 4'):
    row = json.loads((work / f'0/one/{name}/config.json').read_text())
    assert row['eval']['vectors'] == 60


@pytest.mark.parametrize('change, message', [
    ('config.sampler.num_steps = 3', r"row 'MSFP' .*\['sampler'\]"),
    ('config.eval.num_samples = 9', r"\['eval.num_samples'\]"),
])
def test_rows_share_all_but_how_they_are_quantized(
    tmp_path, text, draws, change, message):
  path = pathlib.Path(text.removesuffix(':small'))
  path.write_text(path.read_text().replace(
      '  return config', f'  if variant:\n    {change}\n  return config'))
  with pytest.raises(ValueError, match=message):
    study.run(text, str(tmp_path / 'work'))
  assert not draws
