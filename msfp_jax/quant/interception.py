"""The quantizable layers of a Flax model, found by interception."""

from collections.abc import Callable, Container, Mapping
import contextlib
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import numpy as np

_LAYER_TYPES = (nn.Conv, nn.Dense)


def layer_name(module: nn.Module) -> str:
  """The path of a module joined with dots."""
  return '.'.join(module.path)


# (module, its input, what the module does) -> its output.
Visit = Callable[[nn.Module, jax.Array, Callable[[jax.Array], jax.Array]],
                 jax.Array]


@contextlib.contextmanager
def intercept(visit: Visit):
  """While open, every nn.Conv and nn.Dense returns what `visit` does.

  The model's own code stays as it is; other modules are untouched.
  """

  def interceptor(next_fun, args, kwargs, context):
    if (context.method_name != '__call__'
        or not isinstance(context.module, _LAYER_TYPES)):
      return next_fun(*args, **kwargs)
    x, *rest = args or (kwargs.pop('inputs'),)
    return visit(context.module, x, lambda x: next_fun(x, *rest, **kwargs))

  with nn.intercept_methods(interceptor):
    yield


def intercept_inputs(visit: Callable[[str, jax.Array], jax.Array]):
  """While open, every nn.Conv and nn.Dense sees `visit(name, input)`."""
  return intercept(
      lambda module, x, compute: compute(visit(layer_name(module), x)))


def list_layers(model: nn.Module, params: Any, *inputs: Any
                ) -> dict[str, tuple[int, ...]]:
  """{name: kernel shape} of every Conv and Dense, in order of execution.

  Args:
    model: any linen model.
    params: its parameters, or their shapes.
    *inputs: what it is called with, or their shapes.

  Raises:
    ValueError: the model has weights of two or more dimensions that belong to
      neither an nn.Conv, nn.Dense nor nn.Embed, which nothing would quantize.
  """
  names = []

  def visit(name, x):
    if name in names:
      raise ValueError(f'layer {name!r} is called more than once: one '
                       'quantizer cannot serve both; give each call a layer')
    names.append(name)
    return x

  with intercept_inputs(visit):
    jax.eval_shape(model.apply, {'params': params}, *inputs)
  weights = {'.'.join(path): leaf.shape
             for path, leaf in traverse_util.flatten_dict(params).items()
             if len(leaf.shape) > 1 and path[-1] != 'embedding'}
  layers = {name: weights.pop(f'{name}.kernel') for name in names}
  if weights:
    raise ValueError(
        'these weights belong to no nn.Conv or nn.Dense and would stay in full '
        f'precision: {sorted(weights)}; write the model with those layers')
  return layers


def leaves(params: Any, kind: str, names: Container[str] | None = None
           ) -> dict[str, jax.Array]:
  """{layer: its parameter of one kind} of a model's parameters.

  Args:
    params: nested.
    kind: 'kernel' or 'bias'.
    names: only these layers; None for all that have one.
  """
  found = {'.'.join(path[:-1]): value for path, value
           in traverse_util.flatten_dict(params).items() if path[-1] == kind}
  return {name: value for name, value in found.items()
          if names is None or name in names}


def replace(params: Any, kind: str, new: Mapping[str, jax.Array]) -> Any:
  """Parameters with those of the layers in `new` replaced; see `leaves`."""
  flat = traverse_util.flatten_dict(params)
  for path in flat:
    name = '.'.join(path[:-1])
    if path[-1] == kind and name in new:
      flat[path] = new[name]
  return traverse_util.unflatten_dict(flat)


def check_finite(kernels: Mapping[str, jax.Array]) -> None:
  """Raises ValueError if a kernel holds NaN or infinity; names the first.

  Kernels that are being traced are not looked at.
  """
  for name, kernel in kernels.items():
    if not isinstance(kernel, jax.core.Tracer):
      if bad := np.count_nonzero(~np.isfinite(kernel)):
        raise ValueError(f'layer {name}: {bad} of {np.size(kernel)} values '
                         'are NaN or infinite; check the checkpoint')
