"""Tasks: head, loss and metrics."""

from fedvfm.tasks.table import TABLE

__all__ = ["TABLE"]
