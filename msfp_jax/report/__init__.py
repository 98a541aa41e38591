"""The page about an evaluation that people look at, section by section."""

from msfp_jax.report.page import write
from msfp_jax.report.section import Experiment

__all__ = ['Experiment', 'write']
