"""Rounds of a federation: cohort, messages, admission, aggregation, journal."""
