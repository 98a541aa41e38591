"""Prompts: files of them, tokens, and the conditions that models take."""
