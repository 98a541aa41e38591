"""Keys of a UNet's yaml (CompVis, ermongroup): used, harmless, or refused."""

from collections.abc import Mapping
from typing import Any

from msfp_jax.convert import key_check
from msfp_jax.convert import key_values as kinds

# Sections that a `target` makes have these keys, and `model` a learning rate;
# what stands beside `model` (data, lightning) is of training.
_MODEL_PART = frozenset({'target', 'params', 'base_learning_rate'})
_PART = frozenset({'target', 'params'})
_BETA = kinds.as_text(kinds.PROBABILITY)
_STEPS = kinds.as_text(kinds.ABOVE_ZERO)  # whole ones, as `training` reads them

# CompVis, `unet_config`: keys that become fields of `UNetConfig`, and what they
# may be.
_UNET_USED: dict[str, kinds.Kind] = {
    'image_size': kinds.or_none(kinds.SIDES), 'in_channels': kinds.WHOLE,
    'out_channels': kinds.WHOLE, 'model_channels': kinds.WHOLE,
    'num_res_blocks': kinds.by_level(kinds.WHOLE),
    'attention_resolutions': kinds.listed(kinds.WHOLE, least=0),
    'channel_mult': kinds.listed(kinds.WHOLE),
    'num_classes': kinds.or_none(kinds.WHOLE),
    'num_heads': kinds.WHOLE_OR_NONE, 'num_head_channels': kinds.WHOLE_OR_NONE,
    'use_scale_shift_norm': kinds.FLAG, 'resblock_updown': kinds.FLAG,
    'context_dim': kinds.or_none(kinds.by_level(kinds.WHOLE)),
    'transformer_depth': kinds.by_level(kinds.WHOLE),
    'dropout': kinds.PROBABILITY,
    'use_spatial_transformer': kinds.or_none(kinds.FLAG)}
# Keys with the values that our UNet computes; xformers is another way to
# compute the same attention.
_UNET_ONLY: dict[str, tuple[Any, ...]] = {
    'use_new_attention_order': (False,), 'conv_resample': (True,),
    'dims': (2,), 'n_embed': (None,), 'num_heads_upsample': (-1, None),
    'disable_self_attentions': (None,), 'num_attention_blocks': (None,),
    'disable_middle_self_attn': (False,), 'adm_in_channels': (None,),
    'spatial_transformer_attn_type': ('softmax', 'softmax-xformers')}
# Precision and memory; `use_linear_in_transformer`, which the tensors show;
# and `legacy`, by which only widths that are no multiple of a head's differ.
_UNET_HARMLESS = frozenset({
    'use_checkpoint', 'use_fp16', 'use_bf16', 'use_linear_in_transformer',
    'legacy'})
UNET_KEYS = _UNET_USED.keys() | _UNET_ONLY.keys() | _UNET_HARMLESS
_UNET_CLASSES = ('UNetModel',)

# And of the parameters around it. Those that take a condition by channels are
# refused where they would be sampled.
_MODEL_USED: dict[str, kinds.Kind] = {
    'unet_config': kinds.SECTION,
    # Of an unconditional DDPM none is made.
    'first_stage_config': kinds.or_none(kinds.SECTION),
    'image_size': kinds.or_none(kinds.SIDES), 'use_ema': kinds.FLAG,
    'timesteps': _STEPS, 'beta_schedule': kinds.TEXT, 'linear_start': _BETA,
    'linear_end': _BETA, 'cosine_s': kinds.as_text(kinds.number(0)),
    'parameterization': kinds.TEXT, 'scale_factor': kinds.ABOVE_ZERO,
    'scale_by_std': kinds.FLAG}
_MODEL_ONLY: dict[str, tuple[Any, ...]] = {
    'given_betas': (None,), 'v_posterior': (0,),
    'conditioning_key': (None, 'concat', 'crossattn', 'hybrid', 'adm',
                         'hybrid-adm', 'crossattn-adm')}
# What makes the condition, which is given here as it comes out of it, how it is
# called, and training.
_MODEL_HARMLESS = frozenset({
    'cond_stage_config', 'cond_stage_key', 'cond_stage_trainable',
    'cond_stage_forward', 'concat_mode', 'concat_keys', 'masked_image_key',
    'depth_stage_config', 'low_scale_config', 'low_scale_key',
    'noise_level_key', 'force_null_conditioning', 'personalization_config',
    'first_stage_key', 'channels', 'num_timesteps_cond', 'clip_denoised',
    'use_positional_encodings', 'loss_type', 'log_every_t', 'monitor',
    'scheduler_config', 'base_learning_rate', 'ckpt_path', 'ignore_keys',
    'load_only_unet', 'load_ema', 'make_it_fit', 'ucg_training', 'reset_ema',
    'reset_num_ema_updates', 'original_elbo_weight', 'l_simple_weight',
    'learn_logvar', 'logvar_init', 'finetune_keys', 'keep_finetune_dims',
    'c_concat_log_start', 'c_concat_log_end', 'embedding_reg_weight',
    'unfreeze_model', 'model_lr', 'reg_weight'})
MODEL_KEYS = _MODEL_USED.keys() | _MODEL_ONLY.keys() | _MODEL_HARMLESS
_MODEL_CLASSES = (
    'LatentDiffusion', 'DDPM', 'LatentInpaintDiffusion',
    'LatentFinetuneDiffusion', 'LatentUpscaleDiffusion',
    'LatentUpscaleFinetuneDiffusion', 'LatentDepth2ImageDiffusion')

# ermongroup, `model` and `diffusion`.
_DDIM_USED: dict[str, kinds.Kind] = {
    'in_channels': kinds.WHOLE, 'out_ch': kinds.WHOLE, 'ch': kinds.WHOLE,
    'ch_mult': kinds.listed(kinds.WHOLE), 'num_res_blocks': kinds.WHOLE,
    'attn_resolutions': kinds.listed(kinds.WHOLE, least=0),
    'dropout': kinds.PROBABILITY}
# The bayesian type has a variance beside the model, which sampling leaves out.
_DDIM_ONLY: dict[str, tuple[Any, ...]] = {
    'type': ('simple', 'bayesian'), 'resamp_with_conv': (True,),
    'var_type': ('fixedlarge', 'fixedsmall'), 'conditional': (False,)}
DDIM_KEYS = _DDIM_USED.keys() | _DDIM_ONLY.keys() | {'ema', 'ema_rate'}
_DIFFUSION: dict[str, kinds.Kind] = {
    'beta_schedule': kinds.TEXT, 'beta_start': _BETA, 'beta_end': _BETA,
    'num_diffusion_timesteps': _STEPS}
DDIM_DIFFUSION_KEYS = _DIFFUSION.keys()
# Of `data`, what decides the numbers that the model takes: [-1, 1].
DDIM_DATA: dict[str, tuple[Any, ...]] = {
    'rescaled': (True,), 'logit_transform': (False,)}


def check_compvis(model: Mapping[str, Any]) -> None:
  """Looks at the yaml of a latent diffusion model.

  Args:
    model: its section `model`, with `params.unet_config.params`.

  Raises:
    ValueError: by key, for what our UNet does not have.
  """
  outer = model['params']
  unet = outer['unet_config']
  params = unet['params']
  key_check.refuse('this UNet', [
      *key_check.wrong(params, _UNET_USED, 'unet_config.'),
      *key_check.wrong(outer, _MODEL_USED, 'model.params.')])
  texts = key_check.odd(params, _UNET_ONLY, UNET_KEYS, place='unet_config.')
  texts += key_check.odd(outer, _MODEL_ONLY, MODEL_KEYS, place='model.params.')
  texts += key_check.odd(model, {}, _MODEL_PART, place='model.')
  texts += key_check.odd(unet, {}, _PART, place='model.params.unet_config.')
  for where, part, classes in (('model', model, _MODEL_CLASSES),
                               ('unet_config', unet, _UNET_CLASSES)):
    target = part.get('target')
    if target is not None and str(target).rpartition('.')[2] not in classes:
      texts.append(f'{where}.target={target!r} ({key_check.one_of(classes)})')
  # Its transformers and their context: openaimodel refuses one alone.
  spatial = params.get('use_spatial_transformer')
  if spatial is not None and bool(spatial) != (
      params.get('context_dim') is not None):
    texts.append(f'unet_config.use_spatial_transformer={spatial!r} with '
                 f'context_dim={params.get("context_dim")!r}')
  key_check.refuse('this UNet', texts)


def check_ermongroup(given: Mapping[str, Any]) -> None:
  """Looks at an original yaml of ermongroup/ddim, all of it.

  Raises:
    ValueError: by key, for what our UNet and its schedules do not have.
  """
  data = given['data']
  diffusion = given.get('diffusion') or {}
  key_check.refuse('this UNet', [
      *key_check.wrong(given['model'], _DDIM_USED, 'model.'),
      *key_check.wrong(diffusion, _DIFFUSION, 'diffusion.'),
      *key_check.odd(given['model'], _DDIM_ONLY, DDIM_KEYS, place='model.'),
      *key_check.odd(diffusion, {}, DDIM_DIFFUSION_KEYS, place='diffusion.'),
      *key_check.odd(data, DDIM_DATA, data, place='data.')])
