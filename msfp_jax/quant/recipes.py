"""Recipes: how weights and inputs are quantized, one entry each.

    RECIPES['mine'] = Recipe(weight=..., nal=..., aal=...)

makes a recipe that calibrates, trains, evaluates, packs, saves and reports.
'mine+gptq' is then the same with its weights rounded by GPTQ, 'mine+by_step'
with the ranges of its inputs searched for every step of the sampler,
'mine+weighted' with one for all steps that minds their denoising factors,
'mine+smooth' with a power of two for every channel of its inputs, and
'mine+differences' with its inputs quantized as what they differ by from the
step before (`kernels.differences`).
"""

from collections.abc import Callable, Collection
import dataclasses
import functools
import re
from typing import Any

from msfp_jax.base import arguments
from msfp_jax.quant import block_formats
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import numbers
from msfp_jax.quant import suppress
from msfp_jax.quant.around import FindAround
from msfp_jax.quant.around import Rotation
from msfp_jax.quant.block import Block
from msfp_jax.quant.dual_scale import FitDualScale
from msfp_jax.quant.fit import BestOf
from msfp_jax.quant.fit import Dynamic
from msfp_jax.quant.fit import Fit
from msfp_jax.quant.fit import INTEGER
from msfp_jax.quant.fit import Searched
from msfp_jax.quant.fit import SearchedByStep
from msfp_jax.quant.fit import SearchedWeighted
from msfp_jax.quant.fit import SIGNED
from msfp_jax.quant.fit import UNSIGNED
from msfp_jax.quant.fit import UNSIGNED_RANGE
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.quant.smoothing import Smoothing
from msfp_jax.quant.svdquant import IntegersBySign
from msfp_jax.quant.svdquant import SVDQuant

# How weights get to levels: each to its nearest, or so that outputs err least.
NEAREST, GPTQ = 'nearest', 'gptq'
ROUNDINGS = (NEAREST, GPTQ)
# How the scales of inputs are searched otherwise.
SEARCHES = {fit_lib.BY_STEP: SearchedByStep, fit_lib.WEIGHTED: SearchedWeighted}
# What may stand behind a recipe's name.
SMOOTH = 'smooth'
SUFFIXES = (*ROUNDINGS, *SEARCHES, SMOOTH, fit_lib.DIFFERENCES)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which quantizers weights and inputs get.

  Attributes:
    weight: of weights.
    nal: of the inputs of normal activation layers.
    aal: of those that follow SiLU or the like; differences never do.
    around: what stands around the product; None for nothing.
    rounding: of weights, of ROUNDINGS; 'gptq' is `gptq.round_weights`.
    differences: whether inputs are quantized as what they differ by from the
      sampler's step before, see `kernels.differences`.
  """

  weight: Fit
  nal: Fit
  aal: Fit
  around: FindAround | None = None
  rounding: str = NEAREST
  differences: bool = False

  def __post_init__(self):
    if self.rounding not in ROUNDINGS:
      raise ValueError(
          f'rounding={self.rounding!r}: must be one of {ROUNDINGS}')
    if fit_lib.BY_STEP in self.weight.needs:
      raise ValueError('its weights are searched by step, and they are the '
                       'same at every step')
    if self.around is not None and {fit_lib.BY_STEP, fit_lib.WEIGHTED} & {
        *self.nal.needs, *self.aal.needs}:
      raise ValueError(
          'its inputs are searched with regard to steps, by single values as '
          'layers get them, which what stands around its products changes')
    if self.differences and self.around is not None and {
        fit_lib.VALUES, fit_lib.ROWS, fit_lib.CHANNEL_MAXIMA} & set(
            self.nal.needs):
      raise ValueError(
          'its input is searched, which would be on differences between steps, '
          'and what stands around its product is found by whole inputs: take '
          'an input whose quantizer needs to see no values')
    if self.differences and self.nal.static:
      raise ValueError(
          'the scales of its inputs are from calibration, and differences '
          'between steps have no one range: the first of a trajectory are '
          'whole inputs, the last next to nothing; take a recipe with scales '
          "from the data, such as 'msfp_image' or 'int4_minmax'")

  @property
  def needs(self) -> Collection[str]:
    """What calibration has to gather; if empty, the model does not run."""
    return self.needs_at(numbers.MIN_BITS, numbers.MIN_BITS)

  def gathered(self, act_bits: int) -> Collection[str]:
    """What to gather for inputs of these bits, of weights of any.

    More than some of them need: most recipes then share one run.
    """
    return frozenset(self.needs) - (
        {fit_lib.DIFFERENCES} if act_bits == FULL_BITS else set())

  def needs_at(self, bits: int, act_bits: int) -> Collection[str]:
    """Likewise, with weights and inputs of these bits; 32 is full precision."""
    parts = [self.around] if self.around and bits < FULL_BITS else []
    if act_bits < FULL_BITS:
      parts += [self.nal] if self.differences else [self.nal, self.aal]
    found = {need for part in parts for need in part.needs}
    if self.differences:
      # What stands around a product is chosen for weights too, and these are
      # multiplied with whole inputs.
      if act_bits < FULL_BITS and self.nal.needs and self.around is None:
        found.add(fit_lib.DIFFERENCES)
    elif act_bits < FULL_BITS and self.nal != self.aal:
      # Extremes tell AALs from NALs, which matters only where these differ.
      found.add(fit_lib.EXTREMES)
    if bits < FULL_BITS and self.rounding == GPTQ:
      found.add(fit_lib.GRAM)
    return found


def _same(fit: Fit, around: FindAround | None = None) -> Recipe:
  """One fit for weights and all inputs."""
  return Recipe(fit, fit, fit, around)


_SIGNED = Searched((SIGNED,))
_MSFP = Recipe(weight=_SIGNED, nal=_SIGNED, aal=Searched((SIGNED, UNSIGNED)))


def _with_inputs(make: Callable[[int], Block]) -> Recipe:
  """Weights in `int_minmax`, inputs by scales from the data."""
  return Recipe(Dynamic(block_formats.int_minmax), Dynamic(make),
                Dynamic(make))


def _dynamic(shared: str, group: int = 0) -> dict[str, Recipe]:
  """MSFP, and its signed half, with the scales of inputs from the data."""
  signed = BestOf(block_formats.signed_candidates(shared, group))
  mixup = BestOf(block_formats.mixup_candidates(shared, group))
  return {f'msfp_{shared}': Recipe(_SIGNED, signed, mixup),
          f'signed_fp_{shared}': Recipe(_SIGNED, signed, signed)}


def quartz(weights: Fit | None = None, signed: Block | None = None,
           unsigned: Block | None = None, **options: Any) -> Recipe:
  """QuaRTZ: inputs of 8 bits without leading zeros, see `suppress`.

  Args:
    weights: None for INT4 in groups of 64, as its authors have it.
    signed: the first stage of NALs; None for one scale a token.
    unsigned: of AALs; None for a scale and a zero point a token.
    **options: `group` and `rounding` of `suppress.Suppressed`.
  """
  dynamic = lambda inner: Dynamic(functools.partial(
      suppress.quartz, inner=inner, **options))
  return Recipe(
      weight=weights or Dynamic(block_formats.int_group),
      nal=dynamic(signed or suppress.first_stage()),
      aal=dynamic(unsigned or suppress.first_stage(signed=False)))


# Anyone may add to it, from any module: configs name its keys.
RECIPES = {
    # "Mixup-sign": signed for NALs, signed or unsigned for AALs.
    'msfp': _MSFP,
    'signed_fp': _same(_SIGNED),
    'int': _same(Searched((INTEGER,))),
    # The same with scales from the data.
    **_dynamic('image'), **_dynamic('token'), **_dynamic('group', 32),
    # Block formats; all from the data, so that nothing has to be seen.
    'nvfp4': _same(Dynamic(block_formats.nvfp4)),
    'mxfp4': _same(Dynamic(block_formats.mxfp4)),
    'int4_group': _same(Dynamic(block_formats.int_group)),
    'int4_minmax': _same(Dynamic(block_formats.int_minmax)),
    'int4_minmax_16': _with_inputs(functools.partial(
        block_formats.int_minmax, group=16)),
    # One scale an image, which no kernel pays for.
    'int4_minmax_image': _with_inputs(block_formats.int_image),
    # Smoothing and a branch of low rank before a block format.
    'svdquant': Recipe(Dynamic(block_formats.int_group), IntegersBySign(),
                       IntegersBySign(), SVDQuant()),
    'svdquant_nvfp4': _same(Dynamic(block_formats.nvfp4), SVDQuant()),
    # Integers of 8 bits without leading zeros.
    'quartz': quartz(),
    'quartz_32': quartz(group=32),
    'quartz_truncate': quartz(rounding='truncate'),
    # Weights too, with one scale a channel: integer sums over all channels.
    'quartz_weights': quartz(Dynamic(functools.partial(
        suppress.quartz, inner=suppress.first_stage(shared='channel')))),
    # What others do about inputs that follow SiLU, and about weights.
    'dual_scale': dataclasses.replace(_MSFP, aal=FitDualScale()),
    'hadamard': _same(_SIGNED, Rotation()),
    'msfp_hadamard': dataclasses.replace(
        _MSFP, around=Rotation(only_if_better=True)),
    'unsigned_weights': dataclasses.replace(
        _MSFP, weight=BestOf(block_formats.unsigned_minmax)),
    'mixup_weights': dataclasses.replace(
        _MSFP, weight=Searched((SIGNED, INTEGER, UNSIGNED_RANGE))),
}


def get(name: str) -> Recipe:
  """The recipe of a name: a key of RECIPES, also with SUFFIXES.

  'msfp_image+gptq+differences' is 'msfp_image' with weights rounded by GPTQ,
  and with differences between steps in place of inputs; 'msfp+by_step' is
  'msfp' with ranges of inputs for every step.

  Raises:
    ValueError: there is none; those there are are listed. A suffix that the
      recipe cannot have.
    TypeError: no name.
  """
  if not isinstance(name, str):
    raise TypeError(f'recipe is {arguments.describe(name)}: it must be a name; '
                    "your own gets one by msfp.RECIPES['mine'] = "
                    'msfp.Recipe(...)')
  # From the right: a key of one's own may have a + in it.
  base, suffixes = name, []
  while base not in RECIPES and '+' in base:
    base, _, suffix = base.rpartition('+')
    suffixes.append(suffix)
  roundings = [suffix for suffix in suffixes if suffix in ROUNDINGS]
  searches = [suffix for suffix in suffixes if suffix in SEARCHES]
  if (base not in RECIPES or not set(suffixes) <= set(SUFFIXES)
      or len(set(suffixes)) < len(suffixes) or len(roundings) > 1
      or len(searches) > 1):
    raise ValueError(
        f'recipe {name!r}: must be one of {sorted(RECIPES)}, these also with a '
        f"rounding of weights, of {ROUNDINGS}, as in 'msfp+gptq', with a "
        f"search of inputs, of {tuple(SEARCHES)}, and with '+{SMOOTH}' and "
        f"'+{fit_lib.DIFFERENCES}'")
  recipe = RECIPES[base]
  try:
    if SMOOTH in suffixes:
      recipe = _smoothed(recipe)
    if searches:
      recipe = _searched_as(recipe, searches[0])
    return dataclasses.replace(
        recipe, rounding=roundings[0] if roundings else recipe.rounding,
        differences=recipe.differences or fit_lib.DIFFERENCES in suffixes)
  except ValueError as error:
    raise ValueError(f'recipe {name!r}: {error}') from error


def _smoothed(recipe: Recipe) -> Recipe:
  """The recipe with smoothing; ValueError where its place is taken."""
  if recipe.around is not None:
    raise ValueError(f'{type(recipe.around).__name__} stands around its '
                     f'products already, where {SMOOTH!r} would')
  # Where channels are scaled SiLU's tail no longer ends at its minimum.
  anywhere = lambda of: dataclasses.replace(of, candidates=tuple(
      UNSIGNED_RANGE if one == UNSIGNED else one for one in of.candidates)
                                            ) if type(of) is Searched else of
  return dataclasses.replace(recipe, nal=anywhere(recipe.nal),
                             aal=anywhere(recipe.aal), around=Smoothing())


def _searched_as(recipe: Recipe, name: str) -> Recipe:
  """The recipe with the scales of inputs searched otherwise.

  Args:
    recipe: whose inputs are searched.
    name: of SEARCHES.

  Raises:
    ValueError: it has other inputs than those that are searched as they are.
  """
  odd = [part for part in (recipe.nal, recipe.aal)
         if type(part) is not Searched]
  if odd:
    raise ValueError(
        f'{name!r} is for inputs whose quantizers {Searched.__name__} finds, '
        f"as of 'msfp' or 'int', and these have {type(odd[0]).__name__}")
  of = SEARCHES[name]
  return dataclasses.replace(recipe, nal=of(recipe.nal.candidates),
                             aal=of(recipe.aal.candidates))


def parse_bits(text: str) -> tuple[int, int]:
  """'w4a4' -> (4, 4): bits of weights and activations, 3 to 8 or 32.

  Raises:
    ValueError: anything else.
  """
  match = re.fullmatch(r'w(\d+)a(\d+)', text)
  bits = tuple(map(int, match.groups())) if match else ()
  if not bits or not all(map(_is_width, bits)):
    raise ValueError(f'bits {text!r}: must be such as w4a4, with {_WIDTHS}')
  return bits


def check_bits(bits: int) -> None:
  """Raises ValueError unless a tensor can be quantized to `bits` bits."""
  if not _is_width(bits):
    raise ValueError(f'{bits!r} bits: must be {_WIDTHS}')


_WIDTHS = (f'{numbers.MIN_BITS} to {numbers.MAX_BITS} bits, or {FULL_BITS} for '
           'full precision')


def _is_width(bits: int) -> bool:
  return isinstance(bits, int) and (
      numbers.MIN_BITS <= bits <= numbers.MAX_BITS or bits == FULL_BITS)
