"""How a student is fine-tuned: the fields of config.finetune, checked."""

import dataclasses

from msfp_jax.base import arguments
from msfp_jax.tune import losses
from msfp_jax.tune import parts
from msfp_jax.tune import remat
from msfp_jax.tune import student as student_lib
from msfp_jax.tune import trajectories as trajectories_lib

MOST_BANKS = 256  # of a layer, as many as a packed file can name
_RULES = {
    **dict.fromkeys(('num_updates', 'rank', 'window_steps'),
                    arguments.COUNT_OR_NONE),
    **dict.fromkeys(('batch_size', 'save_every', 'log_every', 'accumulate'),
                    arguments.COUNT),
    'num_banks': (lambda value: (
        arguments.COUNT[0](value) and value <= MOST_BANKS),
                  f'a whole number from 1 to {MOST_BANKS}'),
    'gamma': arguments.one_of(losses.GAMMAS),
    'driver': arguments.one_of(trajectories_lib.DRIVERS),
    'direction': arguments.RATE,
    'steer': arguments.SHARE,
    'base_weight': arguments.one_of(student_lib.BASES),
    **dict.fromkeys(('learning_rate', 'router_learning_rate',
                     'range_learning_rate', 'router_prior', 'weight_decay'),
                    arguments.RATE),
    'router_temperature': arguments.POSITIVE,
    **dict.fromkeys(('adam_b2', 'ema_decay'), arguments.SHARE),
    **dict.fromkeys(('learn_act_ranges', 'learn_weight_scales',
                     'learn_biases'), arguments.FLAG),
    'dtype': arguments.one_of(('float32', 'bfloat16')),
    'remat': arguments.one_of(remat.WAYS),
}


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
  """How a student is trained; configs/common.py has what is usual.

  Attributes:
    num_updates: of all trajectories together, one for each denoising step.
    batch_size: trajectories at once.
    num_banks: LoRAs of each layer; 1 is plain LoRA, without a router.
    rank: of each LoRA; 0: an offset of every weight in place of A B.
    gamma: the denoising factor that weights the loss, see
      `losses.denoising_factors`.
    direction: weight of the angle between the predictions in the loss, see
      `losses.dfa_loss`.
    driver: whose predictions move the trajectories that it is trained along,
      see `trajectories`.
    steer: how much the student's own are led back to the teacher's, likewise.
    window_steps: steps after which these are set to the teacher's, likewise.
    base_weight: what a LoRA is added to, see `student.Student`.
    learn_act_ranges: whether scales and zero points of inputs move.
    learn_weight_scales: the same of the weights that have banks.
    learn_biases: whether biases move.
    learning_rate: of the banks, at the first update.
    router_learning_rate: likewise.
    range_learning_rate: likewise, of ranges, scales and biases.
    router_temperature: of the router's softmax.
    router_prior: how strongly each span of timesteps is drawn to its own bank.
    adam_b2: of AdamW, as is `weight_decay`.
    weight_decay: a factor of the learning rate.
    ema_decay: of the moving average of what is trained, which is then what is
      kept; 0: what the last update leaves is.
    dtype: in which teacher and student compute, see `student.Student`.
    accumulate: parts of a batch whose gradients are computed one after the
      other and averaged; divides the batch.
    remat: which activations of the student are computed twice, see
      `tune.remat`.
    save_every: updates from one checkpoint to the next.
    log_every: updates whose metrics are fetched at once.

  Raises:
    ValueError: fields that no training can work with; all are listed.
      Parts that do not divide a batch.
  """

  num_updates: int
  batch_size: int
  num_banks: int
  rank: int
  gamma: str
  direction: float
  driver: str
  steer: float
  window_steps: int
  base_weight: str
  learn_act_ranges: bool
  learn_weight_scales: bool
  learn_biases: bool
  learning_rate: float
  router_learning_rate: float
  range_learning_rate: float
  router_temperature: float
  router_prior: float
  adam_b2: float
  weight_decay: float
  ema_decay: float
  dtype: str
  accumulate: int
  remat: str
  save_every: int
  log_every: int

  def __post_init__(self):
    arguments.check_fields('config.finetune', self, _RULES)
    parts.check('config.finetune', self.batch_size, self.accumulate)
    trajectories_lib.check(
        'config.finetune.', self.driver, self.steer, self.window_steps)
