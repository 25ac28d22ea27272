"""Random inputs of a schema's shapes, for tests, benchmarks and shape inference."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from .batch import CandidateInputs, Events, Inputs, ItemContent, QueryContent, UserInputs
from .schema import Schema, Sequence

_DAY_S = 86_400


def random_inputs(schema: Schema, requests: int, candidates: int, seed: int = 0) -> Inputs:
    """Standard normal fields and events as `EmbeddingTables.lookup` would give them: R requests, C candidates.

    History lengths are uniform on [0, S], so empty and full ones occur; padded events are zero; ages grow along the
    columns. Equal arguments give equal arrays.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int):
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

    user = {field.name: normal(requests, field.width) for field in schema.user_fields}
    candidate = {field.name: normal(requests, candidates, field.width) for field in schema.candidate_fields}
    histories = {sequence.name: _random_history(sequence, requests, rng) for sequence in schema.sequences}
    domain = jnp.asarray(rng.integers(0, schema.domains, requests), jnp.int32) if schema.domains > 1 else None
    query, items = _random_content(schema, requests, candidates, histories, rng)
    return Inputs(UserInputs(user, histories, domain, query), CandidateInputs(candidate, content=items))


def _random_content(
    schema: Schema, requests: int, candidates: int, histories: dict[str, Events], rng: np.random.Generator
) -> tuple[QueryContent | None, ItemContent | None]:
    """Tokens without padding, and items."""
    if schema.content is None:
        return None, None
    content = schema.content

    def draw(low: int, high: int, *shape: int):
        return jnp.asarray(rng.integers(low, high, shape), jnp.int32)

    history = {}
    for name in content.histories:
        columns = histories[name].events.shape[1]
        real = np.arange(columns)[None] < np.asarray(histories[name].length)[:, None]
        history[name] = jnp.where(real, draw(0, content.items, requests, columns), -1)
    asked = draw(1, content.vocabulary, requests, content.query_length)
    made = draw(1, content.vocabulary, requests, candidates, sum(content.segments))
    query = QueryContent(asked, draw(0, 1 << 16, requests), history)
    return query, ItemContent(draw(0, content.items, requests, candidates), made)


def _random_history(sequence: Sequence, requests: int, rng: np.random.Generator) -> Events:
    columns = sequence.length
    length = rng.integers(0, columns + 1, requests)
    valid = np.arange(columns)[None] < length[:, None]
    events = rng.standard_normal((requests, columns, sequence.width), dtype=np.float32) * valid[..., None]
    delta_s = None
    if sequence.timestamps:
        ages = np.cumsum(rng.integers(0, _DAY_S, (requests, columns)), axis=1)
        delta_s = jnp.asarray(ages * valid, jnp.int32)
    return Events(jnp.asarray(events), jnp.asarray(length, jnp.int32), delta_s)
