"""Files of packed models: compared, and changed as damage does."""

import json

import numpy as np
import safetensors
import safetensors.numpy
import tiny


def assert_equal(actual, expected):
  """Checks that two packed models are equal in everything."""
  for field in ('arrays', 'choices', 'drift'):
    tiny.assert_trees_equal(getattr(actual, field), getattr(expected, field))
  assert actual.model == expected.model
  own = lambda model: [name for name, layer in model.layers.items()
                       if layer.weight is not None]
  assert own(actual) == own(expected)
  for field in ('timesteps', 'x_coef', 'eps_factor', 'noise_std'):
    np.testing.assert_array_equal(
        getattr(actual.plan, field), getattr(expected.plan, field))
  tiny.assert_trees_equal(
      vars(actual.plan.multistep) if actual.plan.multistep else {},
      vars(expected.plan.multistep) if expected.plan.multistep else {})


def rewrite(path, change_tensors=lambda tensors: None,
            change_header=lambda header: None):
  """Changes a file in ways that save never would."""
  with safetensors.safe_open(path, 'np') as opened:
    header = opened.metadata()
    tensors = {key: opened.get_tensor(key) for key in opened.keys()}
  version, command = header.pop('format'), header.pop('command', '')
  header.pop('digest', None)  # what is changed here would be damage to it
  header = {key: json.loads(value) for key, value in header.items()}
  header['format'] = version
  change_tensors(tensors)
  change_header(header)
  path.write_bytes(safetensors.numpy.save(tensors, {'command': command} | {
      key: value if key == 'format' else json.dumps(value)
      for key, value in header.items()}))


def row_of(header, name):
  return next(row for row in header['layers'] if row[0] == name)


def changed(key, value):
  return lambda tensors: tensors.update({key: value})
