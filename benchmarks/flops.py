"""Multiplications and additions of a traced program."""

import math
from typing import Any

from jax.extend import core


def of(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> float:
  """Multiplications plus additions of its products and convolutions.

  Loops count as often as they turn, which XLA's own account leaves out; of
  branches the dearest counts. What else a program does (norms, activations,
  quantizers) is not counted.

  Args:
    jaxpr: of `jax.make_jaxpr`, or of a jitted function's trace.

  Raises:
    ValueError: a loop whose turns depend on its values, or a part of it that
      is written for each device by itself, with products inside.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return float(sum(map(_of_equation, jaxpr.eqns)))


def _of_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    return _of_convolution(equation)
  inner = [of(part) for part in core.jaxprs_in_params(params)]
  if name == 'cond':
    return max(inner)
  if name in ('while', 'shard_map') and any(inner):
    raise ValueError({
        'while': 'a loop with products, whose turns depend on its values',
        'shard_map': 'products of each device by itself are not counted',
    }[name])
  return params.get('length', 1) * sum(inner) if name == 'scan' else sum(inner)


def _of_convolution(equation: Any) -> float:
  params, kernel = equation.params, equation.invars[1].aval
  outputs = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
  # Of the steps between a dilated input's pixels most are with zeros, as in the
  # gradient of a convolution with strides.
  return 2 * equation.outvars[0].aval.size * kernel.size / (
      outputs * math.prod(params['lhs_dilation']))

