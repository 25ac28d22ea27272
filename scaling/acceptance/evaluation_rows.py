"""The rows on which the acceptance experiment evaluates: a batch and its exact truth at a time."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from recscale.models.inputs import Batch
from recscale.scaling.data.known_truth.batches import make_batch
from recscale.scaling.data.known_truth.exact import TruthRows, truth
from recscale.scaling.data.known_truth.world import World

SEED = 20  # of the log whose rows these are
ROWS = 4096  # rows of a batch


def evaluation_batches(world: World, batches: int) -> Iterator[tuple[Batch, TruthRows]]:
    """The first `batches` evaluation batches of `ROWS` rows, with their truth."""
    make = jax.jit(lambda index: make_batch(world, SEED, index, ROWS, evaluation=True))
    for index in range(batches):
        batch = make(np.uint32(index))
        yield batch, truth(world, batch)
