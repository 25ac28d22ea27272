"""Everything that trains, counts, measures and fits: data, training, laws, benchmarks, records, plots, command line.

Imports `models` and `pallas_kernels`, and is imported by `sweeps`. Which runs there are is not decided here.
"""

from recscale.pallas_kernels import __version__

if __name__ != "recscale.scaling":
    raise ImportError("scaling/ is the package recscale.scaling: import that, not the folder")

__all__ = ["__version__"]
