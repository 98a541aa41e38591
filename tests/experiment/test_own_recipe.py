"""Recipes of one's own: what a user adds in one file works everywhere.

This file alone defines two recipes, one of a block format with a scale type of
its own and one with a branch of low rank. Nothing else knows of them.
"""

import json

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs

import msfp_jax as msfp
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import FindAround
from msfp_jax.quant.around import Trial
from msfp_jax.quant.block import Block
from msfp_jax.quant.fit import Dynamic
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.run import evaluate
from msfp_jax.run import train

GROUP = 4


@flax.struct.dataclass
class HalfSteps(Quantizer):
  """INT in groups of 4, by scales that are powers of the square root of 2.

  Attributes:
    fmt: a uniform grid, signed.
  """

  fmt: msfp.FPFormat = flax.struct.field(pytree_node=False)

  @property
  def bits(self):
    return self.fmt.bits

  def quantize(self, x, axis=-1):
    missing = -x.shape[axis] % GROUP
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    at = x.ndim + axis
    groups = jnp.pad(x, widths)
    groups = groups.reshape(
        *x.shape[:at], -1, GROUP, *x.shape[at + 1:])
    largest = jnp.maximum(jnp.abs(groups).max(axis), 1e-6) / self.fmt.max
    scale = jnp.exp2(jnp.ceil(2 * jnp.log2(largest)) / 2)
    whole = QTensor(x, scale, fmt=self.fmt, length=x.shape[axis], axis=axis,
                    group=GROUP)
    steps = jnp.round(x / whole.spread(scale) / self.fmt.step)
    limit = self.fmt.max / self.fmt.step
    return whole.replace(
        data=jnp.clip(steps, -limit, limit) * self.fmt.step)


class Rank2(FindAround):
  """The two largest singular vectors of the weights, in bfloat16."""

  def __call__(self, trial):
    kernel = trial.kernel
    rows = kernel.reshape(-1, kernel.shape[-1])
    u, s, v = np.linalg.svd(rows, full_matrices=False)
    down = (u[:, :2] * s[:2]).reshape(*kernel.shape[:-1], -1)
    return Around(down=jnp.asarray(down, jnp.bfloat16),
                  up=jnp.asarray(v[:2], jnp.bfloat16))


def _half_steps(bits):
  return HalfSteps(msfp.FPFormat(1, bits - 2))


def _e4m3(bits):
  return Block(msfp.FPFormat(2, bits - 3), 'group', GROUP, 'e4m3', True)


OWN = {
    'half_steps': msfp.Recipe(
        weight=Dynamic(_half_steps), nal=Dynamic(_half_steps),
        aal=Dynamic(_half_steps)),
    'rank_2': msfp.Recipe(
        weight=Dynamic(_e4m3), nal=Dynamic(_e4m3), aal=Dynamic(_e4m3),
        around=Rank2()),
}


@pytest.fixture(scope='module', params=[
    pytest.param(name, marks=pytest.mark.long) for name in OWN])
def run(request, tmp_path_factory, npz):
  """(name, config, workdir) of ten updates and an evaluation."""
  name = request.param
  workdir = str(tmp_path_factory.mktemp(name))
  config = runs.config_of(npz, {
      'pretrained': 'random', 'model.image_size': 8, 'model.in_channels': 1,
      'model.out_channels': 1, 'quant.recipe': name,
      'finetune.num_updates': 10, 'finetune.log_every': 1,
      'eval.rows': ('fp', name, 'tuned', 'packed'), 'eval.report': True})
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(msfp.RECIPES, name, OWN[name])
    train.run(config, workdir)
    evaluate.run(config, workdir)
    yield name, config, workdir


def test_ten_updates_move_what_is_trained(run):
  _, _, workdir = run
  with open(f'{workdir}/metrics.jsonl') as lines:
    rows = [json.loads(line) for line in lines]
  assert len(rows) == 10
  assert all(np.isfinite(row['finetune/loss']) for row in rows)
  # With B = 0 only B moves at first; then A as well, through the quantizer.
  assert all(row['finetune/l2_grads_banks'] > 0 for row in rows)


def test_rows_of_the_table_count_every_bit(run):
  """Codes of 4 or 8 bits, scales and branch, by hand."""
  name, _, workdir = run
  with open(f'{workdir}/results.json') as file:
    rows = {row['name']: row for row in json.load(file)['rows']}
  assert list(rows) == ['fp', name, 'tuned', 'packed']
  packed = msfp.load(f'{workdir}/packed.safetensors')
  assert rows['tuned']['bytes'] == rows['packed']['bytes']
  scale_bits = {'half_steps': 32, 'rank_2': 8}[name]
  total = 0
  for path, layer in packed.layers.items():
    h, *window, _, outputs = layer.weight.data.shape
    length, taps = layer.weight.length, int(np.prod(window))
    bits = 8 if path in ('conv_in', 'conv_out') or 'temb.' in path else 4
    total += h * taps * length * outputs * bits + 32 * outputs
    total += h * taps * -(-length // GROUP) * outputs * scale_bits
    if name == 'rank_2':
      rank = min(2, outputs, taps * length)
      total += h * 32 + 16 * rank * (taps * length + outputs)
  total += 32 * sum(leaf.size for leaf in jax.tree.leaves(packed.params))
  assert rows['packed']['bytes'] == -(-total // 8)
  for row in rows.values():
    assert np.isfinite(row['fd_random'])
  # What is compared is not the full-precision model itself.
  assert rows[name]['psnr_to_fp'] < 60


def test_the_packed_file_samples_as_the_simulation(run):
  """Bit for bit on CPUs: the products are the same function."""
  name, config, workdir = run
  experiment = train.experiment_lib.load(config, workdir)
  spec = train.calibrated_spec(experiment, workdir)
  simulated, _ = train.fit(experiment, spec, workdir)
  packed = msfp.load(f'{workdir}/packed.safetensors')
  for path, layer in packed.layers.items():
    assert layer.weight.is_packed
    np.testing.assert_array_equal(
        np.asarray(layer.weight.dequantize()),
        np.asarray(simulated.layers[path].weight.dequantize()), path)
  noise = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
  np.testing.assert_array_equal(
      packed.sample(noise), simulated.sample(noise))
  untuned = packed_lib.simulate(
      experiment.model, experiment.params, spec, experiment.plan)
  assert np.abs(untuned.sample(noise) - packed.sample(noise)).max() > 1e-3


def test_no_run_of_the_model_was_needed_to_calibrate(run):
  name, config, workdir = run
  assert not msfp.RECIPES[name].needs
  experiment = train.experiment_lib.load(config, workdir)
  spec = msfp.calibrate(
      experiment.model, experiment.params, recipe=name, bits=4)
  assert spec.to_json() == train.calibrated_spec(experiment, workdir).to_json()


def test_the_report_names_the_formats(run):
  name, _, workdir = run
  with open(f'{workdir}/report.html') as file:
    page = file.read()
  assert {'half_steps': 'HalfSteps', 'rank_2': 'E2M1'}[name] in page


def test_the_branch_keeps_what_the_quantizer_loses():
  """The residual of rank 2 has less energy than the weights, per layer."""
  rng = np.random.default_rng(0)
  kernel = np.float32(rng.normal(size=(3, 3, 4, 2)) @ rng.normal(size=(2, 6)))
  around = Rank2()(Trial(Seen(), kernel, None, None))
  left = np.asarray(around.residual(kernel))
  # bfloat16 has 8 significant bits.
  assert np.abs(left).max() < 2**-6 * np.abs(kernel).max()
  assert around.down.dtype == ml_dtypes.bfloat16
