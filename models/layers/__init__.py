"""Layers that several architectures share: explicit sizes and `rngs` in, arrays in and out, no schema and no config."""
