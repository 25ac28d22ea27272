"""Accelerator kernels, one folder per operation: `api`, `reference`, one file per target, named shapes.

Imports no other room.
"""
