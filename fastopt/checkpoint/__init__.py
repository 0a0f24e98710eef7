"""Optimizers as state dicts, and in files."""
