"""Aggregation rules: one file a rule."""

from fedvfm.server.aggregators.table import TABLE

__all__ = ["TABLE"]
