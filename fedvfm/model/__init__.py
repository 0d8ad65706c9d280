"""A backbone with an adapter, ready to compute: precision, memory, cache of features, sliding windows."""
