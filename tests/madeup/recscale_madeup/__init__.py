"""A model, a data set, a law form, a metric and an executor that recscale does not have."""
