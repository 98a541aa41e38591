"""Checkpoints -> (model, parameters), strict both ways."""

from msfp_jax.convert.native import load_pretrained
from msfp_jax.convert.native import save_pretrained

__all__ = ['load_pretrained', 'save_pretrained']
