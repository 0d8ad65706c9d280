"""Adapter kinds: the small trainable weights put into a frozen backbone."""

from fedvfm.adapters.table import TABLE

__all__ = ["TABLE"]
