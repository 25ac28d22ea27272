"""Sweep files, and the planner and launcher that turn them into runs. Imports the other three folders; none imports it.

A sweep file needs only what is exported here:

    from recscale.sweeps import architectures, by_dense_params, product, seeds
"""

from recscale.pallas_kernels import __version__ as __version__

from .engine.combinators import (
    Point,
    Sweep,
    architectures,
    axis,
    by_dense_params,
    by_embedding_rows,
    by_embedding_width,
    by_flop_budget,
    by_history_length,
    by_memory_slots,
    by_train_flops,
    chain,
    noted,
    product,
    rate_search,
    seeds,
)
from .engine.combinators import zip_ as zip  # noqa: A004 - the name every user of sweeps expects

if __name__ != "recscale.sweeps":
    raise ImportError("sweeps/ is the package recscale.sweeps: import that, not the folder")

__all__ = [
    "Point",
    "Sweep",
    "architectures",
    "axis",
    "by_dense_params",
    "by_embedding_rows",
    "by_embedding_width",
    "by_flop_budget",
    "by_history_length",
    "by_memory_slots",
    "by_train_flops",
    "chain",
    "noted",
    "product",
    "rate_search",
    "seeds",
    "zip",
]
