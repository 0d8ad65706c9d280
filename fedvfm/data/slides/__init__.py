"""Whole slides: tiles of tissue, read by region; no slide is ever in memory."""
