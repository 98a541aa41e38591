"""Prompts: files of them, tokens, and the conditions that models take."""

from msfp_jax.text.embeddings import Embeddings
from msfp_jax.text.embeddings import load_embeddings
from msfp_jax.text.embeddings import save_embeddings
from msfp_jax.text.encode import encode_prompts
from msfp_jax.text.encode import load_encoders
from msfp_jax.text.prompts import read_prompts
from msfp_jax.text.tokenizer import load_tokenizer

__all__ = ['Embeddings', 'encode_prompts', 'load_embeddings', 'load_encoders',
           'load_tokenizer', 'read_prompts', 'save_embeddings']
