"""The coordinator's process: whom it waits for, what it is told, what it says of itself."""
