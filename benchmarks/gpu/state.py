"""A teacher in training as a small file that is kept: 2 bytes a parameter.

A checkpoint of train.py holds parameters, their moving average and two moments,
16 bytes a parameter. What is kept is the average alone, in float16, as a model
file that `msfp.load_pretrained` reads. Training goes on from it at its step of
the schedule, with moments that begin anew, as at a warm restart: not bit for
bit what an uninterrupted run is, and each file tells its step.
"""

import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import ml_collections
import optax

from msfp_jax import convert
from msfp_jax.convert import source as source_lib
from msfp_jax.models.unet import UNet
from msfp_jax.run import teacher
from msfp_jax.tune import checkpoint
from msfp_jax.tune import pretrain

_COPY = 'copy-'  # how the names of temporary folders begin


def model_of(config: ml_collections.ConfigDict) -> UNet:
  """The model that train.py would train by this config."""
  return teacher.new_model(config.model.to_dict())


def begin(model: UNet, config: ml_collections.ConfigDict
          ) -> pretrain.PretrainState:
  """The state before the first step: its structure is what counts here."""
  tx = pretrain.optimizer(pretrain.PretrainSettings(**config.pretrain))
  return pretrain.init_state(model, tx, jax.random.key(0))


def steps(checkpoints: pathlib.Path) -> list[int]:
  """The steps of complete checkpoints, oldest first."""
  if not checkpoints.is_dir():
    return []
  return sorted(int(path.name) for path in checkpoints.iterdir()
                if path.name.isdigit())


def export(checkpoints: pathlib.Path, config: ml_collections.ConfigDict,
           path: pathlib.Path) -> int:
  """Writes the newest checkpoint's average; returns its step.

  Reads a copy: the folder may be that of a run in progress, which orbax would
  tidy up.
  """
  step = steps(checkpoints)[-1]
  model = model_of(config)
  path.parent.mkdir(parents=True, exist_ok=True)
  for left in path.parent.glob(f'{_COPY}*'):  # by one that was killed
    shutil.rmtree(left)
  with tempfile.TemporaryDirectory(prefix=_COPY, dir=path.parent) as folder:
    shutil.copytree(checkpoints / str(step), f'{folder}/{step}')
    with checkpoint.Checkpointer(folder) as copied:
      state = copied.restore(jax.eval_shape(lambda: begin(model, config)))
  convert.save_pretrained(
      path, model, state.ema_params, dtype='float16', step=str(step))
  return step


def resume(path: pathlib.Path, config: ml_collections.ConfigDict,
           checkpoints: pathlib.Path) -> int:
  """Makes a checkpoint of what `export` wrote; returns its step.

  Raises:
    ValueError: the file is damaged, or of another model than the config's.
  """
  model, params = convert.load_pretrained(str(path))
  if model != model_of(config):
    raise ValueError(f'{path} holds another model than the config: {model}')
  step = jnp.int32(int(source_lib.read_safetensors(path)[1]['step']))
  tx = pretrain.optimizer(pretrain.PretrainSettings(**config.pretrain))
  counts = lambda node: isinstance(node, optax.ScaleByScheduleState)
  opt_state = jax.tree.map(
      # The learning rate is that of the step; Adam's moments know of none.
      lambda node: node._replace(count=step) if counts(node) else node,
      tx.init(params), is_leaf=counts)
  with checkpoint.Checkpointer(checkpoints) as saved:
    saved.save(int(step), pretrain.PretrainState(
        step=step, params=params, ema_params=params, opt_state=opt_state))
  return int(step)
