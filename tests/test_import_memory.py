"""An import holds the parameters and little more."""

import pathlib
import subprocess
import sys
import textwrap

import marks
import pytest
import safetensors.numpy
import tiny
import torch_writer
import unet_oracle

SCRIPT = '''
import jax
from msfp_jax import convert
jax.numpy.zeros(1).block_until_ready()
def read(field):
  with open('/proc/self/status') as file:
    line, = (line for line in file if line.startswith(field))
  return 1024 * int(line.split()[1])
before = read('VmRSS')
model, params = convert.load_pretrained({path!r})
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((read('VmHWM') - before) / {size}, held / {size})
'''


@pytest.mark.parametrize('kind', marks.slow(
    ['safetensors'], ['torch', 'safetensors']))
def test_peak_is_below_one_and_a_half_files(tmp_path, kind):
  """CelebA's full-size UNet, 315 MB; measured in a process of its own."""
  config = tiny.CELEBA64
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=0)
  path = tmp_path / ('ckpt.pth' if kind == 'torch' else 'm.safetensors')
  if kind == 'torch':
    torch_writer.save_zip(path, state)
  else:
    safetensors.numpy.save_file(state, path)
  del state
  script = textwrap.dedent(SCRIPT).format(
      path=str(path), size=path.stat().st_size)
  done = subprocess.run(
      [sys.executable, '-c', script], capture_output=True, text=True,
      cwd=pathlib.Path(__file__).parents[1], check=True)
  ratio, held = map(float, done.stdout.split())
  assert ratio > held > 0.99  # else it was not measured
  print(f'{kind}: {ratio:.2f} times the file')
  assert ratio < 1.5
