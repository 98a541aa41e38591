"""What people look at."""

from msfp_jax.report.page import write
from msfp_jax.report.section import Experiment

__all__ = ['Experiment', 'write']
