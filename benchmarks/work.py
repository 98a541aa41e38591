"""Steps of experiments by shapes alone, to be compiled for any devices."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import packed_bytes
from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import devices
from msfp_jax.diffusion import conditions
from msfp_jax.diffusion import origin
from msfp_jax.models import registry
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import streamed
from msfp_jax.quant import roles
from msfp_jax.run import teacher
from msfp_jax.tune import finetune
from msfp_jax.tune import losses

_PROMPTS = 1000  # whose embeddings every device holds in fine-tuning


class Shapes(devices.Layout):
  """A layout on which nothing is put: what would lie there, and where."""

  def abstract(self, tree: Any, shardings: Any = None) -> Any:
    """Shapes of arrays with their shardings, of one device as well."""
    if shardings is None:
      shardings = self.of_weights(tree)
    if isinstance(shardings, jax.sharding.NamedSharding):
      shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        np.shape(leaf), leaf.dtype, sharding=sharding), tree, shardings)

  def put(self, tree: Any, shardings: Any = None) -> Any:
    """The same."""
    return self.abstract(tree, shardings)


@dataclasses.dataclass(frozen=True)
class Work:
  """What is compiled.

  Attributes:
    config: makes that of the experiment.
    step: (task, layout) -> a jitted function and what it takes, abstract.
    images: of each part into which the chips split a batch.
    model: chips that share the large weights, if there are so many.
    finetune: fields that differ from the config's.
  """

  config: Callable[[], ml_collections.ConfigDict]
  step: Callable[['Task', Shapes], tuple[Any, Any]]
  images: int
  model: int = 1
  finetune: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
  """A work's model, sampler and quantizers, for one number of chips.

  Attributes:
    model: the full-precision one.
    schedule: of the forward process.
    plan: the sampler.
    job: of its layers, by shapes.
    recipe: how they are quantized.
    draw: its conditions; of abstract tables.
    batch: images in all.
    settings: of fine-tuning.
  """

  model: Any
  schedule: Any
  plan: diffusion.SamplerPlan
  job: Any
  recipe: str
  draw: conditions.Draw
  batch: int
  settings: finetune.FinetuneSettings

  @functools.cached_property
  def spec(self) -> Any:
    """What calibration finds, as far as programs depend on it."""
    return packed_bytes.spec_of(
        self.recipe, self.job, roles.exceptions_of('ends-8'))


def tuning(task: Task, layout: Shapes) -> tuple[Any, Any]:
  """An update: teacher, student, gradients, optimizer."""
  params = traverse_util.unflatten_dict(task.job.places)
  student = finetune.make_student(
      task.model, layout.abstract(params), task.spec,
      task.schedule.num_train_steps, task.settings,
      continuous=isinstance(task.schedule, diffusion.FlowSchedule))
  tx = finetune.optimizer(task.settings)
  key = jax.random.key(0)
  step = finetune.make_step(
      student, task.plan,
      losses.denoising_factors(
          task.schedule, task.plan, task.settings.gamma), tx, key, task.draw,
      layout, accumulate=task.settings.accumulate,
      how_remat=task.settings.remat)
  state = jax.eval_shape(lambda: finetune.init_state(
      student, tx, task.plan, task.model.sample_shape, key, task.settings))
  return step.update, (
      layout.abstract(state, finetune.shardings(layout, state)), *step.shapes)


def sampling(task: Task, layout: Shapes) -> tuple[Any, Any]:
  """A prediction of the packed model."""
  held = streamed.contents_of(task.job, task.spec)
  layers = {name: kernels.prepare(layer, 'xla')
            for name, layer in held.layers.items()}
  params = traverse_util.unflatten_dict({
      tuple(path.split('/')): place
      for path, place in {**held.vectors, **held.rest}.items()})
  # A kernel is a program of one chip, and all numbers of them are compared.
  model = packed_lib.PackedModel(
      task.model, params, layers, {}, task.plan, 'xla')
  given = jax.eval_shape(lambda: (
      jnp.zeros((task.batch, *task.model.sample_shape)),
      jnp.zeros((task.batch,))))
  condition = jax.eval_shape(
      lambda draw: draw(jax.random.key(0), task.batch),
      conditions.as_argument(task.draw))
  predict = jax.jit(lambda arrays, x, t, *condition: model.with_arrays(
      arrays).eps_fn(x, t, 0, *condition))
  return predict, (layout.abstract((params, layers)), *layout.abstract(
      (*given, *condition), layout.batch))


def task_of(work: Work, parts: int) -> Task:
  """A work for a batch that is split into so many parts."""
  config = work.config()
  fields = config.model.to_dict()
  model = registry.from_dict({fields.pop('family', 'unet'): fields})
  chosen = origin.choose(origin.Origin(), config.schedule, config.sampler)
  if model.conditions and all(
      one.classes is None for one in model.conditions):
    draw = conditions.rows([
        jax.ShapeDtypeStruct(
            (_PROMPTS, *(config.text_length if size == 1 else size
                         for size in one.shape)), jnp.float32)
        for one in model.conditions])
  else:
    model, draw = teacher.conditional(
        model, config.guidance.scale, config.guidance.null_class)
  batch = work.images * parts
  settings = finetune.FinetuneSettings(**{
      **config.finetune, **work.finetune, 'batch_size': batch})
  return Task(model, chosen.schedule, chosen.plan,
              packed_bytes.job_of(model, chosen.plan), config.quant.recipe,
              draw, batch, settings)
