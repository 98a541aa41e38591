"""Experiment: model, data, sampler and settings, loaded from a config."""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import functools
import hashlib
import json
from typing import Any

from absl import logging
from clu import parameter_overview
import jax
import ml_collections

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.base import arguments
from msfp_jax.base import devices
from msfp_jax.diffusion import conditions
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.models import denoiser
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import recipes
from msfp_jax.quant import roles
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.observe import collect
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.run import cluster
from msfp_jax.run import first_stage
from msfp_jax.run import prompts as prompts_lib
from msfp_jax.run import teacher
from msfp_jax.tune import finetune as finetune_lib

# Uses of the seed; each folds its own number into the key.
# From 10 on, as pre-training folds 0 to 3 into the same seed's key.
CALIBRATION, BANKS, TRAJECTORIES, SAMPLES, LAYERS, DRIFT = range(10, 16)


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
  """How much of the teacher's sampling calibration looks at.

  Attributes:
    batch_size: trajectories at once.
    num_batches: of them.
    samples_per_layer: activations kept of each layer.

  Raises:
    ValueError: one of them is no such number.
  """

  batch_size: int
  num_batches: int
  samples_per_layer: int

  def __post_init__(self):
    arguments.check_fields('config.calibrate', self, dict.fromkeys(
        ('batch_size', 'num_batches', 'samples_per_layer'), arguments.COUNT))


@dataclasses.dataclass(frozen=True)
class QuantSettings:
  """Which quantizers calibration looks for.

  Attributes:
    recipe: a name that `recipes.get` knows.
    weight_bits: of the layers that are no exception.
    act_bits: likewise, of their inputs.
    exceptions: a key of `roles.EXCEPTIONS`.
    drift_images: by which the drift of predictions is measured, see
      `packed.drift`; 0: it is not, and stays.

  Raises:
    ValueError: an unknown name, or bits that there are not.
  """

  recipe: str
  weight_bits: int
  act_bits: int
  exceptions: str
  drift_images: int = 0

  def __post_init__(self):
    arguments.check_fields('config.quant', self, {
        'drift_images': arguments.COUNT_OR_NONE})
    for field, check in (('recipe', recipes.get),
                         ('weight_bits', recipes.check_bits),
                         ('act_bits', recipes.check_bits),
                         ('exceptions', roles.exceptions_of)):
      try:
        check(getattr(self, field))
      except ValueError as error:
        raise ValueError(f'config.quant.{field}: {error}') from error


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of an experiment.

  Attributes:
    model: the full-precision teacher.
    params: its parameters.
    schedule: of the forward process.
    plan: the sampler.
    image_shape: (H, W, C) of what comes out in the end.
    images: the data; None where the config names none.
    seed: of all randomness.
    calibration: what is seen of the teacher.
    quant: how it is quantized.
    finetune: how that is tuned.
    draw_condition: what a conditional model is asked for.
    decode: latents `[B, h, w, c]` -> images, float32 in [-1, 1]; None where
      the model works on pixels.
    ahead: what recipes need to see that will be asked for later, so that all
      share one run of the sampler.
    sampler: {field: value} that the plan was made of, `name` among them.
    prompts: what images are made from; None of models that take no text.
    layout: of the devices that all of it runs on.
    memory: bytes that a step may need of each; 0: what is free there.
  """

  model: denoiser.Denoiser
  params: Any
  schedule: diffusion.Schedule
  plan: diffusion.SamplerPlan
  image_shape: tuple[int, int, int]
  images: data.Images | None
  seed: int
  calibration: CalibrationSettings
  quant: QuantSettings
  finetune: finetune_lib.FinetuneSettings
  draw_condition: conditions.Draw = conditions.none
  decode: Callable[[jax.Array], jax.Array] | None = None
  ahead: frozenset[str] = frozenset()
  sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  prompts: prompts_lib.Prompts | None = None
  layout: devices.Layout = dataclasses.field(default_factory=devices.layout)
  memory: float = 0.0

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what the model denoises."""
    return self.model.sample_shape

  @property
  def taken(self) -> dict[str, Any]:
    """The sampler as it is, part of which the checkpoint may have said, and
    which prompts the file holds."""
    plan = json.dumps(self.plan.to_dict()).encode()
    found = {'sampler': dict(self.sampler),
             'plan': hashlib.sha256(plan).hexdigest()[:16]}
    return found if self.prompts is None else found | {
        'prompts': self.prompts.digest}

  def key(self, use: int) -> jax.Array:
    """The key of one use of the seed, such as SAMPLES."""
    return jax.random.fold_in(jax.random.key(self.seed), use)

  def variant(self, quant: QuantSettings,
              finetune: finetune_lib.FinetuneSettings) -> 'Experiment':
    """The same model and data, quantized otherwise.

    Keeps what calibration saw, which depends on neither.
    """
    other = dataclasses.replace(self, quant=quant, finetune=finetune)
    # The dict itself, so that what one variant gathers later serves the others.
    # Past the fields, which are frozen: it is where cached_property looks.
    other.__dict__['_seen'] = self._seen
    return other

  def looking_ahead(self, names: Iterable[str]) -> 'Experiment':
    """The same, which gathers at once what all these recipes need to see."""
    needs = [recipes.get(name).needs for name in names]
    return dataclasses.replace(self, ahead=self.ahead.union(*needs))

  @functools.cached_property
  def _seen(self) -> dict[frozenset[str], dict[str, Seen]]:
    """{needs: what was gathered for them}, filled by `seen`."""
    return {}

  @property
  def activations(self) -> dict[str, Seen]:
    """Values and extremes of every layer's input."""
    return self.seen(frozenset())

  def seen(self, needs: Collection[str]) -> dict[str, Seen]:
    """{layer: observations of its input} along the teacher's trajectories.

    Values and extremes are always kept, so that most recipes share one run.
    """
    differences = fit_lib.DIFFERENCES in needs
    needs = frozenset({
        fit_lib.EXTREMES, fit_lib.VALUES, *self.ahead, *needs})
    if not differences:
      needs -= {fit_lib.DIFFERENCES}
    # More than was asked for does no harm, and saves a run of the sampler; but
    # differences are no inputs.
    for kept, seen in self._seen.items():
      if needs <= kept and differences == (fit_lib.DIFFERENCES in kept):
        return seen
    self._seen[needs] = self._collect(needs)
    return self._seen[needs]

  def _collect(self, needs: Collection[str]) -> dict[str, Seen]:
    """Runs the sampler from noise of the seed, as much as `calibration` says.
    """
    cfg = self.calibration
    layout = self.layout.for_batch(
        'config.calibrate.batch_size', cfg.batch_size)
    key = self.key(CALIBRATION)
    batches = []
    for i in range(cfg.num_batches):
      # Batch i folds in i, and the choice of samples below num_batches: none of
      # them shares a key with another.
      noise_key = jax.random.fold_in(key, i)
      noise = jax.random.normal(
          noise_key, (cfg.batch_size, *self.sample_shape))
      batches.append((noise, *self.draw_condition(
          jax.random.fold_in(noise_key, 0), cfg.batch_size)))
    logging.info('calibrating on %d trajectories of %d steps',
                 cfg.batch_size * cfg.num_batches, self.plan.num_steps)
    return collect(
        self.model, self.params, self.plan, batches,
        samples_per_layer=cfg.samples_per_layer, needs=needs,
        key=jax.random.fold_in(key, cfg.num_batches), layout=layout)

  def calibrate(self, recipe: str | None = None, bits: int | None = None,
                act_bits: int | None = None) -> spec_lib.QuantSpec:
    """The spec that `quant` asks for, with what is given here in its place."""
    cfg = self.quant
    recipe = recipe or cfg.recipe
    act_bits = act_bits or cfg.act_bits
    needs = recipes.get(recipe).gathered(act_bits)
    spec = calibrate(
        self.model, self.params, recipe=recipe, bits=bits or cfg.weight_bits,
        act_bits=act_bits, exceptions=cfg.exceptions,
        activations=self.seen(needs) if needs else None)
    if jax.process_count() == 1:
      return spec
    # Machines of a run may differ in a last bit: all work with the first one's.
    return spec_lib.QuantSpec.from_json(devices.agreed_text(spec.to_json()))


def check(config: ml_collections.ConfigDict) -> None:
  """Looks at the fields of a config alone, before anything is loaded or made.

  Raises:
    ValueError: a field that no experiment can work with.
  """
  cluster.layout(config)
  CalibrationSettings(**config.calibrate)
  quant = QuantSettings(**config.quant)
  tuning = finetune_lib.FinetuneSettings(**config.finetune)
  if quant.weight_bits == FULL_BITS and tuning.num_updates:
    raise ValueError(
        f'config.quant.weight_bits={FULL_BITS}: no weight is quantized, and '
        'there is nothing to fine-tune: set config.finetune.num_updates=0')
  if (recipes.get(quant.recipe).differences and quant.act_bits < FULL_BITS
      and tuning.num_updates and tuning.num_banks > 1):
    raise ValueError(
        f'config.quant.recipe={quant.recipe!r} and '
        f'config.finetune.num_banks={tuning.num_banks}: {spec_lib.ONE_BANK}')
  arguments.check_fields('config', config, {
      'seed': arguments.SEED, 'ema': arguments.or_none(arguments.FLAG)})
  if config.pretrained_config and not config.pretrained:
    raise ValueError(
        f'config.pretrained_config={config.pretrained_config!r} without '
        'config.pretrained, which it would describe')
  first_stage.check(config)
  teacher.check_loras(config.loras)
  prompts_lib.check(config)


def load(config: ml_collections.ConfigDict, workdir: str) -> Experiment:
  """Loads the teacher and the data, and unpacks the config.

  A config without `pretrained` finds the teacher that `pretrain.run` left in
  `workdir`/pretrain. What the config does not say of the schedule and of the
  sampler is as the checkpoint has it (`diffusion.origin`).

  Raises:
    errors.WorkdirError: it is not there.
    ValueError: the data does not fit the model, or the checkpoint's sampler is
      none of ours and the config names none.
  """
  # First, for it takes no time: a sampler that there is not ends the run here.
  origin = teacher.load_origin(
      config.pretrained, workdir, described_by=config.pretrained_config,
      ema=config.ema)
  chosen = origin_lib.choose(origin, config.schedule, config.sampler)
  model, params = teacher.load(
      config.pretrained, workdir, described_by=config.pretrained_config,
      ema=config.ema, fields=config.model, seed=config.seed,
      loras=config.loras)
  logging.info('the model has %s parameters',
               f'{parameter_overview.count_parameters(params):,}')
  # Before data and encoders are loaded.
  prompts_lib.check_model(model, config)
  # A workdir may be evaluated against a file of statistics, without the data.
  images = None
  if config.data.name:
    images = data.load(config.data.name, config.data.path)
  decode, image_shape = None, model.sample_shape
  if config.first_stage:
    decode, image_shape = teacher.load_decoder(
        config.first_stage, model.sample_shape,
        described_by=config.first_stage_config,
        scale=config.first_stage_scale, shift=config.first_stage_shift,
        fields=config.autoencoder, seed=config.seed,
        rows=config.first_stage_rows)
  if config.image_size:
    model, image_shape = first_stage.resized(
        model, image_shape, tuple(config.image_size))
    if chosen.sampler_fields.get('shift_by_tokens'):
      # The checkpoint's are those of its own size.
      chosen = origin_lib.choose(
          origin, config.schedule,
          first_stage.sampler_for(model, config.sampler))
  # Against what is decoded: latents are not compared with images.
  if images is not None:
    teacher.check_images(images, image_shape)
  prompts = None
  if config.prompts:
    model, prompts = prompts_lib.load(model, config)
    draw_condition = prompts.draw
  else:
    model, draw_condition = teacher.conditional(
        model, config.guidance.scale, config.guidance.null_class)
  return Experiment(
      model, params, chosen.schedule, chosen.plan, image_shape, images,
      config.seed,
      CalibrationSettings(**config.calibrate), QuantSettings(**config.quant),
      finetune_lib.FinetuneSettings(**config.finetune), draw_condition, decode,
      sampler=chosen.sampler_fields, prompts=prompts,
      layout=cluster.layout(config), memory=cluster.memory(config))
