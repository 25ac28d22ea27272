"""Public data sets: their files parsed, checked and turned into packed logs."""
