"""Reading checkpoints: no tensor may be missing, none may be left over."""

from msfp_jax.convert.load import abstract_autoencoder
from msfp_jax.convert.load import load_first_stage
from msfp_jax.convert.load import load_origin
from msfp_jax.convert.load import load_plan
from msfp_jax.convert.load import load_pretrained
from msfp_jax.convert.load import open_pretrained
from msfp_jax.convert.lora import merge_loras
from msfp_jax.convert.lora_file import holds_lora
from msfp_jax.convert.lora_file import load_lora
from msfp_jax.convert.native import abstract_params
from msfp_jax.convert.native import check_prediction
from msfp_jax.convert.native import save_pretrained
from msfp_jax.convert.text_encoder import load_text_encoder

__all__ = [
    'abstract_autoencoder', 'abstract_params', 'check_prediction', 'holds_lora',
    'load_first_stage', 'load_lora', 'load_origin', 'load_plan',
    'load_pretrained', 'load_text_encoder', 'merge_loras', 'open_pretrained',
    'save_pretrained']
