"""The quantizable layers of any Flax model, found by interception.

A layer is a module whose type is exactly nn.Conv or nn.Dense and that computes
what these compute: only then is its product, done in another way, the same.
"""

from collections.abc import Callable, Container, Iterable, Mapping
import contextlib
import itertools
from typing import Any, NamedTuple

import flax
from flax import traverse_util
import flax.linen as nn
import jax
import numpy as np

from msfp_jax.quant import refusals
from msfp_jax.quant import taps
from msfp_jax.quant.qtensor import QTensor

_trace_numbers = itertools.count()
# The collection in which layers keep what they are to know at the next call.
_MEMORY = 'memory'


def layer_name(module: nn.Module) -> str:
  """The path of a module joined with dots."""
  return '.'.join(module.path)


# (module, its input, what the module does) -> its output.
Visit = Callable[[nn.Module, jax.Array, Callable[[jax.Array], jax.Array]],
                 jax.Array]


@contextlib.contextmanager
def intercept(visit: Visit):
  """While open, every layer returns what `visit` does.

  The model's own code stays as it is; other modules are untouched. Run the
  model by `call`, which minds what nn.jit remembers.

  Raises:
    ValueError: from the model, at a layer that cannot be replaced, see
      `refusals.why_not`.
  """

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if type(module) in refusals.WEIGHT_CHANGES:
      raise ValueError(refusals.changed(
          layer_name(module.layer_instance), 'kernel'))
    if (context.method_name != '__call__'
        or type(module) not in refusals.LAYER_TYPES):
      return next_fun(*args, **kwargs)
    if reason := refusals.why_not(module):
      raise ValueError(f'layer {layer_name(module)}: {reason}')
    x = args[0] if args else kwargs['inputs']
    return visit(module, x, next_fun)

  with nn.intercept_methods(interceptor):
    yield


def intercept_inputs(visit: Callable[[str, jax.Array], jax.Array]):
  """While open, every layer sees `visit(name, input)`."""
  return intercept(
      lambda module, x, compute: compute(visit(layer_name(module), x)))


def call(model: nn.Module, params: Any, visit: Visit, *inputs: Any,
         names: Iterable[str] = ()) -> Any:
  """model(*inputs) where every layer returns what `visit` does.

  Args:
    model: any linen model.
    params: see `parameters`; those of layers that `visit` does not compute
      may be absent.
    visit: see `intercept`.
    *inputs: what the model takes.
    names: of the layers whose parameters are absent.

  Raises:
    ValueError: a layer that cannot be replaced; a model that needs more than
      parameters, or other ones.
  """
  return _apply(model, params, visit, inputs, names, {})


def call_remembering(
    model: nn.Module, params: Any, visit: Visit, memory: Any, *inputs: Any,
    names: Iterable[str] = ()) -> tuple[Any, Any]:
  """Likewise, where layers keep something from one call to the next.

  `visit` reads and writes it by `recall` and `remember`, inside of nn.jit and
  nn.remat too.

  Args:
    model: as of `call`.
    params: likewise.
    visit: likewise.
    memory: what the call before returned; {} at the first.
    *inputs: as of `call`.
    names: likewise.

  Returns:
    The model's output, and what its layers keep, a pytree.
  """
  out, kept = _apply(model, params, visit, inputs, names, {_MEMORY: memory},
                     mutable=[_MEMORY])
  return out, flax.core.unfreeze(kept.get(_MEMORY, {}))


def recall(module: nn.Module, name: str) -> jax.Array | None:
  """What a layer kept under a name at the call before; None: nothing."""
  return module.get_variable(_MEMORY, name)


def remember(module: nn.Module, name: str, value: jax.Array) -> None:
  """Keeps something for the next call; see `call_remembering`."""
  module.put_variable(_MEMORY, name, value)


def _apply(model, params, visit, inputs, names, collections, **options):
  params = parameters(params)
  # A collection named anew at every call is part of what nn.jit compares: it
  # cannot find a trace of an earlier call, whose `visit` was another.
  marks = _marks([*traverse_util.flatten_dict(params),
                  *((*name.split('.'), 'kernel') for name in names)])
  variables = {'params': params, f'trace {next(_trace_numbers)}': marks}
  with intercept(visit), refusals.explained():
    return model.apply(variables | collections, *inputs, **options)


def _marks(paths: Iterable[tuple[str, ...]]) -> dict[str, Any]:
  """A collection of no values that keeps nn.jit from mixing up its traces.

  nn.jit traces a block once, and runs what it traced for every block of equal
  structure, at later calls too: another block's layers, or another `visit`.
  With names of its own in every block the structures differ.

  Args:
    paths: of all parameters.
  """
  blocks = {path[:depth] for path in paths for depth in range(len(path))}
  return traverse_util.unflatten_dict(
      {(*block, f'in {"/".join(block)}'): None for block in blocks})


class Call(NamedTuple):
  """One layer at work.

  Attributes:
    module: the nn.Conv or nn.Dense, without its parameters.
    input: what it got, `[..., I]`.
  """

  module: nn.Module
  input: jax.Array


def record(model: nn.Module, params: Any, *inputs: Any
           ) -> tuple[Any, dict[str, Call]]:
  """model(*inputs), and what every layer got; a pure function.

  Under nn.jit, nn.remat and nn.vmap too; a layer under nn.vmap gets the values
  of all lanes, with their axis first.

  Args:
    model: any linen model.
    params: see `parameters`.
    *inputs: what it is called with.

  Returns:
    The model's output, and {layer: its call} in order of execution.

  Raises:
    ValueError: one sentence on a model that cannot be quantized.
  """
  out, seen, _ = _record(model, parameters(params), *inputs)
  return out, seen


def _record(model, params, *inputs):
  """`record`, and {path: type of the module there} of all that was called."""
  owners, modules = {}, {}

  def note(next_fun, args, kwargs, context):
    # The innermost is the last: nn.remat(nn.Conv) is another type around one.
    owners[context.module.path] = type(context.module)
    return next_fun(*args, **kwargs)

  def visit(module, x, compute):
    # Without its parent the module keeps no scope, and no tracer, alive.
    modules[module.path] = module.clone(parent=None)
    # The parameters pass through the tap as well: what comes out is the very
    # array that went in, unless the model changed it on the way (`refusals`).
    own = module.variables.get('params', {})
    return compute(taps.tap(x, *own.values(), label=(
        module.path, tuple((kind, v.shape) for kind, v in own.items()))))

  def run(params, *inputs):
    with nn.intercept_methods(note):
      return call(model, params, visit, *inputs)

  try:
    out, found = taps.run(run, params, *inputs)
  except taps.LoopError as error:
    name = '.'.join(error.labels[0][0])
    raise ValueError(
        f'layer {name} runs in a loop or branch of the model ({error.kind}; '
        'nn.scan makes one): one quantizer cannot serve all its turns; '
        'write the turns out, with a layer for each') from error
  seen = {}
  for one in found:
    path, kinds = one.label
    name = '.'.join(path)
    refusals.check_weights(name, path, kinds, one.beside, params)
    # Also one module called twice: its inputs may differ as much as two
    # layers'.
    if name in seen:
      raise ValueError(f'layer {name!r} is called more than once: one '
                       'quantizer cannot serve both; give each call a layer')
    seen[name] = Call(modules[path], one.value)
  return out, seen, owners


def list_layers(model: nn.Module, params: Any, *inputs: Any
                ) -> dict[str, tuple[int, ...]]:
  """{name: kernel shape} of every layer, in order of execution.

  Args:
    model: any linen model.
    params: its parameters, or their shapes; see `parameters`.
    *inputs: what it is called with, or their shapes.

  Raises:
    ValueError: one sentence on a model that cannot be quantized. Among others:
      it has weights of two or more dimensions that belong to no layer, nn.Embed
      or normalization, which nothing would quantize.
  """
  # Filled while JAX traces; eval_shape calls `look` exactly once.
  names, owners = [], {}

  def look(params, *inputs):
    out, seen, types = _record(model, params, *inputs)
    names.extend(seen)
    owners.update(types)
    return out

  params = parameters(params)
  jax.eval_shape(look, params, *inputs)
  weights = {'.'.join(path): (path, leaf)
             for path, leaf in traverse_util.flatten_dict(params).items()
             if len(leaf.shape) > 1}
  layers = {name: weights.pop(f'{name}.kernel')[1].shape for name in names}
  refusals.check_others({
      name: owners.get(path[:-1]) for name, (path, _) in weights.items()
      # A table that one call does not look into may serve another.
      if path[-1] != 'embedding' or path[:-1] in owners})
  return layers


def parameters(given: Any) -> dict[str, Any]:
  """A model's parameters as plain nested dicts of arrays.

  Args:
    given: the parameters, or the variables {'params': parameters} that init
      returned; dict or FrozenDict; boxes (nn.Partitioned) are opened.

  Raises:
    ValueError: something else, or variables besides the parameters.
  """
  if not isinstance(given, Mapping):
    raise ValueError(
        f'parameters must be the nested dict that model.init returned, not '
        f'{type(given).__name__}')
  if isinstance(given.get('params'), Mapping):
    # What init sows is of no use later.
    others = sorted(name for name, content in given.items() if content
                    and name not in ('params', 'intermediates'))
    if others:
      raise ValueError(
          f'the model keeps variables {others} beside its parameters, for '
          'which a quantized model has no place: fold them into the '
          'parameters, or write the model without (nn.GroupNorm in place of '
          'nn.BatchNorm)')
    given = given['params']
  return flax.core.unfreeze(nn.meta.unbox(given))


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

  Or values so large that float32 does not hold the range of a group of both
  signs. Kernels that are being traced are not looked at.
  """
  most = np.finfo(np.float32).max / 4
  for name, kernel in kernels.items():
    if isinstance(kernel, QTensor):
      raise ValueError(f'the weights of layer {name} are quantized already, '
                       'and a second time would move them: pass the '
                       "model's own parameters")
    if np.issubdtype(kernel.dtype, np.complexfloating):
      raise ValueError(f'layer {name} has complex weights, which no format '
                       'here holds')
    if not isinstance(kernel, jax.core.Tracer):
      if bad := np.count_nonzero(~(np.abs(kernel) <= most)):
        raise ValueError(f'layer {name}: {bad} of {np.size(kernel)} values '
                         f'are NaN or infinite, or beyond {most:.3g}; check '
                         'the checkpoint')


def check_others(params: Any) -> None:
  """Raises ValueError if a parameter that is no kernel holds NaN or infinity.

  Biases and normalizations; those that are being traced are not looked at.
  """
  for path, value in traverse_util.flatten_dict(params).items():
    if path[-1] != 'kernel' and not isinstance(
        value, jax.core.Tracer) and not np.isfinite(value).all():
      raise ValueError(f'{".".join(path)} holds values that are NaN or '
                       'infinite; check the checkpoint')
