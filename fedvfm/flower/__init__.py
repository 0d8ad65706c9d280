"""Flower's internals that this package needs, each held by a contract test."""
