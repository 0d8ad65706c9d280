"""The audit log of each end, and the cross-check of two of them."""
