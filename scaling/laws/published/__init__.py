"""Scaling laws printed by others, as data."""
