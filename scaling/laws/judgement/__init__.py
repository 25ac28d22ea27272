"""What may be believed of a fit: gates that refuse, scored extrapolation, other defensible choices."""
