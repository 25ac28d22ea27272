"""Whether one architecture scales better than another."""
