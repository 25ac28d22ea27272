"""Compiling kernels and training steps for accelerators that are not there."""
