"""What a run shows: report, statistics, comparison, provenance."""
