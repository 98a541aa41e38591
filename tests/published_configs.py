"""Configurations of published UNets, with every key that their authors use."""

import copy

# google/ddpm-cifar10-32, unet/config.json.
CIFAR10 = {
    '_class_name': 'UNet2DModel', '_diffusers_version': '0.0.4',
    'act_fn': 'silu', 'block_out_channels': [128, 256, 256, 256],
    'center_input_sample': False,
    'down_block_types': ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D',
                         'DownBlock2D'],
    'downsample_padding': 0, 'flip_sin_to_cos': False, 'freq_shift': 1,
    'in_channels': 3, 'layers_per_block': 2, 'mid_block_scale_factor': 1,
    'norm_eps': 1e-06, 'norm_num_groups': 32, 'out_channels': 3,
    'sample_size': 32, 'time_embedding_type': 'positional',
    'up_block_types': ['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
    'attention_head_dim': None}
# Stable Diffusion 1, unet/config.json.
STABLE_DIFFUSION_1 = {
    '_class_name': 'UNet2DConditionModel', '_diffusers_version': '0.6.0',
    'act_fn': 'silu', 'attention_head_dim': 8,
    'block_out_channels': [320, 640, 1280, 1280], 'center_input_sample': False,
    'cross_attention_dim': 768,
    'down_block_types': [*['CrossAttnDownBlock2D'] * 3, 'DownBlock2D'],
    'downsample_padding': 1, 'flip_sin_to_cos': True, 'freq_shift': 0,
    'in_channels': 4, 'layers_per_block': 2, 'mid_block_scale_factor': 1,
    'norm_eps': 1e-05, 'norm_num_groups': 32, 'out_channels': 4,
    'sample_size': 64,
    'up_block_types': ['UpBlock2D', *['CrossAttnUpBlock2D'] * 3]}
# Stable Diffusion 2 as a later version saves it, and its average's keys.
STABLE_DIFFUSION_2 = STABLE_DIFFUSION_1 | {
    '_diffusers_version': '0.24.0.dev0', '_name_or_path': 'OWNER/NAME',
    'attention_head_dim': [5, 10, 20, 20], 'cross_attention_dim': 1024,
    'addition_embed_type': None, 'addition_embed_type_num_heads': 64,
    'addition_time_embed_dim': None, 'attention_type': 'default',
    'class_embed_type': None, 'class_embeddings_concat': False,
    'conv_in_kernel': 3, 'conv_out_kernel': 3, 'cross_attention_norm': None,
    'dropout': 0.0, 'dual_cross_attention': False, 'encoder_hid_dim': None,
    'encoder_hid_dim_type': None, 'mid_block_only_cross_attention': None,
    'mid_block_type': 'UNetMidBlock2DCrossAttn', 'num_attention_heads': None,
    'num_class_embeds': None, 'only_cross_attention': False,
    'projection_class_embeddings_input_dim': None,
    'resnet_out_scale_factor': 1.0, 'resnet_skip_time_act': False,
    'resnet_time_scale_shift': 'default',
    'reverse_transformer_layers_per_block': None, 'time_cond_proj_dim': None,
    'time_embedding_act_fn': None, 'time_embedding_dim': None,
    'time_embedding_type': 'positional', 'timestep_post_act': None,
    'transformer_layers_per_block': 1, 'upcast_attention': True,
    'use_linear_projection': True, 'decay': 0.9999, 'inv_gamma': 1.0,
    'min_decay': 0.0, 'optimization_step': 15000, 'power': 0.6667,
    'update_after_step': 0, 'use_ema_warmup': False}

_TRAINING = {'log_every_t': 200, 'num_timesteps_cond': 1, 'timesteps': 1000,
             'first_stage_key': 'image', 'monitor': 'val/loss_simple_ema',
             'scheduler_config': {'target': 'ldm.lr_scheduler.LambdaLinear'}}
_LATENT = _TRAINING | {'linear_start': 0.0015, 'linear_end': 0.0195}
_STABLE = _TRAINING | {
    'linear_start': 0.00085, 'linear_end': 0.012, 'cond_stage_key': 'txt',
    'image_size': 64, 'channels': 4, 'cond_stage_trainable': False,
    'conditioning_key': 'crossattn', 'scale_factor': 0.18215, 'use_ema': False}


def _compvis(outer, condition, unet):
  return {'model': {
      'base_learning_rate': 1e-4,
      'target': 'ldm.models.diffusion.ddpm.LatentDiffusion',
      'params': outer | {
          'first_stage_config': {
              'target': 'ldm.models.autoencoder.VQModelInterface'},
          'cond_stage_config': condition,
          'unet_config': {
              'target': 'ldm.modules.diffusionmodules.openaimodel.UNetModel',
              'params': unet}}}}


# CompVis' own yaml files.
BEDROOMS = _compvis(
    _LATENT | {'image_size': 64, 'channels': 3}, '__is_unconditional__', {
        'image_size': 64, 'in_channels': 3, 'out_channels': 3,
        'model_channels': 224, 'attention_resolutions': [8, 4, 2],
        'num_res_blocks': 2, 'channel_mult': [1, 2, 3, 4],
        'num_head_channels': 32})
CHURCHES = _compvis(
    _LATENT | {
        'linear_end': 0.0155, 'loss_type': 'l1', 'cond_stage_key': 'image',
        'image_size': 32, 'channels': 4, 'cond_stage_trainable': False,
        'concat_mode': False, 'scale_by_std': True}, '__is_unconditional__', {
            'image_size': 32, 'in_channels': 4, 'out_channels': 4,
            'model_channels': 192, 'attention_resolutions': [1, 2, 4, 8],
            'num_res_blocks': 2, 'channel_mult': [1, 2, 2, 4, 4],
            'num_heads': 8, 'use_scale_shift_norm': True,
            'resblock_updown': True})
IMAGENET = _compvis(
    _LATENT | {
        'cond_stage_key': 'class_label', 'image_size': 64, 'channels': 3,
        'cond_stage_trainable': True, 'conditioning_key': 'crossattn'},
    {'target': 'ldm.modules.encoders.modules.ClassEmbedder',
     'params': {'n_classes': 1001, 'embed_dim': 512, 'key': 'class_label'}}, {
         'image_size': 64, 'in_channels': 3, 'out_channels': 3,
         'model_channels': 192, 'attention_resolutions': [8, 4, 2],
         'num_res_blocks': 2, 'channel_mult': [1, 2, 3, 5], 'num_heads': 1,
         'use_spatial_transformer': True, 'transformer_depth': 1,
         'context_dim': 512})
_STABLE_UNET = {
    'image_size': 32, 'in_channels': 4, 'out_channels': 4,
    'model_channels': 320, 'attention_resolutions': [4, 2, 1],
    'num_res_blocks': 2, 'channel_mult': [1, 2, 4, 4],
    'use_spatial_transformer': True, 'transformer_depth': 1,
    'use_checkpoint': True, 'legacy': False}
STABLE_1 = _compvis(
    _STABLE, {'target': 'ldm.modules.encoders.modules.FrozenCLIPEmbedder'},
    _STABLE_UNET | {'num_heads': 8, 'context_dim': 768})
STABLE_2 = _compvis(
    _STABLE | {'parameterization': 'v'},
    {'target': 'ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder',
     'params': {'freeze': True, 'layer': 'penultimate'}},
    _STABLE_UNET | {'num_head_channels': 64, 'context_dim': 1024,
                    'use_fp16': True, 'use_linear_in_transformer': True})

# ermongroup/ddim, configs/cifar10.yml and celeba.yml.
_ERMONGROUP = {
    'diffusion': {'beta_schedule': 'linear', 'beta_start': 0.0001,
                  'beta_end': 0.02, 'num_diffusion_timesteps': 1000},
    'training': {'batch_size': 128, 'n_epochs': 10000, 'n_iters': 5000000},
    'sampling': {'batch_size': 64, 'last_only': True},
    'optim': {'optimizer': 'Adam', 'lr': 0.0002}}
ERMONGROUP_CIFAR10 = _ERMONGROUP | {
    'data': {'dataset': 'CIFAR10', 'image_size': 32, 'channels': 3,
             'logit_transform': False, 'uniform_dequantization': False,
             'gaussian_dequantization': False, 'random_flip': True,
             'rescaled': True, 'num_workers': 4},
    'model': {'type': 'simple', 'in_channels': 3, 'out_ch': 3, 'ch': 128,
              'ch_mult': [1, 2, 2, 2], 'num_res_blocks': 2,
              'attn_resolutions': [16], 'dropout': 0.1,
              'var_type': 'fixedlarge', 'ema_rate': 0.9999, 'ema': True,
              'resamp_with_conv': True}}
ERMONGROUP_CELEBA = _ERMONGROUP | {
    'data': ERMONGROUP_CIFAR10['data'] | {'image_size': 64},
    'model': ERMONGROUP_CIFAR10['model'] | {'ch_mult': [1, 2, 2, 2, 4]}}

# What CompVis' UNetModel takes for what a yaml leaves out.
_UNET_MODEL = {
    'dropout': 0, 'channel_mult': [1, 2, 4, 8], 'conv_resample': True,
    'dims': 2, 'num_classes': None, 'use_checkpoint': False, 'use_fp16': False,
    'num_heads': -1, 'num_head_channels': -1, 'num_heads_upsample': -1,
    'use_scale_shift_norm': False, 'resblock_updown': False,
    'use_new_attention_order': False, 'use_spatial_transformer': False,
    'transformer_depth': 1, 'context_dim': None, 'n_embed': None,
    'legacy': True, 'disable_self_attentions': None,
    'num_attention_blocks': None, 'disable_middle_self_attn': False,
    'use_linear_in_transformer': False}


def complete(name):
  """A copy of one of them, with which nothing is asked of the tensors."""
  found = copy.deepcopy(globals()[name])
  params = found.get('model', {}).get('params')
  if params:
    unet = params['unet_config']
    unet['params'] = copy.deepcopy(_UNET_MODEL) | unet['params']
  return found
