"""Forms of scaling laws, by name."""
