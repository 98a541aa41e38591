"""What packed weights cannot be: the checks of those that files hold."""

import numpy as np

from msfp_jax.quant.qtensor import QTensor


def weight_flaws(weight: QTensor) -> list[str]:
  """All that is wrong with packed weights in NumPy; nothing if they are sound.

  Scales below 0 or not finite, parts of shapes that do not fit, shifts out of
  range.
  """
  found = []
  parts = {'scale': (weight.scale, weight.group),
           'zero_point': (weight.zero_point, weight.group),
           'shift': (weight.shift, weight.shift_group),
           'outer': (weight.outer, 0)}
  shape = (*weight.data.shape[:-2], weight.length, weight.data.shape[-1])
  rows = -(-weight.length // 2) if weight.fmt.bits <= 4 else weight.length
  if weight.data.dtype != np.uint8 or weight.data.shape[-2] != rows:
    found.append(f'codes {weight.data.dtype} {list(weight.data.shape)} of '
                 f'{weight.length} inputs')
  for name, (part, group) in parts.items():
    if part is None:
      continue
    # As many entries along the contraction as there are groups.
    whole = list(shape)
    whole[-2] = -(-weight.length // group) if group else 1
    fits = part.ndim <= len(whole) and all(
        size in (1, most) for size, most in zip(
            part.shape[::-1], whole[::-1], strict=False))
    if not fits:
      found.append(f'{name} of shape {list(part.shape)}')
  return found + value_flaws(weight) + shift_flaws(weight)


def value_flaws(weight: QTensor) -> list[str]:
  """What scales and zero points, in NumPy, cannot be."""
  found = []
  for name in ('scale', 'zero_point', 'outer'):
    if (part := getattr(weight, name)) is None:
      continue
    values = np.asarray(part, np.float32)
    if not np.isfinite(values).all():
      found.append(f'{name} holds values that are not finite')
    # A group of zeros has a scale of 0.
    if name != 'zero_point' and (values < 0).any():
      found.append(f'{name} holds values below 0')
  return found


def shift_flaws(weight: QTensor) -> list[str]:
  """What of shifts, and of what shifted levels are said to be, is no such."""
  fmt, wide, group = weight.fmt, weight.wide, weight.shift_group
  if weight.shift is None:
    return ([] if wide is None and not group
            else ['shift is missing, by which its levels are wider'])
  if wide is None or fmt.signed != wide.signed:
    return [f'shift of {fmt} to {wide}: must be of both or neither with a '
            'sign']
  if group < 1 or group & (group - 1):
    return [f'shift_group {group}: must be a power of two']
  # In steps: 7 << 4 is 112, and E1M6 has 127 of them; 7 << 5 would be 224.
  steps, room = (one.max / one.step for one in (fmt, wide))
  if steps * 2.0**(largest := np.max(weight.shift, initial=0)) > room:
    return [f'shift holds {largest}, by which {fmt} leaves {wide}']
  return []
