"""How sure a fit is of its parameters: resampled clusters, seed noise, profiles."""
