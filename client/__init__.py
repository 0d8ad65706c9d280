"""The client's door: a deployable unit, not part of the installed package."""
