"""Public data split into virtual hospitals: partitions, splits, scanners' appearance."""
