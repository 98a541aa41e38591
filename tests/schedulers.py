"""Published scheduler_config.json, as their authors wrote them."""

_LATENT = {'beta_start': 0.0015, 'beta_end': 0.0195,
           'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000}
_STABLE_DIFFUSION = _LATENT | {'beta_start': 0.00085, 'beta_end': 0.012}
_PIXELS = {'beta_start': 0.0001, 'beta_end': 0.02, 'beta_schedule': 'linear',
           'num_train_timesteps': 1000}

PUBLISHED = {
    'stable-diffusion-v1-4': {
        '_class_name': 'PNDMScheduler', '_diffusers_version': '0.7.0.dev0',
        'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1,
        'trained_betas': None, 'clip_sample': False} | _STABLE_DIFFUSION,
    'stable-diffusion-2-1': {
        '_class_name': 'DDIMScheduler', '_diffusers_version': '0.8.0',
        'clip_sample': False, 'prediction_type': 'v_prediction',
        'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1,
        'trained_betas': None} | _STABLE_DIFFUSION,
    'audioldm': {
        '_class_name': 'DDIMScheduler', '_diffusers_version': '0.15.0.dev0',
        'clip_sample': False, 'clip_sample_range': 1.0,
        'dynamic_thresholding_ratio': 0.995, 'prediction_type': 'epsilon',
        'rescale_betas_zero_snr': False, 'sample_max_value': 1.0,
        'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1,
        'thresholding': False, 'timestep_spacing': 'leading',
        'trained_betas': None} | _LATENT,
    'ldm-celebahq-256': {
        '_class_name': 'DDIMScheduler', '_diffusers_version': '0.1.1',
        'clip_sample': False, 'timestep_values': None,
        'trained_betas': None} | _LATENT,
    'ddpm-cifar10-32': {
        '_class_name': 'DDPMScheduler', '_diffusers_version': '0.1.1',
        'clip_sample': True, 'trained_betas': None,
        'variance_type': 'fixed_large'} | _PIXELS,
    'ddpm-butterflies-128': {
        '_class_name': 'DDPMScheduler', '_diffusers_version': '0.3.0.dev0',
        'clip_sample': True, 'predict_epsilon': True, 'trained_betas': None,
        'variance_type': 'fixed_small'} | _PIXELS | {
            'beta_schedule': 'squaredcos_cap_v2'},
    'ddim, squared cosine': {
        '_class_name': 'DDIMScheduler', 'clip_sample': True} | _PIXELS | {
            'beta_schedule': 'squaredcos_cap_v2'},
    'ddim, defaults': {'_class_name': 'DDIMScheduler'},
    'trailing, v': {
        '_class_name': 'DDIMScheduler', 'clip_sample': False,
        'prediction_type': 'v_prediction', 'set_alpha_to_one': True,
        'steps_offset': 1, 'timestep_spacing': 'trailing'} | _STABLE_DIFFUSION,
    'linspace': {
        '_class_name': 'DDIMScheduler', 'clip_sample': True,
        'clip_sample_range': 2.0, 'timestep_spacing': 'linspace'} | _LATENT,
    'offset 1, alpha one': {
        '_class_name': 'DDIMScheduler', 'clip_sample': False,
        'set_alpha_to_one': True, 'steps_offset': 1} | _STABLE_DIFFUSION,
    'offset 0, first alpha': {
        '_class_name': 'DDIMScheduler', 'set_alpha_to_one': False} | _PIXELS,
    'x_0, old': {
        '_class_name': 'DDPMScheduler', 'predict_epsilon': False,
        'clip_sample': True} | _PIXELS,
    'ddpm, trailing': {
        '_class_name': 'DDPMScheduler', 'clip_sample': True,
        'timestep_spacing': 'trailing', 'variance_type': 'fixed_large',
        } | _LATENT,
    'dpm-solver++': {
        '_class_name': 'DPMSolverMultistepScheduler',
        'algorithm_type': 'dpmsolver++', 'solver_order': 2} | _STABLE_DIFFUSION,
    'dpm-solver++, leading': {
        '_class_name': 'DPMSolverMultistepScheduler', 'steps_offset': 1,
        'timestep_spacing': 'leading'} | _STABLE_DIFFUSION,
    'dpm-solver++, trailing': {
        '_class_name': 'DPMSolverMultistepScheduler',
        'timestep_spacing': 'trailing'} | _STABLE_DIFFUSION,
    'plms, trailing': {
        '_class_name': 'PNDMScheduler', 'skip_prk_steps': True,
        'timestep_spacing': 'trailing'} | _STABLE_DIFFUSION,
    'all betas': {
        '_class_name': 'DDIMScheduler', 'num_train_timesteps': 50,
        'trained_betas': [0.001 + 0.0004 * i for i in range(50)]},
}
