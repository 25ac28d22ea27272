"""From a run table and a form to a law: starting points, the solver, the fit and its record."""
