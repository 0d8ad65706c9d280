"""The server wing: rounds, admission, aggregation, checkpoints. NumPy only, never torch."""
