"""What people look at."""

from msfp_jax.report.page import write

__all__ = ['write']
