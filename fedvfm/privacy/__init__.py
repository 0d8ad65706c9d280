"""Differential privacy: mechanisms, accountants, the ledger of what a data set has spent, and the planner."""
