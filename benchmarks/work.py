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

_PROMPTS = 1  # in tables of embeddings, which every device would hold


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
    """What `abstract` returns."""
    return self.abstract(tree, shardings)


@dataclasses.dataclass(frozen=True)
class Work:
  """What is compiled.

  Attributes:
    config: makes that of the experiment.
    step: (task, layout) -> a jitted function and what it takes, abstract.
    images: that each part of a batch has, of those that devices split it into.
    model: chips that share the large weights, if there are so many.
    finetune: fields that differ from the config's.
    blocks: {field of the model: how many blocks of a kind it says}, of models
      that need not be compiled whole.
  """

  config: Callable[[], ml_collections.ConfigDict]
  step: Callable[['Task', Shapes], tuple[Any, Any]]
  images: int
  model: int = 1
  finetune: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """What of an experiment does not depend on how many devices there are.

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
        self.model, params, layers, {}, self.plan, 'xla')


@dataclasses.dataclass(frozen=True)
class Task:
  """A work for one number of devices.

  Attributes:
    known: all else of the experiment.
    batch: images in all.
    settings: of fine-tuning.
  """

  known: Known
  batch: int
  settings: finetune.FinetuneSettings


def tuning(task: Task, layout: Shapes) -> tuple[Any, Any]:
  """An update: teacher, student, gradients, optimizer."""
  known, settings = task.known, task.settings
  params = traverse_util.unflatten_dict(known.job.places)
  student = finetune.make_student(
      known.model, layout.abstract(params), known.spec,
      known.schedule.num_train_steps, settings,
      continuous=isinstance(known.schedule, diffusion.FlowSchedule))
  tx = finetune.optimizer(settings)
  key = jax.random.key(0)
  step = finetune.make_step(
      student, known.plan, losses.denoising_factors(
          known.schedule, known.plan, settings.gamma), tx, key, known.draw,
      layout, accumulate=settings.accumulate, how_remat=settings.remat)
  state = jax.eval_shape(lambda: finetune.init_state(
      student, tx, known.plan, known.model.sample_shape, key, settings))
  return step.update, (
      layout.abstract(state, finetune.shardings(layout, state)), *step.shapes)


def sampling(task: Task, layout: Shapes) -> tuple[Any, Any]:
  """A prediction of the packed model."""
  model, batch = task.known.packed, task.batch
  given = jax.eval_shape(lambda: (
      jnp.zeros((batch, *task.known.model.sample_shape)), jnp.zeros((batch,))))
  condition = jax.eval_shape(
      lambda draw: draw(jax.random.key(0), batch),
      conditions.as_argument(task.known.draw))
  predict = jax.jit(lambda arrays, x, t, *condition: model.with_arrays(
      arrays).eps_fn(x, t, 0, *condition))
  return predict, (layout.abstract(model.arrays), *layout.abstract(
      (*given, *condition), layout.batch))


def with_model(work: Work, fields: Mapping[str, Any]) -> Work:
  """The work of a model with other fields, to be compiled whole."""
  return dataclasses.replace(
      work, config=_changed(work.config, tuple(fields.items())), blocks={})


@functools.cache
def _changed(get_config, fields):
  # Cached, so that what is known of the experiment is.
  def changed():
    config = get_config()
    config.model.update(dict(fields))
    return config

  return changed


def task_of(work: Work, parts: int) -> Task:
  """A work for a batch that is split into so many parts."""
  known = _known(work.config)
  batch = work.images * parts
  return Task(known, batch, finetune.FinetuneSettings(**{
      **known.config.finetune, **work.finetune, 'batch_size': batch}))


@functools.cache
def _known(get_config: Callable[[], ml_collections.ConfigDict]) -> Known:
  config = get_config()
  fields = config.model.to_dict()
  model = registry.from_dict({fields.pop('family', 'unet'): fields})
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
  return Known(config, model, draw, chosen.schedule, chosen.plan,
               packed_bytes.job_of(model, chosen.plan))
