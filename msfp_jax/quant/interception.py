"""The quantizable layers of any Flax model, found by interception.

A layer is a module whose type is exactly nn.Conv or nn.Dense and that computes
what these compute: only then is its product, done in another way, the same.
"""

from collections.abc import Callable, Container, Iterable, Mapping
import contextlib
import itertools
from typing import Any

import flax
from flax import traverse_util
import flax.linen as nn
import jax
import numpy as np

from msfp_jax.quant import taps

_LAYER_TYPES = (nn.Conv, nn.Dense)
# Their weights of two and more dimensions are no products.
_NO_PRODUCT = (nn.BatchNorm, nn.Embed, nn.GroupNorm, nn.InstanceNorm,
               nn.LayerNorm, nn.RMSNorm)
_PRODUCTS = ('dot_general', 'dot_general_cls', 'conv_general_dilated',
             'conv_general_dilated_cls')
_WRITE = 'write the model with plain nn.Conv and nn.Dense'
_trace_numbers = itertools.count()


def layer_name(module: nn.Module) -> str:
  """The path of a module joined with dots."""
  return '.'.join(module.path)


# (module, its input, what the module does) -> its output.
Visit = Callable[[nn.Module, jax.Array, Callable[[jax.Array], jax.Array]],
                 jax.Array]


def why_not(module: nn.Module) -> str | None:
  """Why an nn.Conv or nn.Dense cannot be replaced by its product.

  A function given as `conv_general_dilated` says that it computes what
  `lax.conv_general_dilated` computes by an attribute `is_convolution` that is
  true.

  Returns:
    A sentence without its subject; None for a layer that can.
  """
  for name in _PRODUCTS:
    own = getattr(module, name, None)
    if not (own in (None, jax.lax.dot_general, jax.lax.conv_general_dilated)
            or getattr(own, 'is_convolution', False)):
      return f'has a {name} of its own, which would not be used: {_WRITE}'
  if module.promote_dtype is not nn.dtypes.promote_dtype:
    return f'has a promote_dtype of its own, which would not be used: {_WRITE}'
  if getattr(module, 'mask', None) is not None:
    return ('is a masked convolution, whose mask would not be used: '
            'quantize a model without masks')
  dilation = getattr(module, 'input_dilation', None)
  if any(n not in (None, 1) for n in np.ravel(dilation)):
    return (f'has input_dilation {dilation}: a transposed convolution is not '
            'supported; resize the input, then an nn.Conv')
  return None


@contextlib.contextmanager
def intercept(visit: Visit):
  """While open, every layer returns what `visit` does.

  The model's own code stays as it is; other modules are untouched. Run the
  model by `call`, which minds what nn.jit remembers.

  Raises:
    ValueError: from the model, at a layer that cannot be replaced (`why_not`).
  """

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or type(module) not in _LAYER_TYPES:
      return next_fun(*args, **kwargs)
    if reason := why_not(module):
      raise ValueError(f'layer {layer_name(module)} {reason}')
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
  params = parameters(params)
  # nn.jit traces a block once, and runs what it traced for all blocks alike
  # and at later calls: another `visit`, or another block's. A collection of
  # no values, with other names for every call and every block, parts them.
  paths = {path[:n] for path in [
      *traverse_util.flatten_dict(params), *(n.split('.') for n in names)]
      for n in range(len(path)) for path in [tuple(path)]}
  marks = traverse_util.unflatten_dict(
      {(*path, f'of {"/".join(path)}'): None for path in paths})
  variables = {'params': params, f'trace {next(_trace_numbers)}': marks}
  with intercept(visit), _explained():
    return model.apply(variables, *inputs)


@contextlib.contextmanager
def _explained():
  """Flax's errors about what a model lacks, as one sentence."""
  try:
    yield
  except flax.errors.InvalidRngError as error:
    raise ValueError(
        f'the model draws random numbers while it predicts '
        f'({_sentence(error)}): switch dropout off (deterministic=True)'
    ) from error
  except (flax.errors.ScopeCollectionNotFound,
          flax.errors.ScopeVariableNotFoundError,
          flax.errors.ModifyScopeVariableError,
          flax.errors.ScopeParamNotFoundError,
          flax.errors.ScopeParamShapeError) as error:
    raise ValueError(
        f'the model does not run on these parameters ({_sentence(error)}): '
        'they are another model\'s, or it keeps other variables too, as '
        'nn.BatchNorm does, for which a quantized model has no place'
    ) from error


def _sentence(error: flax.errors.FlaxError) -> str:
  """Without the address of Flax's documentation."""
  return str(error).split(' (https://')[0].rstrip('.')


def record(model: nn.Module, params: Any, *inputs: Any
           ) -> tuple[Any, dict[str, jax.Array]]:
  """model(*inputs), and what every layer got.

  Under nn.jit, nn.remat and nn.vmap too; a layer under nn.vmap gets the values
  of all lanes, with their axis first.

  Args:
    model: any linen model.
    params: see `parameters`.
    *inputs: what it is called with.

  Returns:
    The model's output, and {layer: its input `[..., I]`} in order of
    execution.

  Raises:
    ValueError: one sentence on a model that cannot be quantized.
  """
  out, seen, _ = _record(model, parameters(params), *inputs)
  return out, seen


def _record(model, params, *inputs):
  """`record`, and {path: type of the module there} of all that was called."""
  owners = {}

  def note(next_fun, args, kwargs, context):
    # The innermost is the last: nn.remat(nn.Conv) is another type around one.
    owners[context.module.path] = type(context.module)
    return next_fun(*args, **kwargs)

  def visit(module, x, compute):
    own = parameters(module.variables['params'])
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
    _check_weights(name, path, kinds, one.beside, params)
    if name in seen:
      raise ValueError(f'layer {name!r} is called more than once: one '
                       'quantizer cannot serve both; give each call a layer')
    seen[name] = one.value
  return out, seen, owners


def _check_weights(name, path, kinds, weights, params):
  """Raises ValueError unless a layer computes with its very parameters."""
  for key in path:
    params = params[key]
  for (kind, shape), weight in zip(kinds, weights, strict=True):
    if params[kind].shape != shape:
      raise ValueError(
          f'layer {name} holds {kind}s {params[kind].shape} for several '
          f'layers of {shape}, as nn.vmap and nn.scan make them: write these '
          'layers out, each with a name')
    if weight is not params[kind]:
      raise ValueError(
          f'layer {name} computes with another {kind} than its parameter '
          '(nn.WeightNorm, nn.SpectralNorm and nn.map_variables do so): fold '
          'the change into the parameter, and leave it out of the model')


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
  _check_others({name: owners.get(path[:-1])
                 for name, (path, _) in weights.items()
                 if path[-1] != 'embedding' or path[:-1] in owners})
  return layers


def _check_others(weights: Mapping[str, type | None]) -> None:
  """Raises ValueError on weights {name: type of their module} of products."""
  if unused := sorted(name for name, owner in weights.items()
                      if owner is None):
    raise ValueError(
        f'the model does not call what these weights belong to: {unused}; '
        'leave them out of the parameters and the model')
  others = []
  for name, owner in sorted(weights.items()):
    if not issubclass(owner, _NO_PRODUCT):
      base = next((f', a subclass of nn.{b.__name__}' for b in _LAYER_TYPES
                   if issubclass(owner, b)), '')
      others.append(f'{name} (of a {owner.__name__}{base})')
  if others:
    raise ValueError(
        'these weights are of modules that are not exactly nn.Conv or '
        f'nn.Dense, and would stay in full precision: {", ".join(others)}; '
        f'{_WRITE}')


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

  Kernels that are being traced are not looked at.
  """
  for name, kernel in kernels.items():
    if not isinstance(kernel, jax.core.Tracer):
      if bad := np.count_nonzero(~np.isfinite(kernel)):
        raise ValueError(f'layer {name}: {bad} of {np.size(kernel)} values '
                         'are NaN or infinite; check the checkpoint')
