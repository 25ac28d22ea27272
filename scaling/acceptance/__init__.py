"""Experiments that hold the known-truth log, the learners and the fitter to known constants."""
