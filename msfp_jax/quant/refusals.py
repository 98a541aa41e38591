"""Models that cannot be quantized, each refused in one sentence."""

from collections.abc import Mapping, Sequence
import contextlib
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np

LAYER_TYPES = (nn.Conv, nn.Dense)
# What changes the weights of a layer just before it computes. They are known by
# type because packed models hold no parameters by which `check_weights` could
# see it.
WEIGHT_CHANGES = (nn.WeightNorm, nn.SpectralNorm)
# Their weights of two and more dimensions are no products.
_NO_PRODUCT = (nn.BatchNorm, nn.Embed, nn.GroupNorm, nn.InstanceNorm,
               nn.LayerNorm, nn.RMSNorm)
_PRODUCTS = ('dot_general', 'dot_general_cls', 'conv_general_dilated',
             'conv_general_dilated_cls')
_WRITE = 'write the model with plain nn.Conv and nn.Dense'


def why_not(module: nn.Module) -> str | None:
  """Why an nn.Conv or nn.Dense cannot be replaced by its product.

  A function given as `conv_general_dilated` says that it computes what
  `lax.conv_general_dilated` computes by an attribute `is_convolution` that is
  true.

  Returns:
    A sentence; None for a layer that can.
  """
  # Our product takes the place of the module's: what was asked of it would be
  # left out without a word.
  for name in _PRODUCTS:
    own = getattr(module, name, None)
    if not (own in (None, jax.lax.dot_general, jax.lax.conv_general_dilated)
            or getattr(own, 'is_convolution', False)):
      return f'a {name} of its own would not be used: {_WRITE}'
  if module.promote_dtype is not nn.dtypes.promote_dtype:
    return f'a promote_dtype of its own would not be used: {_WRITE}'
  if getattr(module, 'mask', None) is not None:
    return ('a masked convolution cannot be packed: write the model without '
            'masks')
  dilation = getattr(module, 'input_dilation', None)
  if any(n not in (None, 1) for n in np.ravel(dilation)):
    return (f'input_dilation {dilation}: a transposed convolution cannot be '
            'packed; resize the input before an nn.Conv')
  return None


def check_weights(name: str, path: Sequence[str],
                  kinds: Sequence[tuple[str, tuple[int, ...]]],
                  weights: Sequence[jax.Array], params: Any) -> None:
  """Raises ValueError unless a layer computes with its very parameters.

  Args:
    name: of the layer.
    path: of the layer in `params`.
    kinds: ('kernel' or 'bias', its shape) as the layer saw them.
    weights: of these kinds, what the layer computed with.
    params: of the model; identity counts, not equality.
  """
  for key in path:
    params = params[key]
  for (kind, shape), weight in zip(kinds, weights, strict=True):
    if params[kind].shape != shape:
      raise ValueError(
          f'layer {name}: its {kind} {params[kind].shape} holds those of '
          f'several layers {shape}, as nn.vmap and nn.scan make it: write '
          'these layers out, each under a name of its own')
    # Identity: an array that is equal today may be computed from the parameter.
    if weight is not params[kind]:
      raise ValueError(changed(name, kind))


def changed(name: str, kind: str) -> str:
  """Why a layer whose parameters are changed on the way is refused."""
  return (f'layer {name} computes with another {kind} than its parameter '
          '(nn.WeightNorm, nn.SpectralNorm and nn.map_variables do so): fold '
          'the change into the parameter, and leave it out of the model')


def check_others(weights: Mapping[str, type | None]) -> None:
  """Raises ValueError on weights that nothing would quantize.

  Args:
    weights: {name: type of the module that holds it, None where the model
      called none}, of two or more dimensions and of no layer.
  """
  if unused := sorted(name for name, owner in weights.items()
                      if owner is None):
    raise ValueError(
        f'the model does not call what these weights belong to: {unused}; '
        'leave them out of the parameters and the model')
  others = []
  for name, owner in sorted(weights.items()):
    if not issubclass(owner, _NO_PRODUCT):
      base = next((f', a subclass of nn.{b.__name__}' for b in LAYER_TYPES
                   if issubclass(owner, b)), '')
      others.append(f'{name} (of a {owner.__name__}{base})')
  if others:
    raise ValueError(
        'these weights are of modules that are not exactly nn.Conv or '
        f'nn.Dense, and would stay in full precision: {", ".join(others)}; '
        f'{_WRITE}')


@contextlib.contextmanager
def explained():
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
