"""The folder of a run: what it must hold; tests/experiment/ has its claims."""

import json

import ml_collections
import pytest

from configs import common
from msfp_jax.base import errors
from msfp_jax.run import workdir


@pytest.mark.parametrize('num_updates', [0, 3])
def test_tuned_needs_a_finished_training(tmp_path, num_updates):
  (tmp_path / 'checkpoints/2').mkdir(parents=True)
  with pytest.raises(errors.WorkdirError) as error:
    workdir.check_trained(str(tmp_path), num_updates)
  assert str(tmp_path) in str(error.value)
  assert 'run train.py' in str(error.value)
  assert 'config.eval.rows' in str(error.value)


def test_a_training_is_finished_by_its_last_checkpoint(tmp_path):
  for step in (1, 2, 3):
    with pytest.raises(errors.WorkdirError, match='checkpoints/3 is not there'):
      workdir.check_trained(str(tmp_path), 3)
    (tmp_path / f'checkpoints/{step}').mkdir(parents=True)
  workdir.check_trained(str(tmp_path), 3)


def test_packed_needs_the_file(tmp_path):
  with pytest.raises(errors.WorkdirError, match="no packed.*leave 'packed'"):
    workdir.check_packed(str(tmp_path))
  (tmp_path / workdir.PACKED_FILE).touch()
  workdir.check_packed(str(tmp_path))


def test_what_the_checkpoint_said_must_be_as_it_was(tmp_path):
  """A file beside the weights that changed is no longer the run's."""
  config = ml_collections.ConfigDict({'seed': 0})
  taken = {'sampler': {'name': 'ddim', 'offset': 0}, 'plan': 'a'}
  workdir.prepare(config, str(tmp_path), taken=taken)
  (tmp_path / 'quant_spec.json').write_text('{}')
  # What is not known yet changes nothing, and forgets nothing.
  workdir.prepare(config, str(tmp_path))
  workdir.prepare(config, str(tmp_path), taken=taken)
  other = {'sampler': {'name': 'ddim', 'offset': 1}, 'plan': 'b'}
  with pytest.raises(errors.WorkdirError) as error:
    workdir.check(config, str(tmp_path), taken=other)
  assert str(error.value).splitlines()[1:] == [
      "  taken.plan: 'a' there, 'b' now",
      '  taken.sampler.offset: 0 there, 1 now']


def test_workdirs_from_before_a_field_go_on_with_the_value_it_then_had(
    tmp_path):
  """Of a study too, where nothing of the config may change."""
  config = common.get_config()
  workdir.prepare(config, str(tmp_path), free=())
  (tmp_path / 'quant_spec.json').write_text('{}')
  old = json.loads((tmp_path / 'config.json').read_text())
  for path in workdir._ONCE:
    part, field = path.split('.')
    del old[part][field]
  (tmp_path / 'config.json').write_text(json.dumps(old))
  workdir.check(config, str(tmp_path), free=())
  config.finetune.steer = 0.5
  with pytest.raises(errors.WorkdirError, match='finetune.steer'):
    workdir.check(config, str(tmp_path), free=())


def test_workdirs_from_before_the_average_was_left_to_the_yaml(tmp_path):
  config = common.get_config()
  config.ema = True
  workdir.prepare(config, str(tmp_path))
  (tmp_path / 'quant_spec.json').write_text('{}')
  workdir.check(common.get_config(), str(tmp_path))
  config.ema = False
  with pytest.raises(errors.WorkdirError, match='ema: True there, False now'):
    workdir.check(config, str(tmp_path))
