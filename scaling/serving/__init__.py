"""Trained models taken elsewhere: exported programs with their arrays, and what loads them without this package."""
