"""Steps of experiments by shapes alone, to be compiled for any devices."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections

from benchmarks import packed_bytes
from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import devices
from msfp_jax.diffusion import conditions
from msfp_jax.diffusion import origin
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import streamed
from msfp_jax.quant import roles
from msfp_jax.run import teacher
from msfp_jax.tune import finetune
from msfp_jax.tune import losses

_PROMPTS = 1  # in tables of embeddings, which every device would hold


class Shapes(devices.Layout):
  """A layout on which nothing is put: what would lie there, and where."""

  def abstract(self, tree: Any, shardings: Any = None) -> Any:
    """Of one device as well: programs are compiled for it."""
    return self.shapes(tree, shardings)

  def put(self, tree: Any, shardings: Any = None) -> Any:
    """Nothing is."""
    return self.shapes(tree, shardings)


@dataclasses.dataclass(frozen=True)
class PlannedStep:
  """A step that is compiled.

  Attributes:
    config: makes that of the experiment.
    make: (task, layout) -> a jitted function and what it takes, abstract.
    images: per part of the batch; parts are devices / sharing.
    sharing: devices that share the large weights, if there are so many.
    fields: (name, value) of the model, in place of the config's.
    finetune: fields that differ from the config's.
    blocks: {field of the model: how many blocks of a kind it says}, of models
      that need not be compiled whole.
  """

  config: Callable[[], ml_collections.ConfigDict]
  make: Callable[['Task', Shapes], tuple[Any, Any]]
  images: int
  sharing: int = 1
  fields: tuple[tuple[str, Any], ...] = ()
  finetune: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractExperiment:
  """An experiment by shapes, whatever the number of devices.

  Attributes:
    config: of the experiment.
    model: the full-precision one.
    draw: its conditions, from tables that are shapes.
    schedule: of the forward process.
    plan: the sampler.
    job: of its layers, by shapes.
  """

  config: ml_collections.ConfigDict
  model: Any
  draw: conditions.Draw
  schedule: Any
  plan: diffusion.SamplerPlan
  job: Any

  @functools.cached_property
  def spec(self) -> Any:
    """What calibration finds, as far as programs depend on it."""
    return packed_bytes.spec_of(
        self.config.quant.recipe, self.job, roles.exceptions_of('ends-8'))

  @functools.cached_property
  def packed(self) -> packed_lib.PackedModel:
    """The packed model: views of zeros, and shapes."""
    held = streamed.contents_of(self.job, self.spec)
    layers = {name: kernels.prepare(layer, 'xla')
              for name, layer in held.layers.items()}
    params = traverse_util.unflatten_dict({
        tuple(path.split('/')): place
        for path, place in {**held.vectors, **held.rest}.items()})
    # A kernel is a program of one device, and all numbers of them are compared.
    return packed_lib.PackedModel(
        self.model, params, layers, {}, self.plan, 'xla',
        self.spec.differences)


@dataclasses.dataclass(frozen=True)
class Task:
  """A step of one number of devices.

  Attributes:
    experiment: all that does not depend on it.
    batch: images in all.
    settings: of fine-tuning.
  """

  experiment: AbstractExperiment
  batch: int
  settings: finetune.FinetuneSettings


def tuning(task: Task, layout: Shapes) -> tuple[Any, Any]:
  """An update: teacher, student, gradients, optimizer."""
  experiment, settings = task.experiment, task.settings
  params = traverse_util.unflatten_dict(experiment.job.places)
  student = finetune.make_student(
      experiment.model, layout.abstract(params), experiment.spec,
      experiment.schedule.num_train_steps, settings,
      continuous=isinstance(experiment.schedule, diffusion.FlowSchedule))
  tx = finetune.optimizer(settings)
  key = jax.random.key(0)
  step = finetune.make_step(
      student, experiment.plan, losses.denoising_factors(
          experiment.schedule, experiment.plan, settings.gamma), tx, key,
      experiment.draw, layout, accumulate=settings.accumulate,
      how_remat=settings.remat, direction=settings.direction,
      trajectories=finetune.trajectories_of(experiment.plan, settings))
  state = jax.eval_shape(lambda: finetune.init_state(
      student, tx, experiment.plan, experiment.model.sample_shape, key,
      settings))
  return step.update, (
      layout.abstract(state, finetune.shardings(layout, state)), *step.shapes)


def sampling(task: Task, layout: Shapes) -> tuple[Any, Any]:
  """A prediction of the packed model.

  Raises:
    ValueError: it quantizes differences, of which the plan knows nothing.
  """
  model, batch = task.experiment.packed, task.batch
  if model.differences:
    raise ValueError('a plan is of single predictions, and this recipe '
                     'quantizes what changes between them: take it without '
                     "'+differences'")
  given = jax.eval_shape(lambda: (
      jnp.zeros((batch, *model.model.sample_shape)), jnp.zeros((batch,))))
  condition = jax.eval_shape(
      lambda draw: draw(jax.random.key(0), batch),
      conditions.as_argument(task.experiment.draw))
  predict = jax.jit(lambda arrays, x, t, *condition: model.with_arrays(
      arrays).eps_fn(x, t, 0, *condition))
  return predict, (layout.abstract(model.arrays), *layout.abstract(
      (*given, *condition), layout.batch))


def task_of(step: PlannedStep, parts: int) -> Task:
  """A step of a batch that is split into so many parts."""
  experiment = _experiment(step.config, step.fields)
  batch = step.images * parts
  return Task(experiment, batch, finetune.FinetuneSettings(**{
      **experiment.config.finetune, **step.finetune, 'batch_size': batch}))


@functools.cache
def _experiment(get_config: Callable[[], ml_collections.ConfigDict],
                fields: tuple[tuple[str, Any], ...]) -> AbstractExperiment:
  config = get_config()
  config.model.update(dict(fields))
  model = teacher.new_model(config.model)
  chosen = origin.choose(origin.Origin(), config.schedule, config.sampler)
  if model.conditions and all(
      one.classes is None for one in model.conditions):
    # Texts: an axis of any length is that of their tokens.
    draw = conditions.rows([
        jax.ShapeDtypeStruct(
            (_PROMPTS, *(config.text_length if size == 1 else size
                         for size in one.shape)), jnp.float32)
        for one in model.conditions])
  else:
    model, draw = teacher.conditional(
        model, config.guidance.scale, config.guidance.null_class)
  return AbstractExperiment(
      config, model, draw, chosen.schedule, chosen.plan,
      packed_bytes.job_of(model, chosen.plan))
