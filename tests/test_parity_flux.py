"""FLUX's transformer against diffusers' (`make parity`)."""

import flux_oracle
import pytest
import unet_oracle

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore:__array__ impl:DeprecationWarning')]


def theirs(config, device='cpu'):
  import diffusers
  import torch
  fields = {k: v for k, v in flux_oracle.config_json(config).items()
            if not k.startswith('_')}
  with torch.device(device):
    return diffusers.FluxTransformer2DModel(**fields).eval()


def diffusers_output(config, state, inputs):
  """Packs latents and makes positions as FluxPipeline does, in its words."""
  import torch
  x, t, text, pooled, *guidance = map(torch.from_numpy, inputs)
  model = theirs(config)
  model.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()})
  b, h, w, c = x.shape
  packed = x.permute(0, 3, 1, 2).view(b, c, h // 2, 2, w // 2, 2).permute(
      0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
  ids = torch.zeros(h // 2, w // 2, 3)
  ids[..., 1] += torch.arange(h // 2)[:, None]
  ids[..., 2] += torch.arange(w // 2)[None, :]
  with torch.no_grad():
    out = model(
        hidden_states=packed, timestep=t, encoder_hidden_states=text,
        pooled_projections=pooled, guidance=guidance[0] if guidance else None,
        txt_ids=torch.zeros(text.shape[1], 3), img_ids=ids.reshape(-1, 3)
    ).sample
  return out.view(b, h // 2, w // 2, -1, 2, 2).permute(
      0, 1, 4, 2, 5, 3).reshape(b, h, w, -1).numpy()


@pytest.mark.parametrize('height, width', [(8, 12), (6, 4)])
@pytest.mark.parametrize('name', flux_oracle.CONFIGS)
def test_the_transformer_equals_diffusers(name, height, width):
  config = flux_oracle.CONFIGS[name]
  state = flux_oracle.state_of(config, seed=5)
  inputs = flux_oracle.inputs_of(config, 6, height, width)
  expected = diffusers_output(config, state, inputs)
  actual = flux_oracle.output(config, state, inputs)
  print(unet_oracle.rel_l2(actual, expected))
  assert actual.shape == inputs[0].shape[:3] + (config.out_channels,)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6
  # Every input is felt.
  for i in range(len(inputs)):
    other = [a * 1.5 + 0.1 if j == i else a for j, a in enumerate(inputs)]
    moved = flux_oracle.output(config, state, other)
    assert unet_oracle.rel_l2(moved, actual) > 1e-3, i
