"""Sweeps over interaction backbones."""
