"""Putting runs together: train.py, eval.py, studies."""
