"""Flower's grid, with retries, roster and liveness."""
