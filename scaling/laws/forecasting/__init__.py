"""Forecasts beyond the runs there are, and what several architectures say together."""
