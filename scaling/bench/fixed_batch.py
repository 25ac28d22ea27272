"""A source whose every batch is the same arrays: for timing a step and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from recscale.models.inputs import Batch, CandidateSide, Schema, UserSide


class FixedBatch:
    """A `Source` without histories that repeats one random batch; a step costs the same whatever the values are.

    Dense fields are standard normal, ids uniform over the whole vocabulary, labels fair coins. `seed` decides them.
    """

    on_device: bool = False
    total_rows: int | None = None
    batches: int | None = None

    def __init__(self, schema: Schema, requests: int, candidates: int = 1, seed: int = 0):
        if schema.sequences or schema.domains > 1:
            raise ValueError("FixedBatch makes neither histories nor domains; use a schema without them")
        self.schema, self.requests, self.candidates = schema, requests, candidates
        rng = np.random.default_rng(seed)

        def side(fields, *lead: int) -> tuple[dict[str, Any], dict[str, Any]]:
            ids, dense = {}, {}
            for f in fields:
                if f.is_dense:
                    dense[f.name] = jnp.asarray(rng.standard_normal((*lead, f.width), dtype=np.float32))
                else:
                    ids[f.name] = jnp.asarray(rng.integers(0, f.vocabulary, lead), jnp.int32)
            return ids, dense

        rows = (requests, candidates)
        labels = jnp.asarray(rng.integers(0, 2, (*rows, len(schema.tasks))), jnp.float32)
        self._batch = Batch(
            user=UserSide(*side(schema.user_fields, requests), {}),
            candidates=CandidateSide(*side(schema.candidate_fields, *rows)),
            labels=labels,
            label_mask=jnp.ones_like(labels),
            valid=jnp.ones(rows, bool),
        )

    def batch(self, index: Any) -> Batch:
        return self._batch

    def iterate(self, start: int) -> Iterator[Batch]:
        while True:
            yield self._batch

    def holdout(self) -> Iterator[Batch]:
        yield self._batch

    def evaluate(self, logits: np.ndarray, metrics: Sequence[str] = ()) -> dict[str, Any]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {"name": "fixed_batch"}
