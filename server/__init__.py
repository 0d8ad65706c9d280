"""The server's door: a deployable unit, not part of the installed package."""
