"""One file a data set, the hospital's own folder among them."""

from fedvfm.data.sources.table import TABLE

__all__ = ["TABLE"]
