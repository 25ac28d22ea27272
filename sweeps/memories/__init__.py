"""Sweeps over memory slots."""
