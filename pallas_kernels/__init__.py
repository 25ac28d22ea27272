"""Accelerator kernels, one folder per operation: `api`, `reference`, one file per target, named shapes.

Imports no other package of this project.
"""

from importlib.metadata import version

if __name__ != "recscale.pallas_kernels":
    raise ImportError("pallas_kernels/ is the package recscale.pallas_kernels: import that, not the folder")

__version__ = version("recscale")
