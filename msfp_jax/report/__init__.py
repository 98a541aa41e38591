"""The page about an evaluation that people look at, section by section."""

from msfp_jax.report.page import write

__all__ = ['write']
