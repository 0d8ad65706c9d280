"""Adapters as named arrays, their factors and groups, checkpoints. NumPy only."""
