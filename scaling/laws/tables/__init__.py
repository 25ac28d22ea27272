"""Run tables: reading them, and deciding which rows enter a fit."""

from .validate import read

__all__ = ["read"]
