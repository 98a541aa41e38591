"""Values carried out of a traced function, through jit, remat and vmap.

A value that is kept in a Python variable while JAX traces a nested function
may not leave that function. A tap marks the value in the traced program
instead; the program is then run without the nesting, and what the taps saw
comes out beside the result.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives
from jax.interpreters import ad
from jax.interpreters import batching
import jax.numpy as jnp

# Nested programs that compute the same where they stand in the outer one.
_TRANSPARENT = (
    primitives.call_p, primitives.closed_call_p, primitives.custom_jvp_call_p,
    primitives.custom_vjp_call_p, primitives.jit_p, primitives.remat_p)

_tap_p = core.Primitive('tap')
_tap_p.def_impl(lambda x, *beside, label: x)
_tap_p.def_abstract_eval(lambda x, *beside, label: x)
# To a derivative a tap is the identity, seen once, where the value is made.
ad.primitive_jvps[_tap_p] = lambda values, tangents, label: (
    _tap_p.bind(*values, label=label), tangents[0])


@dataclasses.dataclass(frozen=True)
class Tapped:
  """The value that passed one tap, and what was given beside it.

  Attributes:
    label: of the tap.
    value: as it passed; axes of `vmap` come first.
    beside: other arrays given to the tap; where they differ from lane to lane
      of a `vmap`, its axis comes first too.
  """

  label: Any
  value: jax.Array
  beside: tuple[jax.Array, ...]


class LoopError(ValueError):
  """A tap stands in a loop or a branch: it has no one value.

  Attributes:
    labels: of the taps.
    kind: of the loop, by the name that JAX has for it: 'scan', 'while', 'cond'.
  """

  def __init__(self, labels: list[Any], kind: str):
    super().__init__(f'taps {labels} stand in a {kind}')
    self.labels = labels
    self.kind = kind


def tap(value: jax.Array, *beside: jax.Array, label: Any) -> jax.Array:
  """Returns the value; `run` sees it, and what was given beside it.

  Args:
    value: any array.
    *beside: others that `run` hands out with it.
    label: hashable, tells this tap from others.
  """
  return _tap_p.bind(value, *beside, label=label)


def run(function: Callable[..., Any], *args: Any) -> tuple[Any, list[Tapped]]:
  """function(*args), and what its taps saw, in order of execution.

  An argument that reaches a tap unchanged, through whatever nesting, comes out
  as the very object that was put in.

  Raises:
    LoopError: a tap stands in a loop or a branch.
  """
  #   traced                        run by `_run`
  #
  #   a = dot x w                   a = dot x w
  #   b = jit[ c = tap a            c = a, and a is what the tap saw
  #            d = exp c ] a        d = exp c
  #   e = scan[ ... ] d             e = scan[ ... ] d    (no tap inside)
  #
  # `_run` may itself be traced: then what the taps saw are tracers of the outer
  # program, and can be returned from it.
  program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
  found = []
  leaves = _run(program.jaxpr, program.consts, jax.tree.leaves(args), found)
  return jax.tree.unflatten(jax.tree.structure(shape), leaves), found


def _run(program: core.Jaxpr, consts: list[Any], args: list[Any],
         found: list[Tapped]) -> list[Any]:
  """Step by step, entering what holds taps."""
  values = dict(zip(program.constvars, consts, strict=True))
  values |= zip(program.invars, args, strict=True)
  read = lambda atom: (
      atom.val if isinstance(atom, core.Literal) else values[atom])
  for step in program.eqns:
    if step.primitive is _tap_p:
      value, *beside = map(read, step.invars)
      found.append(Tapped(step.params['label'], value, tuple(beside)))
      results = [value]
    elif not (labels := _labels(step)):
      # Operands may repeat; a program's arguments may not.
      operands = list(dict.fromkeys(
          atom for atom in step.invars if not isinstance(atom, core.Literal)))
      # JAX's own evaluation of one step, so that all rules of the primitive
      # hold.
      alone = program.replace(constvars=[], invars=operands,
                              outvars=step.outvars, eqns=[step])
      results = jax.core.eval_jaxpr(alone, (), *map(read, operands))
    elif step.primitive in _TRANSPARENT:
      inner = step.params.get('jaxpr') or step.params['call_jaxpr']
      # Some keep their constants beside the program, others have none.
      closed = isinstance(inner, core.ClosedJaxpr)
      results = _run(inner.jaxpr if closed else inner,
                     inner.consts if closed else [],
                     list(map(read, step.invars)), found)
    else:
      # A body that runs many times has as many values, and a branch perhaps
      # none.
      raise LoopError(labels, step.primitive.name)
    values |= zip(step.outvars, results, strict=True)
  return [read(atom) for atom in program.outvars]


def _labels(step: core.JaxprEqn) -> list[Any]:
  """The labels of all taps inside one step of a program, at any depth."""
  found = []
  for inner in core.jaxprs_in_params(step.params):
    for below in inner.eqns:
      if below.primitive is _tap_p:
        found.append(below.params['label'])
      found += _labels(below)
  return found


def _batched(operands, axes, *, label):
  """A tap under vmap: one tap of all lanes, outside."""
  # The axis of lanes goes to the front, where a layer has its batch axes.
  first = [operand if axis is None else jnp.moveaxis(operand, axis, 0)
           for operand, axis in zip(operands, axes, strict=True)]
  return _tap_p.bind(*first, label=label), None if axes[0] is None else 0


batching.primitive_batchers[_tap_p] = _batched
