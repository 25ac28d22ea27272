"""The known-truth click log: a synthetic log whose irreducible loss and exponents are known exactly."""
