"""Everything that trains, counts, measures and fits: data, training, laws, benchmarks, records, plots, command line.

Imports `models` and `pallas_kernels`, and is imported by `sweeps`. Which runs there are is not decided here.
"""
