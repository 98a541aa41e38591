"""Checkpoints -> (model, parameters), strict both ways."""

from msfp_jax.convert.load import load_first_stage
from msfp_jax.convert.load import load_pretrained
from msfp_jax.convert.native import save_pretrained

__all__ = ['load_first_stage', 'load_pretrained', 'save_pretrained']
