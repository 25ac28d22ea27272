"""The efficient frontier and the compute-optimal size."""
