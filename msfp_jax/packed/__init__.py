"""Packed models and their files."""
