"""Temporal differences: samplers, files and training against the recursion."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import students
import tiny

import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.base import devices
from msfp_jax.kernels import differences
from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import block_formats
from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.numbers import int_format
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.report import gap
from msfp_jax.run import bits
from msfp_jax.run import layer_error
from msfp_jax.run import methods
from msfp_jax.run import sensitivity
from msfp_jax.tune import finetune
from msfp_jax.tune import student as student_lib

pytestmark = pytest.mark.gpu

RECIPE = 'int4_minmax_image+differences'
PLAN = diffusion.ddim_plan(tiny.SCHEDULE, 5, eta=0.5)
KEY = jax.random.key(3)


class Two(nn.Module):
  """Predicts noise by two dense layers on every pixel."""

  sample_shape = (3, 3, 4)
  conditions = ()

  @nn.compact
  def __call__(self, x, t):
    h = nn.Dense(6, name='first')(x + t[:, None, None, None] / 1000)
    return nn.Dense(x.shape[-1], name='last', use_bias=False)(jnp.tanh(h))


MODEL = Two()
X = jax.random.normal(jax.random.key(0), (3, 3, 3, 4))
PARAMS = jax.tree.map(lambda p: p + 0.1, MODEL.init(
    jax.random.key(1), X, X[:, 0, 0, 0])['params'])
STEPS = [0, *range(PLAN.num_steps)]  # the first one twice


def simulated(act=4):
  """Weights of 4 bits; of inputs one scale an image, in float32."""
  weight = block_formats.int_group(4)
  quantizer = Block(int_format(act), 'image')
  return packed_lib.simulate(MODEL, PARAMS, spec_lib.QuantSpec('by hand', {
      name: spec_lib.LayerSpec('', '', weight, quantizer)
      for name in ('first', 'last')}, differences=True), PLAN)


def nearest(d):
  """d [B, ...] to 16 levels from an image's minimum to its maximum, float64."""
  axes = tuple(range(1, d.ndim))
  low = d.min(axes, keepdims=True)
  step = (d.max(axes, keepdims=True) - low) / 15
  step = np.where(step > 0, step, 1)  # where nothing differs
  return np.round((d - low) / step) * step + low


class ByHand:
  """The recursion of one model's two layers in float64."""

  def __init__(self, model):
    self.kernels = [np.float64(model.layers[name].weight.dequantize()[0])
                    for name in ('first', 'last')]
    self.bias = np.float64(PARAMS['first']['bias'])
    self.known = [0.0, 0.0]

  def __call__(self, x, i):
    h = x + PLAN.timesteps[i] / 1000
    for layer in range(2):
      self.known[layer] = self.known[layer] + nearest(h - self.known[layer])
      h = self.out(layer, self.known[layer])
    return h

  def out(self, layer, h):
    h = h @ self.kernels[layer]
    return np.tanh(h + self.bias) if layer == 0 else h

  def whole(self, x, i):
    """[(input, output) of both layers], inputs as they are."""
    h, found = x + PLAN.timesteps[i] / 1000, []
    for layer in range(2):
      found.append((h, h := self.out(layer, h)))
    return found


def by_hand(predict, visit=lambda i, x, eps: None):
  x = np.float64(X)
  for taken, i in enumerate(STEPS):
    eps = predict(x, i)
    if taken == 0:
      continue
    visit(i, x, eps)
    z = np.float64(jax.random.normal(jax.random.fold_in(KEY, i), X.shape))
    x = (PLAN.x_coef[i] * x - PLAN.eps_factor[i] * eps
         + PLAN.noise_std[i] * z)
  return x


def test_samples_are_those_of_the_recursion():
  model = simulated()
  np.testing.assert_allclose(
      model.sample(X, key=KEY), by_hand(ByHand(model)), rtol=1e-4, atol=1e-4)


def test_gaps_are_of_a_student_that_remembers():
  """Along the teacher's trajectory, whose x the recursion sees."""
  model, expected = simulated(), []
  teacher = lambda x, i: np.float64(MODEL.apply(
      {'params': PARAMS}, jnp.float32(x), jnp.full(3, PLAN.timesteps[i])))
  student = ByHand(model)
  seen = []
  by_hand(lambda x, i: seen.append(student(x, i)) or teacher(x, i),
          lambda i, x, eps: expected.append(np.mean((seen[-1] - eps)**2)))
  found = gap.along_trajectory(
      lambda x, t, index: MODEL.apply({'params': PARAMS}, x, t),
      model.eps_fn_of(), PLAN, X, KEY, model.memory(X))
  np.testing.assert_allclose(found.eps, expected, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    RECIPE, 'svdquant+differences', 'nvfp4+differences',
    'quartz+differences'])
def test_errors_of_inputs_all_but_vanish(name):
  """With branches and block formats too: what is left is the weights' error."""
  deployed = functools.partial(
      packed_lib.simulate, tiny.UNET, tiny.params(tiny.UNET),
      plan=diffusion.ddim_plan(tiny.SCHEDULE, 20))
  make = functools.partial(
      calibrate, tiny.UNET, tiny.params(tiny.UNET), batches=[tiny.noise(1)],
      plan=tiny.PLAN, exceptions='ends-8', key=KEY)
  plain = name.removesuffix('+differences')
  noise = tiny.noise(2)
  spec = make(recipe=plain)
  sample = lambda spec: np.asarray(deployed(spec=spec).sample(noise))
  # The same weights, whatever the inputs.
  full = dataclasses.replace(spec, layers={
      layer: dataclasses.replace(found, act=spec_lib.LayerSpec('', '').act)
      for layer, found in spec.layers.items()})
  target = sample(full)
  error = lambda spec: np.sqrt(np.mean((sample(spec) - target)**2))
  other = dataclasses.replace(spec, differences=True, layers={
      layer: dataclasses.replace(found, act=ours.act) for (layer, found), ours
      in zip(spec.layers.items(), make(recipe=name).layers.values(),
             strict=True)})
  assert error(other) < error(spec) / 2


def test_packed_models_and_their_files_remember(tmp_path):
  """Bit for bit what the simulation samples; an older reader refuses them."""
  spec = calibrate(tiny.NET, tiny.params(tiny.NET), recipe=RECIPE,
                   roles=tiny.NET_ROLES)
  model = packed_lib.simulate(
      tiny.NET, tiny.params(tiny.NET), spec, tiny.PLAN)
  noise = tiny.noise(3)
  expected = model.sample(noise)
  path = tmp_path / 'model.safetensors'
  packed_file.save(path, model.packed())
  loaded = packed_file.load(path, tiny.NET)
  assert loaded.differences
  np.testing.assert_array_equal(loaded.sample(noise), expected)
  assert b'msfp-jax/packed/3' in path.read_bytes()
  plain = dataclasses.replace(model, differences=False)
  packed_file.save(path, plain.packed())
  assert not packed_file.load(path, tiny.NET).differences
  assert b'msfp-jax/packed/2' in path.read_bytes()
  assert np.abs(plain.sample(noise) - expected).max() > 1e-3


def test_specs_say_so():
  make = functools.partial(calibrate, tiny.NET, tiny.params(tiny.NET),
                           recipe=RECIPE, roles=tiny.NET_ROLES)
  spec = make()
  assert spec.differences
  text = spec.to_json()
  assert 'msfp-jax/spec/3' in text
  assert spec_lib.QuantSpec.from_json(text) == spec
  # Inputs in full precision differ by nothing that would be quantized.
  weights = make(act_bits=32)
  assert not weights.differences
  assert 'msfp-jax/spec/2' in weights.to_json()


def test_calibration_sees_differences():
  """Of full precision's own trajectory, the first of them 0; Gram of inputs."""
  needs = (*fit_lib.NEEDS,)
  found = observe.collect(MODEL, PARAMS, PLAN, [X], key=KEY, needs=needs,
                          samples_per_layer=200_000)
  plain = observe.collect(
      MODEL, PARAMS, PLAN, [X], key=KEY, samples_per_layer=200_000,
      needs=[need for need in needs if need != fit_lib.DIFFERENCES])
  inputs = {'first': [], 'last': []}
  sampler_key = jax.random.fold_in(jax.random.fold_in(KEY, 0), PLAN.num_steps)

  def predict(x, t, index):
    h = x + t[:, None, None, None] / 1000
    jax.debug.callback(lambda h: inputs['first'].append(np.asarray(h)), h,
                       ordered=True)
    h = jnp.tanh(h @ PARAMS['first']['kernel'] + PARAMS['first']['bias'])
    jax.debug.callback(lambda h: inputs['last'].append(np.asarray(h)), h,
                       ordered=True)
    return h @ PARAMS['last']['kernel']

  diffusion.sample(predict, PLAN, X, sampler_key)
  jax.effects_barrier()
  for name, seen in inputs.items():
    apart = np.diff(np.float64(seen), axis=0)
    assert found[name].differences and not plain[name].differences
    assert found[name].maximum == pytest.approx(apart.max(), rel=1e-4)
    assert found[name].minimum == pytest.approx(apart.min(), rel=1e-4)
    # A fifth of the values is of the first step.
    steps = found[name].values.reshape(PLAN.num_steps, -1)
    assert (steps[0] == 0).all()
    for values, step in zip(steps[1:], apart, strict=True):
      gaps = np.abs(values[:, None] - step.ravel())
      assert gaps.min(1).max() < 1e-4
      assert values.std() == pytest.approx(step.std(), rel=0.1)
    np.testing.assert_array_equal(found[name].gram, plain[name].gram)


def test_recipes_take_what_they_need_to_see():
  get = recipes.get
  recipe = get('msfp_image+gptq+differences')
  assert recipe.differences and recipe.rounding == 'gptq'
  assert get('msfp_image+differences+gptq') == recipe
  # Signed and unsigned alike would be asked for differences, which are signed.
  assert set(recipe.needs) == {'rows', 'gram', 'differences'}
  # Nothing is seen of inputs, and so nothing of differences.
  assert set(get('int4_minmax+gptq+differences').needs) == {'gram'}
  assert not get(RECIPE).needs
  assert not get('msfp_image').differences
  # Branches are chosen for weights, which whole inputs are multiplied with.
  assert set(get('svdquant+differences').needs) == {
      'rows', 'channel_maxima', 'extremes'}
  # 'all' is all that can be.
  assert 'msfp_image+differences' in methods.expand('all+differences')
  assert 'msfp+differences' not in methods.expand('all+differences')
  assert len(methods.expand('all+other')) == len(recipes.RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['msfp_image+gptq', 'svdquant'])
def test_with_inputs_in_full_precision_the_suffix_is_nothing(name):
  make = functools.partial(
      calibrate, MODEL, PARAMS, act_bits=32, batches=[X], plan=PLAN,
      roles={'in': 'first', 'out': 'last'})
  found, expected = make(recipe=f'{name}+differences'), make(recipe=name)
  assert dataclasses.replace(found, recipe=name).to_json() == (
      expected.to_json())


@pytest.mark.parametrize('name, words', [
    ('msfp+differences', 'scales of its inputs are from calibration'),
    ('dual_scale+gptq+differences', "'dual_scale.gptq.differences'.*'msfp_ima"),
    ('nvfp4+differences+differences', r"with '\+differences'"),
    ('nvfp4+gptq+nearest', 'must be one of'),
    ('other+differences', 'must be one of'),
])
def test_what_cannot_be_is_refused(name, words):
  with pytest.raises(ValueError, match=words):
    recipes.get(name)


def test_differences_follow_no_activation_function():
  """Whose extremes happen to be like SiLU's."""
  rows = np.random.default_rng(0).uniform(-0.2, 0.5, (40, 4))
  seen = fit_lib.Seen(minimum=-0.2, maximum=0.5, rows=np.float32(rows))
  kind = lambda seen: calibrate_lib.fit_layer(
      recipes.get('msfp_image+differences'), 'in', seen,
      np.asarray(PARAMS['first']['kernel']), 4, 4).kind
  assert kind(seen) == spec_lib.AAL  # of inputs
  assert kind(dataclasses.replace(seen, differences=True)) == spec_lib.NAL


def test_a_search_and_what_stands_around_are_not_both_had(monkeypatch):
  recipe = recipes.get('msfp_image')
  monkeypatch.setitem(recipes.RECIPES, 'own', dataclasses.replace(
      recipe, around=recipes.get('hadamard').around))
  with pytest.raises(ValueError, match='its input is searched'):
    recipes.get('own+differences')


def test_what_was_seen_must_be_what_is_quantized():
  seen = observe.collect(
      MODEL, PARAMS, PLAN, [X], key=KEY, needs=('rows', 'differences'))
  roles = {'in': 'first', 'out': 'last'}
  options = {'activations': seen, 'roles': roles}
  spec = calibrate(MODEL, PARAMS, recipe='msfp_image+differences', **options)
  assert all(layer.kind == spec_lib.NAL for layer in spec.layers.values())
  with pytest.raises(ValueError, match='first.*are of differences between'):
    calibrate(MODEL, PARAMS, recipe='signed_fp_image', **options)
  options['activations'] = observe.collect(
      MODEL, PARAMS, PLAN, [X], key=KEY, needs=('rows',))
  with pytest.raises(ValueError, match='first.*looks at differences'):
    calibrate(MODEL, PARAMS, recipe='msfp_image+differences', **options)


def test_a_range_from_calibration_is_refused(monkeypatch):
  """In an unsigned format above one zero point, as own recipes may have it."""
  fit = fit_lib.Dynamic(lambda bits: Block(
      FPFormat.parse('UE2M2'), 'image', zero_point=-0.25))
  monkeypatch.setitem(recipes.RECIPES, 'own', recipes.Recipe(
      fit_lib.Dynamic(block_formats.int_group), fit, fit))
  roles = {'in': 'first', 'out': 'last'}
  calibrate(MODEL, PARAMS, recipe='own', roles=roles)
  with pytest.raises(ValueError, match='layer first: .*cuts off'):
    calibrate(MODEL, PARAMS, recipe='own+differences', roles=roles)


def test_one_prediction_alone_is_refused():
  with pytest.raises(ValueError, match=r'take eps_fn_of\(\) and memory\(\)'):
    simulated().eps_fn(X, X[:, 0, 0, 0], 0)
  spec = calibrate(tiny.NET, tiny.params(tiny.NET), recipe=RECIPE,
                   roles=tiny.NET_ROLES)
  with pytest.raises(ValueError, match='take msfp.pack'):
    msfp.QuantizedModel(tiny.NET, spec)
  student, nothing = student_lib.untrained(MODEL, PARAMS, spec)
  with pytest.raises(ValueError, match='predict_next'):
    student.predict(nothing, X, jnp.float32(0))
  assert dataclasses.replace(simulated(), differences=False).memory(X) is None


def test_several_banks_are_refused():
  """A sum over steps is of one set of weights."""
  with pytest.raises(ValueError, match='one set of weights; set num_banks=1'):
    students.Setup(tiny.NET, recipe=RECIPE)
  model = simulated()
  twice = jax.tree.map(lambda part: jnp.concatenate([part] * 2), model.layers[
      'first'].weight)
  with pytest.raises(ValueError, match=r"\['first'\] have several sets"):
    dataclasses.replace(model, layers=model.layers | {
        'first': model.layers['first'].replace(weight=twice)})


def test_plans_of_several_steps_take_the_first_twice_as_well():
  """A memory that counts; where a step leads and what it leaves is one."""
  plan = diffusion.plms_plan(tiny.SCHEDULE, 6)
  eps_fn = lambda x, t, index: jnp.tanh(x) * (1 + t[0] / 1000)
  counting = lambda x, t, index, count: (eps_fn(x, t, index), count + 1)
  visit = lambda x, eps, step: (x, step['index'])
  expected, seen = diffusion.trajectory(eps_fn, plan, X, None, visit)
  found, ours = diffusion.trajectory(
      counting, plan, X, None, visit, jnp.zeros((), jnp.int32))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6),
               ours, seen)
  counts = diffusion.trajectory(
      lambda x, t, index, count: (0 * x + count, count + 1), plan, X, None,
      lambda x, eps, step: eps.max(), jnp.zeros(()))[1]
  np.testing.assert_array_equal(counts, range(1, plan.num_steps + 1))


def test_the_first_step_counts_twice():
  plain = dataclasses.replace(simulated(), differences=False)
  shapes = {name: (1, 3, 3, size) for name, size in (('first', 4), ('last', 6))}
  assert bits.per_activation(simulated(), shapes) == pytest.approx(
      bits.per_activation(plain, shapes) * 6 / 5)


def test_sqnr_is_by_the_step_before():
  """At five of five steps, full precision's input before each is known."""
  model, layer = simulated(), 'first'
  errors = layer_error.LayerErrors(MODEL, PARAMS, PLAN, X, key=KEY)
  kernel = np.float64(PARAMS[layer]['kernel'])
  weight = np.float64(model.layers[layer].weight.dequantize()[0])
  bias = np.float64(PARAMS[layer]['bias'])
  total = np.zeros(4)
  before = None
  for x, t in zip(errors._seen, PLAN.timesteps, strict=True):
    h = np.float64(x) + t / 1000
    known = nearest(h) if before is None else before
    rounded = known + nearest(h - known)
    y = h @ kernel + bias
    total += [np.sum(part**2) for part in (
        y, rounded @ weight + bias - y, h @ (weight - kernel),
        (rounded - h) @ kernel)]
    before = h
  found = errors.sqnr(model)
  for i, part in enumerate(layer_error.PARTS, 1):
    assert found[part][layer] == pytest.approx(
        10 * np.log10(total[0] / total[i]), abs=0.01)


@pytest.mark.slow
def test_what_parts_cost_is_what_models_with_these_alone_show():
  """All of it, weights alone by a model of these; inputs beside exact ones."""
  model = simulated()
  found = sensitivity.Sensitivity(MODEL, PARAMS, PLAN, X, key=KEY).of(model)
  images = lambda model: np.uint8(np.clip(np.round(
      (np.asarray(model.sample(X, key=KEY), np.float64) + 1) * 127.5), 0, 255))
  full = packed_lib.full_precision(MODEL, PARAMS, PLAN)

  def cost(layers, differences):
    apart = np.float64(images(dataclasses.replace(
        model, layers=layers, differences=differences))) - images(full)
    mean = np.mean(apart**2, axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / mean)))

  assert found['quantized'] == pytest.approx(
      cost(model.layers, True), abs=0.02)
  weights = {name: layer.replace(input=full.layers[name].input)
             for name, layer in model.layers.items()}
  assert found['groups']['weights']['alone'] == pytest.approx(
      cost(weights, False), abs=0.02)
  first = model.layers | {'last': full.layers['last']}
  assert found['layers']['first']['alone'] == pytest.approx(
      float(np.mean(_psnr_of(first, model, full, images))), abs=0.02)


def _psnr_of(layers, model, full, images):
  ours = dataclasses.replace(model, layers=layers, params=PARAMS)
  apart = np.float64(images(ours)) - images(full)
  return 10 * np.log10(255**2 / np.mean(apart**2, axis=(1, 2, 3)))


ONE = {'num_banks': 1, 'learn_act_ranges': False, 'learn_weight_scales': False,
       'learn_biases': False, 'recipe': RECIPE}


def test_products_in_training_are_of_whole_sums():
  """In bfloat16 too, whose numbers x^ is none of."""
  rng = np.random.default_rng(0)
  layer = nn.Dense(5, name=None)
  x = jnp.asarray(rng.normal(size=(3, 7)), jnp.bfloat16)
  params = layer.init(KEY, jnp.float32(x))['params']
  weights = block_formats.int_group(4)
  made = QLayer(Latent(params['kernel'], weights),
                Block(int_format(4), 'token'), params['bias'] + 0.3)
  memory = {'input': jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)}
  # The module's own name is empty: it is the model.
  out, memory = differences.apply(
      layer, params, {'': made}, memory, x, dtype='float32')
  kernel = np.float64(fit_lib.restored(weights, params['kernel'], -2))
  np.testing.assert_allclose(
      out, np.float64(memory['input']) @ kernel + np.float64(made.bias),
      rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_student_follows_the_recursion(dtype):
  """From x^ = x on, where a trajectory begins."""
  spec = spec_lib.QuantSpec('by hand', {
      name: spec_lib.LayerSpec(
          '', '', block_formats.int_group(4), Block(int_format(4), 'image'))
      for name in ('first', 'last')}, differences=True)
  student, nothing = student_lib.untrained(MODEL, PARAMS, spec)
  student = dataclasses.replace(student, dtype=dtype)
  predict = jax.jit(functools.partial(student.predict_next, nothing))
  expected, memory = ByHand(simulated()), student.memory(X)
  for i, t in enumerate(PLAN.timesteps):
    x = X * (1 - 0.1 * i)
    if i == 0:
      # What is left of the first differences is nothing.
      expected.known = [h for h, _ in expected.whole(np.float64(x), 0)]
    eps, _, memory = predict(
        x, jnp.float32(t), step=i, memory=memory, fresh=jnp.bool_(i == 0))
    room = 1e-5 if dtype == 'float32' else 0.1
    np.testing.assert_allclose(eps, expected(np.float64(x), i), atol=room)
    if i == 0:
      np.testing.assert_allclose(memory['first']['input'], x + t / 1000,
                                 atol=1e-5 if dtype == 'float32' else 0.02)


def test_other_students_keep_their_checkpoints():
  """What orbax finds in a state that knows no differences: as it was."""
  fields = lambda recipe: {field.name for field in dataclasses.fields(
      jax.eval_shape(students.Setup(
          tiny.NET, **ONE | {'recipe': recipe}).start))}
  assert fields('msfp') == {'step', 'trainable', 'opt_state', 'position'}
  assert fields(RECIPE) == fields('msfp') | {'memory'}


class Places(nn.Module):
  """A model one layer of which sees the same for all samples."""

  @nn.compact
  def __call__(self, x, t):
    places = nn.Dense(x.shape[-1], name='places')(jnp.ones((1, 8, 8, 3)))
    return nn.Conv(x.shape[-1], (1, 1), name='out')(
        x + places + t[:, None, None, None] / 1000)


def test_inputs_without_a_row_a_sample_are_not_cut_in_parts():
  params = Places().init(KEY, tiny.noise(0), tiny.t_of(0))['params']
  spec = calibrate(Places(), params, recipe=RECIPE,
                   roles={'places': 'places', 'out': 'out'})
  settings = students.settings_of(num_banks=1, accumulate=2)
  start = lambda settings: finetune.init_state(
      finetune.make_student(Places(), params, spec, 1000, settings),
      finetune.optimizer(settings), tiny.PLAN, tiny.IMAGE, KEY, settings)
  with pytest.raises(ValueError, match=r"layers \['places'\] have no row"):
    start(settings)
  state = start(dataclasses.replace(settings, accumulate=1))
  layout = devices.layout()
  lie = finetune.shardings(layout, state)
  assert lie.memory['places']['input'] == layout.whole
  assert lie.memory['out']['input'] == layout.batch


def test_a_student_sees_what_the_deployed_model_sees():
  """Along one trajectory: each step's prediction, and what is remembered."""
  setup = students.Setup(tiny.NET, **ONE)
  state = setup.start()
  deployed = packed_lib.deploy(setup.student, state.trainable, tiny.PLAN)
  noise, memory = tiny.noise(5), deployed.memory(tiny.noise(5))
  predict = jax.jit(deployed.eps_fn_of())
  _, memory = predict(noise, tiny.t_of(750), 0, memory)
  ours = jax.jit(setup.student.predict_next)
  inputs = lambda memory: {name: {'input': layer['input']}
                           for name, layer in memory.items()}
  for i, t in enumerate(tiny.PLAN.timesteps):
    x = noise * (1 - 0.1 * i)
    student, _, kept = ours(state.trainable, x, jnp.float32(t), step=i,
                            memory=inputs(memory))
    eps, memory = predict(x, tiny.t_of(t), i, memory)
    np.testing.assert_allclose(student, eps, rtol=1e-4, atol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4),
                 kept, inputs(memory))


def test_updates_follow_the_trajectory_and_carry_the_memory():
  """Each loss by predictions made one after the other, x^ = x at the first."""
  setup = students.Setup(tiny.NET, **ONE, learning_rate=0.0)
  state = setup.start()
  predict = jax.jit(setup.student.predict_next)
  memory, trainable = jax.tree.map(jnp.copy, (state.memory, state.trainable))
  for n in range(6):  # four steps, and two of the next trajectory
    i = n % 4
    x = state.position.x
    if i == 0:
      x = jax.random.normal(jax.random.fold_in(jax.random.fold_in(
          jax.random.key(4), n // 4), 0), x.shape)
    t = jnp.float32(tiny.PLAN.timesteps[i])
    eps, _, memory = predict(trainable, x, t, step=i, memory=memory,
                             fresh=jnp.bool_(i == 0))
    target = setup.student.teach(x, t)
    state, seen = setup.update(state)
    assert float(seen['mse']) == pytest.approx(
        float(np.mean((eps - target)**2)), rel=1e-4)
    # At the first x^ is x: nothing is lost but by weights.
    jax.tree.map(functools.partial(
        np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state.memory, memory)
  assert np.abs(memory['body']['input']).max() > 0.1


def test_no_gradient_passes_the_memory():
  setup = students.Setup(tiny.NET, **ONE)
  state = setup.start()
  x, t = tiny.noise(5), jnp.float32(500)

  def loss(trainable, memory):
    return jnp.sum(setup.student.predict_next(
        trainable, x, t, step=1, memory=memory)[0]**2)

  memory = jax.tree.map(lambda part: part + 0.5, state.memory)
  gradient, passed = jax.jit(jax.grad(loss, (0, 1)))(state.trainable, memory)
  assert not any(np.any(part) for part in jax.tree.leaves(passed))
  assert any(np.any(part) for part in jax.tree.leaves(gradient['banks']))


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    {'accumulate': 2}, {'how_remat': 'blocks'}, {'how_remat': 'products'}],
                         ids=str)
def test_updates_in_less_memory_remember_the_same(options):
  settings = {key: value for key, value in ONE.items() if key != 'recipe'}
  setup = students.Setup(tiny.UNET, recipe=RECIPE, **settings)
  step = finetune.make_step(
      setup.student, tiny.PLAN, np.array(students.GAMMA),
      finetune.optimizer(students.settings_of(**settings)), jax.random.key(4),
      **options)
  plain, ours = setup.start(), setup.start()
  for _ in range(2):
    plain, _ = setup.update(plain)
    ours, _ = step(ours)
  jax.tree.map(functools.partial(
      np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
               (ours.memory, ours.trainable), (plain.memory, plain.trainable))
