"""LoRAs in models of diffusers, by PEFT, and in ours (`make parity`)."""

import dataclasses

import families
import flux_oracle
import foreign
import jax
import lora_files
import numpy as np
import pytest
import unet_oracle

import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.convert import key_check
from msfp_jax.convert import lora_config
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig
from msfp_jax.models.unet import UNet
from msfp_jax.packed import model as packed_lib

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning',
    'ignore::UserWarning')]

STRENGTH = 0.7


def assert_equals(path, model, params, inputs, expected):
  """Merged, and beside the weights: values that bfloat16 holds are exact."""
  loras = [(msfp.load_lora(path, model), STRENGTH)]
  plan = diffusion.SamplerPlan(
      np.array([0.5]), np.ones(1), np.full(1, 0.5), np.zeros(1))
  x, t, *conditions = [value for value in inputs if value is not None]
  with jax.default_matmul_precision('highest'):
    merged = jax.jit(model.apply)(
        {'params': msfp.merge_loras(params, loras)}, x, t, *conditions)
    full = packed_lib.full_precision(model, params, plan)
    predict = jax.jit(lambda arrays: full.with_arrays(arrays).eps_fn(
        x, t, 0, *conditions))
    without, beside = predict(full.arrays), predict(
        full.with_loras(loras).arrays)
  assert unet_oracle.rel_l2(np.asarray(merged), expected) < 5e-6
  assert unet_oracle.rel_l2(np.asarray(beside), expected) < 5e-6
  assert unet_oracle.rel_l2(np.asarray(without), expected) > 1e-2


@pytest.mark.parametrize('naming', ['diffusers', 'old', 'kohya'])
def test_unet(tmp_path, naming):
  """Attention, feed-forward layers, convolutions."""
  from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
  import diffusers_oracle
  import torch
  config = families.CONFIGS['sd1']
  state = families.state_of(config)
  lora = lora_files.rounded(lora_files.draw(
      {name: value.shape
       for name, value in foreign.diffusers(state, config).items()},
      rank=4, only='attn|proj|ff|conv1|conv2|shortcut|samplers'))
  path = lora_files.write(tmp_path / 'a.safetensors', {
      'diffusers': lambda: lora_files.peft(lora, 'unet.'),
      'old': lambda: lora_files.old_diffusers({
          name: halves for name, halves in lora.items() if 'attn' in name}),
      'kohya': lambda: lora_files.kohya(lora, alpha=2)}[naming](), **(
          {'lora_adapter_metadata': {
              'unet.r': 4, 'unet.lora_alpha': 12,
              'unet.target_modules': sorted(lora),
              'unet.alpha_pattern': {'attn1.to_q': 2.0}}}
          if naming == 'diffusers' else {}))
  theirs = diffusers_oracle.unet(config, state)
  found, alphas, metadata = Loader.lora_state_dict(
      str(tmp_path), weight_name=path.name, unet_config=theirs.config,
      return_alphas=True, return_lora_metadata=True)
  Loader.load_lora_into_unet(
      found, alphas, theirs, adapter_name='a', metadata=metadata)
  theirs.set_adapters('a', STRENGTH)
  x, t, _, context = inputs = families.inputs_of(config)
  with torch.no_grad():
    expected = theirs(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t),
        encoder_hidden_states=torch.from_numpy(context)).sample
  assert_equals(path, UNet(config), unet_oracle.from_state_dict(config, state),
                inputs, expected.permute(0, 2, 3, 1).numpy())


def flux_files(lora, config, naming):
  """(tensors, metadata) of a LoRA in names that diffusers reads."""
  if naming == 'diffusers':
    return lora_files.peft(lora), {'lora_adapter_metadata': {
        'transformer.r': 4, 'transformer.lora_alpha': 8,
        'transformer.target_modules': sorted(lora),
        'transformer.use_rslora': True,
        'transformer.alpha_pattern': {'attn.to_q': 2.0}}}
  if naming == 'kohya':
    # Its fused linear1 diffusers splits by the published width alone, and it
    # drops embedders and the last layer, as it gives them no part's name.
    return lora_files.kohya({
        name: halves for name, halves in lora_files.bfl(lora, config).items()
        if '_blocks.' in name and 'linear1' not in name}, alpha=2), {}
  if naming == 'attention':
    return lora_files.kohya({
        name: halves for name, halves in lora.items()
        if '.attn.' in name or 'embed' in name}, 'lora_transformer_', 3), {}
  if naming == 'PEFT':
    return lora_files.peft(lora, 'transformer.'), {}
  return lora_files.xlabs(lora_files.bfl(lora, config)), {}


@pytest.mark.parametrize('naming', [
    'diffusers', 'PEFT', 'kohya', 'attention', 'xlabs'])
def test_flux(tmp_path, naming):
  from diffusers.loaders import FluxLoraLoaderMixin as Loader
  import diffusers_oracle
  import torch
  config = flux_oracle.TINY
  state = flux_oracle.state_of(config)
  lora = lora_files.rounded(lora_files.draw(flux_oracle.shapes(config), rank=4))
  tensors, metadata = flux_files(lora, config, naming)
  path = lora_files.write(tmp_path / 'a.safetensors', tensors, **metadata)
  theirs = diffusers_oracle.flux(config)
  theirs.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()})
  found, alphas, metadata = Loader.lora_state_dict(
      str(tmp_path), weight_name=path.name, return_alphas=True,
      return_lora_metadata=True)
  theirs.load_lora_adapter(found, network_alphas=alphas, adapter_name='a',
                           metadata=metadata, prefix='transformer')
  theirs.set_adapters('a', STRENGTH)
  inputs = flux_oracle.inputs_of(config)
  assert_equals(path, Flux(config), flux_oracle.params_of(state), inputs,
                diffusers_oracle.run_flux(theirs, *inputs))


def test_kohyas_names_at_the_published_width(tmp_path):
  """What diffusers makes of them is what we read: fused linear1 too."""
  from diffusers.loaders import lora_conversion_utils
  import torch
  config = FluxConfig(
      in_channels=1, out_channels=1, num_layers=1, num_single_layers=1,
      text_dim=2, pooled_dim=2, guidance_embeds=True)
  lora = lora_files.draw(flux_oracle.shapes(config), rank=2)
  # Where it drops alpha, as of the last layer's, it reads none.
  tensors = lora_files.kohya(lora_files.bfl(lora, config))
  theirs = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers({
      name: torch.from_numpy(value) for name, value in tensors.items()})
  read = [msfp.load_lora(lora_files.write(tmp_path / f'{name}.safetensors', {
      key: np.asarray(value) for key, value in content.items()}), Flux(config))
          for name, content in (('kohya', tensors), ('diffusers', theirs))]
  ours, expected = (one.layers for one in read)
  assert ours.keys() == expected.keys()
  assert ours.keys() == flux_oracle.layers(config).keys()
  for name, one in expected.items():
    np.testing.assert_array_equal(ours[name].down, one.down)
    np.testing.assert_array_equal(ours[name].up, one.up)
    assert ours[name].scale == one.scale


def test_every_key_of_peft_has_its_place():
  """And what it writes by default is taken."""
  import peft
  fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
  assert fields <= lora_config.KEYS
  by_default = peft.LoraConfig(r=4).to_dict()
  assert not key_check.odd(by_default, lora_config.ONLY, lora_config.KEYS)
  assert not key_check.wrong(by_default, lora_config.USED)
