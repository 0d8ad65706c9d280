"""Backbones: frozen vision foundation models."""

from fedvfm.backbones.table import TABLE

__all__ = ["TABLE"]
