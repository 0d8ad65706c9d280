"""Aggregation rules: one file a rule."""

from fedvfm.aggregators.table import TABLE

__all__ = ["TABLE"]
