"""How many bits each layer has: by its role and the exceptions."""

from collections.abc import Callable, Mapping

from msfp_jax.quant import recipes
from msfp_jax.quant import roles as roles_lib
from msfp_jax.quant.quantizers import FULL_BITS


def layer_widths(bits: int, act_bits: int,
                 exceptions: str | Mapping[str, int] | None = None,
                 roles: Mapping[str, str] | None = None
                 ) -> Callable[[str], tuple[str, int, int]]:
  """A function of a layer's name: its role, and bits of weights and input.

  Args:
    bits: of weights.
    act_bits: of inputs.
    exceptions: as of `calibrate`.
    roles: likewise.

  Raises:
    ValueError: unknown exceptions or widths; and the function, for a layer that
      no rule covers.
  """
  if exceptions is None:
    exceptions = 'ends-8' if roles is None else {}
  other = roles_lib.exceptions_of(exceptions, roles)
  for width in (bits, act_bits, *other.values()):
    recipes.check_bits(width)

  def of(name: str) -> tuple[str, int, int]:
    role = roles_lib.role_of(name, roles)
    # w32a8 leaves every weight in full precision, those of exceptions too.
    return role, *(width if width == FULL_BITS else other.get(role, width)
                   for width in (bits, act_bits))
  return of
