"""Keys of a first stage's config.json or yaml: read, harmless, or refused."""

from collections.abc import Mapping
from typing import Any

from msfp_jax.convert import key_check
from msfp_jax.convert import key_values as kinds

# Keys of diffusers' config.json, with the values that our autoencoder computes.
_SUPPORTED = {
    '_class_name': ('AutoencoderKL', 'VQModel'),
    'act_fn': ('silu', 'swish'), 'norm_type': ('group',),
    'mid_block_add_attention': (True,), 'lookup_from_codebook': (False,),
    'latents_mean': (None,), 'latents_std': (None,),
    'down_block_types': ('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
    'up_block_types': ('UpDecoderBlock2D', 'AttnUpDecoderBlock2D')}
# Keys that are read, with what they may be, and those that change nothing of
# what is computed.
_READ: dict[str, kinds.Kind] = {
    'in_channels': kinds.WHOLE, 'out_channels': kinds.WHOLE,
    'block_out_channels': kinds.listed(kinds.WHOLE),
    'layers_per_block': kinds.WHOLE, 'latent_channels': kinds.WHOLE,
    'norm_num_groups': kinds.WHOLE,
    'scaling_factor': kinds.or_none(kinds.ABOVE_ZERO),
    'shift_factor': kinds.or_none(kinds.number()), 'use_quant_conv': kinds.FLAG,
    'use_post_quant_conv': kinds.FLAG, 'num_vq_embeddings': kinds.WHOLE,
    'vq_embed_dim': kinds.or_none(kinds.WHOLE)}
_HARMLESS = frozenset({
    '_diffusers_version', '_name_or_path', 'sample_size', 'force_upcast'})
KEYS = _SUPPORTED.keys() | _READ.keys() | _HARMLESS
_BY_LEVEL = ('down_block_types', 'up_block_types')
_LISTS = dict.fromkeys(_BY_LEVEL, kinds.listed(kinds.TEXT))

# The same of `ddconfig` in a CompVis yaml. `vanilla-xformers` is another way to
# compute the same attention; `downsample_time` is AudioLDM's.
_DDCONFIG = {
    'resamp_with_conv': (True,), 'use_linear_attn': (False,),
    'attn_type': ('vanilla', 'vanilla-xformers'), 'give_pre_end': (False,),
    'tanh_out': (False,), 'downsample_time': (False,)}
_DDCONFIG_READ: dict[str, kinds.Kind] = {
    'double_z': kinds.FLAG, 'z_channels': kinds.WHOLE,
    'resolution': kinds.by_level(kinds.WHOLE), 'in_channels': kinds.WHOLE,
    'out_ch': kinds.WHOLE, 'ch': kinds.WHOLE,
    'ch_mult': kinds.listed(kinds.WHOLE),
    'num_res_blocks': kinds.by_level(kinds.WHOLE),
    'attn_resolutions': kinds.listed(kinds.WHOLE, least=0)}
_DDCONFIG_HARMLESS = frozenset({'dropout'})
# And of the parameters around it; `subband` and `time_shuffle` are AudioLDM's.
# What is harmless belongs to training, or to indices into the codebook, which
# nothing here returns.
_AROUND = {'subband': (1,), 'time_shuffle': (1,)}
_AROUND_READ: dict[str, kinds.Kind] = {
    'ddconfig': kinds.SECTION, 'embed_dim': kinds.by_level(kinds.WHOLE),
    'n_embed': kinds.WHOLE}
_AROUND_HARMLESS = frozenset({
    'lossconfig', 'loss_config', 'ckpt_path', 'ignore_keys', 'image_key',
    'monitor', 'colorize_nlabels', 'batch_resize_range', 'scheduler_config',
    'lr_g_factor', 'base_learning_rate', 'remap', 'sane_index_shape',
    'use_ema', 'ema_decay', 'learn_logvar'})
DDCONFIG_KEYS = _DDCONFIG.keys() | _DDCONFIG_READ.keys() | _DDCONFIG_HARMLESS
AROUND_KEYS = _AROUND.keys() | _AROUND_READ.keys() | _AROUND_HARMLESS
# And of the section that these are the parameters of.
_SECTION = frozenset({'target', 'params', 'base_learning_rate'})
# Classes by the last part of `target`.
_KL_CLASSES = ('AutoencoderKL', 'AutoencoderKLInferenceWrapper',
               'AutoencoderKLModeOnly')
_VQ_CLASSES = ('VQModelInterface', 'VQModel')


def check_json(given: Mapping[str, Any]) -> None:
  """Looks at diffusers' config.json of an autoencoder.

  Raises:
    ValueError: by key, for what our autoencoder does not have.
  """
  # How keys go together can be told only of values that they may have.
  key_check.refuse('this autoencoder', key_check.wrong(given, _READ | _LISTS))
  odd = key_check.odd(given, _SUPPORTED, KEYS, _BY_LEVEL)
  if given.get('use_quant_conv', True) != given.get(
      'use_post_quant_conv', given.get('use_quant_conv', True)):
    odd.append('use_quant_conv and use_post_quant_conv that differ')
  # Ours has attention at the same levels on both ways.
  down, up = (['Attn' in str(name) for name in _listed(given.get(key, []))]
              for key in _BY_LEVEL)
  if down and up and down != up[::-1]:
    odd.append('attention at other levels up than down')
  key_check.refuse('this autoencoder', odd)


def check_yaml(section: Mapping[str, Any], inside: bool) -> None:
  """Looks at CompVis' yaml of an autoencoder.

  Args:
    section: `target`, its class, dotted, if the yaml has one, and `params`,
      the arguments of that class, `ddconfig` among them.
    inside: whether it stands in the yaml of a latent diffusion model.

  Raises:
    ValueError: by key, for what our autoencoder does not have.
  """
  target, params = section.get('target'), section['params']
  shape = params['ddconfig']
  wrong = key_check.wrong(params, _AROUND_READ)
  if kinds.SECTION.has(shape):
    wrong += key_check.wrong(shape, _DDCONFIG_READ, 'ddconfig.')
  key_check.refuse('this autoencoder', wrong)
  odd = key_check.odd(section, {}, _SECTION)
  odd += key_check.odd(shape, _DDCONFIG, DDCONFIG_KEYS, place='ddconfig.')
  odd += key_check.odd(params, _AROUND, AROUND_KEYS)
  is_vq = 'n_embed' in params
  # Mean and log variance: of KL, whose latents are drawn, and of it alone.
  if shape.get('double_z', not is_vq) != (not is_vq):
    odd.append(f'ddconfig.double_z={shape["double_z"]!r} '
               f'({"with" if is_vq else "without"} n_embed)')
  # Within a latent diffusion model a plain VQModel decodes latents without its
  # codebook; its own yaml, of training, calls the same autoencoder so.
  allowed = (*_KL_CLASSES, *_VQ_CLASSES[:1 if inside else None])
  if target is not None and str(target).rpartition('.')[2] not in allowed:
    odd.append(f'target={target!r} ({key_check.one_of(allowed)})')
  key_check.refuse('this autoencoder', odd)


def check_section(section: Any) -> None:
  """Raises ValueError if a whole model's `first_stage_config` is no section."""
  key_check.refuse('this autoencoder', key_check.wrong(
      {'first_stage_config': section}, {'first_stage_config': kinds.SECTION}))


def _listed(value):
  return value if isinstance(value, list) else [value]
