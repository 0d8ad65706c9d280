"""Engines of a simulation: in one process and its workers, Ray, a real deployment."""
