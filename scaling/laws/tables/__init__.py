"""Run tables: reading them, and deciding which rows enter a fit."""
