"""GPTQ against its textbook form."""

import itertools

import flax.linen as nn
import flax.struct
from gptq_cases import by_gptq
from gptq_cases import correlated
from gptq_cases import GRAM
from gptq_cases import KERNEL
from gptq_cases import nearest
from gptq_cases import OUTPUTS
from gptq_cases import RNG
from gptq_cases import ROWS
from gptq_cases import true_error
from gptq_cases import X
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import gptq as benchmark
from msfp_jax import diffusion
from msfp_jax.quant import block_formats
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import functional
from msfp_jax.quant import gptq
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant.block import Block
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.numbers import int_format
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static


def static(fmt, kernel=KERNEL, share=0.8, zero_point=False):
  """Makes scales of every output, and zero points at their minima."""
  axes = tuple(range(kernel.ndim - 1))
  low, high = (share * end for end in (
      kernel.min(axes, keepdims=True), kernel.max(axes, keepdims=True)))
  reach = high - low if zero_point else np.maximum(high, -low)
  # Of 16 bits, as calibration has them: their products with levels are exact.
  return Static(fmt, functional.snap_scale(jnp.float32(reach / fmt.max)),
                jnp.float32(low) if zero_point else None)


@flax.struct.dataclass
class Shifted(Quantizer):
  """Weights with a power of two for every 16 of them below their scale."""

  fmt: FPFormat = flax.struct.field(pytree_node=False)
  bits = property(lambda self: self.fmt.bits)

  def quantize(self, x, axis=-1):
    groups = jnp.abs(x).reshape(-1, 16, x.shape[-1]).max(1)
    shift = jnp.clip(jnp.ceil(jnp.log2(groups / self.fmt.max / 0.05)), 0, 4)
    like = QTensor(
        x, jnp.full((1, x.shape[-1]), 0.05), None, jnp.uint8(shift),
        fmt=self.fmt, length=len(x), axis=axis, shift_group=16)
    return like.with_levels_of(x)


FORMATS = {
    'E2M1': static(FPFormat(2, 1)),
    'UE2M2 with zero point': static(FPFormat(2, 2, False), zero_point=True),
    'INT4 min-max': static(int_format(4), zero_point=True),
    'INT8': static(int_format(8), zero_point=True),
    'NVFP4': block_formats.nvfp4(4),
    'MXFP4': block_formats.mxfp4(4),
    'MXFP4 optimal': block_formats.mxfp4(4, 'optimal'),
    'INT4 group 64': block_formats.int_group(4),
    'INT4 group 64 min-max': block_formats.int_minmax(4),
    'one zero point': Block(FPFormat(2, 2, False), 'channel', zero_point=-1.5),
    'tensor': Block(FPFormat(2, 1), 'tensor'),
    'shifts': Shifted(FPFormat(1, 2)),
}
by_format = pytest.mark.parametrize(
    'quantizer', FORMATS.values(), ids=FORMATS.keys())


def textbook(w, gram, grids, damping):
  """Algorithm of arXiv 2210.17323 without its speed-ups, float64.

  One input after another; the rest makes up for its error by the inverse of
  the Gram matrix, from which that input is then taken out.

  Args:
    w: `[K, O]`.
    gram: `[K, K]`.
    grids: (row, column) -> the values that the weight may take.
    damping: of the diagonal.
  """
  w, total = np.float64(w), len(w)
  damped = gram + damping * np.mean(np.diag(gram)) * np.eye(total)
  inverse = np.linalg.inv(damped)
  out = np.empty_like(w)
  left = np.argsort(-np.diag(gram), kind='stable').tolist()
  while left:
    i = left.pop(0)
    for j in range(w.shape[1]):
      grid = grids(i, j)
      out[i, j] = grid[np.abs(grid - w[i, j]).argmin()]
    w -= np.outer(inverse[:, i] / inverse[i, i], w[i] - out[i])
    inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
  return out


def grids_of(tensor):
  """The values that each weight of a tensor may take, by its parts."""
  levels = tensor.fmt.levels()
  scale = np.float64(tensor.scale) * np.float64(
      1 if tensor.outer is None else tensor.outer)
  zero = np.float64(0 if tensor.zero_point is None else tensor.zero_point)

  def spot(part, group, i, j):
    rows = np.broadcast_to(part, np.broadcast_shapes(part.shape, (1, OUTPUTS)))
    return rows[i // group if len(rows) > 1 else 0, j]

  shift = (lambda i, j: 1) if tensor.shift is None else (
      lambda i, j: 2.0**tensor.shift[i // tensor.shift_group, j])
  return lambda i, j: (
      levels * spot(scale, tensor.group, i, j) * shift(i, j)
      + spot(zero, tensor.group, i, j))


@by_format
def test_levels_are_those_of_the_textbook(quantizer):
  tensor = jax.tree.map(np.asarray, quantizer.quantize(KERNEL, -2))
  expected = textbook(KERNEL, GRAM, grids_of(tensor), 0.01)
  found = by_gptq(quantizer)
  better = true_error(expected) < true_error(nearest(quantizer))
  assert better
  # An output that is better off with its nearest levels keeps them.
  least = np.where(
      np.sum((X @ (expected - KERNEL))**2, 0)
      < np.sum((X @ (np.float64(nearest(quantizer)) - KERNEL))**2, 0),
      expected, nearest(quantizer))
  np.testing.assert_allclose(found, least, rtol=1e-5, atol=1e-6)


@by_format
def test_outputs_err_less_and_no_output_errs_more(quantizer):
  columns = lambda w: np.mean((X @ (np.float64(w) - KERNEL))**2, 0)
  found, before = columns(by_gptq(quantizer)), columns(nearest(quantizer))
  assert (found <= before * (1 + 1e-9)).all()
  assert found.sum() < 0.7 * before.sum()
  assert gptq.output_error(KERNEL, by_gptq(quantizer), GRAM) == pytest.approx(
      true_error(by_gptq(quantizer)), rel=1e-6)


@by_format
def test_inputs_without_correlation_leave_the_nearest_levels(quantizer):
  np.testing.assert_array_equal(
      by_gptq(quantizer, gram=np.diag(RNG.uniform(1, 2, ROWS))),
      nearest(quantizer))


@by_format
def test_scales_stay_and_codes_are_of_the_format(quantizer):
  one = gptq.round_weights(KERNEL, quantizer, GRAM)
  other = quantizer.quantize_banks(jnp.asarray(KERNEL)[None])
  for part in ('scale', 'zero_point', 'outer', 'shift'):
    tiny.assert_trees_equal(getattr(one, part), getattr(other, part))
  packed = one.packed()
  np.testing.assert_array_equal(packed.dequantize(), one.dequantize())
  np.testing.assert_array_equal(packed.unpacked().data, one.data)


def test_ties_go_where_the_quantizer_has_them_go():
  for fmt in (FPFormat(2, 1), FPFormat(3, 0), int_format(4)):
    levels = fmt.levels()
    middles = (levels[1:] + levels[:-1])[:, None] / 2
    one = Static(fmt, jnp.float32([[1]]))
    np.testing.assert_array_equal(
        by_gptq(one, np.float32(middles), np.eye(len(middles))),
        nearest(one, np.float32(middles)))


def test_more_inputs_than_a_block_of_rows():
  x = correlated(300)
  kernel = RNG.standard_normal((300, 3)).astype(np.float32)
  quantizer = static(FPFormat(2, 1), kernel)
  gram = x.T @ x / len(x)
  levels = np.float64(quantizer.fmt.levels())
  expected = textbook(
      kernel, gram, lambda i, j: levels * np.float64(quantizer.scale)[0, j],
      0.01)
  np.testing.assert_allclose(
      by_gptq(quantizer, kernel, gram), expected, rtol=1e-5, atol=1e-6)


def test_an_input_that_was_always_0_is_rounded_to_nearest():
  x = X.copy()
  x[:, [3, 50]] = 0
  found = by_gptq(FORMATS['E2M1'], gram=x.T @ x / len(x))
  np.testing.assert_array_equal(
      found[[3, 50]], nearest(FORMATS['E2M1'])[[3, 50]])
  assert true_error(found, x) < true_error(nearest(FORMATS['E2M1']), x)
  np.testing.assert_array_equal(
      by_gptq(FORMATS['E2M1'], gram=np.zeros((ROWS, ROWS))),
      nearest(FORMATS['E2M1']))


def test_a_group_of_zeros_stays_zero():
  kernel = KERNEL.copy()
  kernel[16:32, 2] = 0
  found = by_gptq(FORMATS['NVFP4'], kernel)
  assert not found[16:32, 2].any() and found[16:32, 3].any()


@pytest.mark.parametrize('options, message', [
    ({'gram': GRAM[:-1, :-1]}, '79, 79.*80 x 80'),
    ({'gram': np.where(GRAM == GRAM[3, 4], np.nan, GRAM)}, 'NaN or infinity'),
    ({'gram': GRAM - 10 * np.eye(ROWS)}, 'not positive definite'),
    ({'kernel': KERNEL[:40, :11]}, r'40 x 40')])
def test_a_gram_matrix_that_does_not_fit_is_refused(options, message):
  kernel = options.get('kernel', KERNEL)
  with pytest.raises(ValueError, match=message):
    gptq.round_weights(
        kernel, Block(FPFormat(2, 1), 'channel'), options.get('gram', GRAM))


class Conv(nn.Module):
  """A convolution as a model, which predicts nothing of use."""

  groups: int = 1
  stride: int = 1

  @nn.compact
  def __call__(self, x, t):
    y = nn.Conv(6, (3, 3), self.stride, feature_group_count=self.groups,
                name='conv')(x)
    return jnp.zeros_like(x) + 0 * y.mean()


@pytest.mark.parametrize('groups, stride', [
    (1, 2), pytest.param(1, 1, marks=pytest.mark.slow),
    pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_convolution_errs_less_at_its_own_output(groups, stride):
  """Rows of the Gram matrix are in the order of the kernel's, group by group.
  """
  rng = np.random.default_rng(2)
  # Neighbours alike, channels of different strength.
  x = rng.standard_normal((2, 12, 12, 4)).cumsum(1).cumsum(2)
  x = jnp.asarray(x * [0.2, 1, 0.5, 2], jnp.float32)
  model = Conv(groups, stride)
  params = jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(2))['params']
  plan = diffusion.ddim_plan(tiny.SCHEDULE, 1)
  seen = observe.collect(model, params, plan, [x], key=jax.random.key(1),
                         needs=('gram',))['conv']
  kernel = np.asarray(params['conv']['kernel'])
  quantizer = static(FPFormat(2, 1), kernel)
  output = lambda w: np.asarray(nn.Conv(
      6, (3, 3), stride, feature_group_count=groups).apply(
          {'params': {'kernel': w, 'bias': jnp.zeros(6)}}, x))
  before, after = (np.mean((output(w) - output(kernel))**2) for w in (
      nearest(quantizer, kernel), by_gptq(quantizer, kernel, seen.gram)))
  assert after < 0.6 * before
  # All places were seen, so that what the Gram matrix tells is what happens.
  assert gptq.output_error(
      kernel, nearest(quantizer, kernel), seen.gram) == pytest.approx(
          before, rel=1e-3)


@pytest.mark.long
def test_layers_of_digits16_err_less_in_every_format():
  """By the true inputs of its calibration, whatever the recipe's weights.

  Formats take turns on every second layer: all layers in all formats take
  minutes, see `python -m benchmarks.gptq`. The first convolution sees little
  but noise: where nearest levels are the best there are, GPTQ must be as good.
  """
  kernels, seen = benchmark.digits16(images=8)
  # Recipes that differ by their inputs alone have the same weights.
  fits = {recipe.weight: name for name, recipe in recipes.RECIPES.items()}
  for count, (of, recipe) in enumerate(fits.items()):
    for name, kernel in list(kernels.items())[::2][count::len(fits)]:
      quantizer = fit_lib.fit(of, Seen.of_weights(kernel), 4, -2).quantizer
      gram = seen[name].gram
      before, after = (gptq.output_error(kernel, weights, gram) for weights in (
          nearest(quantizer, kernel), by_gptq(quantizer, kernel, gram)))
      if name == 'conv_in':
        assert after <= before
        assert after <= 1.05 * best_of_neighbours(quantizer, kernel, gram)
      else:
        assert after < before, (recipe, name)


def best_of_neighbours(quantizer, kernel, gram):
  """The least output error with each weight within one level of the nearest.

  By trying all 3^K.
  """
  tensor = quantizer.quantize_banks(jnp.asarray(kernel)[None]).bank(0)
  levels, found = tensor.fmt.levels(), 0.0
  flat = lambda part: np.broadcast_to(
      np.float64(part), kernel.shape).reshape(-1, kernel.shape[-1])
  w, scale, start = flat(kernel), flat(tensor.steps()), flat(tensor.data)
  if tensor.zero_point is not None:
    w = w - flat(tensor.spread(jnp.float32(tensor.zero_point)))
  moves = np.array(list(itertools.product((-1, 0, 1), repeat=len(w))))
  for output in range(kernel.shape[-1]):
    places = np.searchsorted(levels, start[:, output]) + moves
    near = levels[np.clip(places, 0, len(levels) - 1)]
    errors = w[:, output] - near * scale[:, output]
    found += np.einsum('nk,nk->n', errors @ gram, errors).min()
  return found / kernel.shape[-1]
