"""Formats numbers as people read them."""

import math

_SUPERSCRIPTS = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')


def significant(value: float, digits: int = 3) -> str:
  """Formats with so many significant digits: '0.0123', '1.23·10⁻⁵', '12.3'.

  Whole numbers from 10^digits on keep all their digits, in groups of three.
  """
  if value == 0 or not math.isfinite(value):
    return f'{value:g}'
  # Of the rounded value: 9.999 with three digits is 10.0, a digit less behind
  # the point.
  exponent = math.floor(math.log10(abs(float(f'{value:.{digits - 1}e}'))))
  if exponent < -3 or exponent > 8:
    mantissa = f'{value / 10.0**exponent:.{digits - 1}f}'
    return f'{mantissa}·{power_of_ten(exponent)}'
  return f'{value:,.{max(digits - 1 - exponent, 0)}f}'


def power_of_ten(exponent: int) -> str:
  """Formats a power of ten: '10⁻³'."""
  return '10' + str(exponent).translate(_SUPERSCRIPTS)


def tick(value: float) -> str:
  """Formats a label of a logarithmic axis: '0.01', '200', '2·10⁻⁵'."""
  if 1e-4 < value < 1e5:
    return f'{value:g}'
  exponent = math.floor(math.log10(value) + 1e-9)
  factor = value / 10.0**exponent
  head = '' if abs(factor - 1) < 1e-6 else f'{factor:g}·'
  return head + power_of_ten(exponent)


def timestep(value: float) -> str:
  """A timestep: '999', and of real ones four digits, '333.3', '0.8571'."""
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def ratio(value: float) -> str:
  """Formats a ratio: '2.3x'."""
  return f'{value:.2f}x' if value < 10 else f'{value:.0f}x'
