"""Processes, their health and their logs, the machine's capacity, optional parts."""
