"""Sweeps over how a history is read."""
