"""Adapters as named arrays, their factors, checkpoints. NumPy only."""
