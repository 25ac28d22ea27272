"""Published orderings as sweeps: every arm trained at its own best rate, every ordering judged by paired seeds."""
