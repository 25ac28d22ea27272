"""Embedding tables, kept apart from architectures: ids become vectors here and nowhere else.

A `Table` is an `nnx.Variable` of its own kind, not a `Param`: optimisers of dense parameters never see it, and a
training step touches only the rows a batch names. The two halves of that are

    touched = find_touched(schema, batch)            # the distinct rows of each table, static shapes
    vectors = gather_touched(tables, touched)        # [N, width] per table: what the loss is differentiated against
    inputs  = embed(schema, batch, touched_lookup(vectors, touched))

so no array of a step has as many rows as the table, except the table itself. `EmbeddingTables.lookup(batch)` is the
plain form for evaluation, serving and other training loops.

Fields naming the same table share it, histories included. Padding (positions beyond a history's length, invalid
candidates, id 0 in a bag) contributes nothing and is never counted as touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from .batch import (
    Array,
    Batch,
    CandidateInputs,
    CandidateSide,
    Events,
    History,
    Inputs,
    ItemContent,
    QueryContent,
    UserInputs,
    UserSide,
)
from .schema import Field, Schema

# (table name, place of the field, ids) -> vectors [..., width]
Lookup = Callable[[str, str, Array], Array]


class Table(nnx.Variable):
    """Rows [V, width] trained by touched-row updates; logical axes (rows, embed)."""


@flax.struct.dataclass
class Touched:
    """The rows of one table that a batch names.

    rows: int32 [N], distinct and ascending; unused slots hold V (out of range), so writes to them are dropped.
    hit: bool [N], whether the slot is used by a real (not padded) position.
    positions: place of a field -> int32 of the field's id shape, index into `rows`.
    """

    rows: Array
    hit: Array
    positions: dict[str, Array]


class EmbeddingTables(nnx.Module):
    """One table per table name of the schema.

    Args:
        schema: fields and histories.
        rngs: parameter random streams.
        init_std: standard deviation of the normal initialiser. Undisclosed by the ranking papers; default 0.01.
    """

    def __init__(self, schema: Schema, *, rngs: nnx.Rngs, init_std: float = 0.01):
        self.schema = schema
        init = jax.nn.initializers.normal(init_std)
        self.tables = nnx.Dict(
            {
                name: Table(init(rngs.params(), (rows, width), jnp.float32), logical_axes=("rows", "embed"))
                for name, (rows, width) in schema.tables().items()
            }
        )

    def lookup(self, batch: Batch) -> Inputs:
        """Turns ids into vectors: user fields [R, width], candidate fields [R, C, width], events [R, S, A]."""
        return embed(self.schema, batch, table_lookup(self.arrays()))

    def arrays(self) -> dict[str, Array]:
        """The rows of every table: name -> [V, width]."""
        # By name: a table may be called "items", and then that is no method of `self.tables` any more.
        return {name: self.tables[name][...] for name in self.schema.tables()}


def table_lookup(tables: Mapping[str, Array]) -> Lookup:
    """Lookup in whole tables; ids outside the table are clamped by JAX's gather."""
    return lambda table, place, ids: jnp.take(tables[table], ids, axis=0, mode="clip")


def touched_lookup(vectors: Mapping[str, Array], touched: Mapping[str, Touched]) -> Lookup:
    """Lookup in the gathered rows only, so gradients have the shape of the gathered rows."""
    return lambda table, place, ids: jnp.take(vectors[table], touched[table].positions[place], axis=0, mode="clip")


def embed(schema: Schema, batch: Batch, lookup: Lookup) -> Inputs:
    """Builds the dense inputs of an architecture from a batch and a way to look ids up.

    A bag is the mean of the vectors of its non-zero ids (zero when empty). Events beyond a history's length are zero; a
    request that is padding has none.
    """
    return Inputs(
        user=embed_user(schema, batch.user, lookup, batch.valid.any(axis=1)),
        candidates=embed_candidates(schema, batch.candidates, lookup, batch.valid),
    )


def embed_user(schema: Schema, user: UserSide, lookup: Lookup, request: Array | None = None) -> UserInputs:
    """The user's half of `embed`; request: bool [R], False on padding, None where every request is real."""
    histories = {}
    for sequence in schema.sequences:
        history = user.histories[sequence.name]
        columns = _vectors(sequence.fields, f"history.{sequence.name}", history, lookup)
        events = jnp.concatenate(list(columns.values()), axis=-1)
        length = history.length if request is None else jnp.where(request, history.length, 0)
        real = _real_events(length, events.shape[1])
        events = jnp.where(real[..., None], events, jnp.zeros((), events.dtype))
        histories[sequence.name] = Events(events=events, length=length, delta_s=history.delta_s)
    fields = _vectors(schema.user_fields, "user", user, lookup)
    return UserInputs(fields=fields, histories=histories, domain=user.domain, content=_query(schema, user))


def embed_candidates(
    schema: Schema, candidates: CandidateSide, lookup: Lookup, valid: Array | None = None
) -> CandidateInputs:
    """The candidates' half of `embed`; valid: bool [R, C], None where every candidate is real."""
    fields = _vectors(schema.candidate_fields, "candidate", candidates, lookup)
    content = None
    if schema.content is not None:
        items = candidates.ids["content_item"]
        items = items if valid is None else jnp.where(valid, items, -1)
        content = ItemContent(items, candidates.ids["content"])
    return CandidateInputs(fields=fields, valid=valid, content=content)


def find_touched(schema: Schema, batch: Batch) -> dict[str, Touched]:
    """Finds the distinct rows each table contributes to a batch, with static shapes.

    A table with no more rows than the batch has ids is taken whole (N = V), which is cheaper than sorting and still
    bounded by the batch; a larger one is sorted once (N = number of ids).
    """
    places: dict[str, list[tuple[str, Array, Array]]] = {}
    for field, place, ids, real in _id_places(schema, batch):
        places.setdefault(field.table_name, []).append((place, ids, real))
    sizes = schema.tables()
    return {name: _touched_rows(sizes[name][0], entries) for name, entries in places.items()}


def gather_touched(tables: Mapping[str, Array], touched: Mapping[str, Touched]) -> dict[str, Array]:
    """Rows of each table named by a batch: [N, width]; unused slots repeat the last row and are never read."""
    return {name: jnp.take(tables[name], t.rows, axis=0, mode="clip") for name, t in touched.items()}


def _query(schema: Schema, user: UserSide) -> QueryContent | None:
    """What requests ask for, as ids and tokens that architectures see as they are."""
    if schema.content is None:
        return None
    history = {}
    for name in schema.content.histories:
        events = user.histories[name]
        ids = events.ids["content_item"]
        history[name] = jnp.where(_real_events(events.length, ids.shape[1]), ids, -1)
    return QueryContent(user.ids["query_content"], user.ids["query"], history)


def _vectors(
    fields: tuple[Field, ...], place: str, side: UserSide | CandidateSide | History, lookup: Lookup
) -> dict[str, Array]:
    """The vectors of one side's fields, by name."""
    return {
        f.name: side.dense[f.name] if f.is_dense else _value(f, f"{place}.{f.name}", side.ids[f.ids_name], lookup)
        for f in fields
    }


def _value(field: Field, place: str, ids: Array, lookup: Lookup) -> Array:
    vectors = lookup(field.table_name, place, ids)
    if field.bag == 1:
        return vectors
    real = (ids > 0)[..., None].astype(vectors.dtype)
    return jnp.sum(vectors * real, axis=-2) / jnp.maximum(jnp.sum(real, axis=-2), 1)


def _real_events(length: Array, size: int) -> Array:
    return jnp.arange(size)[None, :] < length[:, None]


def _id_places(schema: Schema, batch: Batch) -> Iterator[tuple[Field, str, Array, Array]]:
    """Yields (field, place, ids, real) for every id field; `real` is False on padding."""
    request = batch.valid.any(axis=1)
    sides = [
        (schema.user_fields, "user", batch.user.ids, request),
        (schema.candidate_fields, "candidate", batch.candidates.ids, batch.valid),
    ]
    for sequence in schema.sequences:
        history = batch.user.histories[sequence.name]
        columns = [ids.shape[1] for ids in history.ids.values()]
        real = _real_events(history.length, max(columns, default=0)) & request[:, None]
        sides.append((sequence.fields, f"history.{sequence.name}", history.ids, real))
    for fields, place, ids, real in sides:
        for field in fields:
            if not field.is_dense:
                yield field, f"{place}.{field.name}", *_masked(field, ids[field.ids_name], real)


def _masked(field: Field, ids: Array, real: Array) -> tuple[Array, Array]:
    if field.bag > 1:
        real = real[..., None] & (ids > 0)
    return ids, jnp.broadcast_to(real, ids.shape)


def _touched_rows(rows: int, entries: list[tuple[str, Array, Array]]) -> Touched:
    total = sum(ids.size for _, ids, _ in entries)
    # Clamp as the plain lookup does, so an id beyond the table trains the row it reads.
    entries = [(place, jnp.clip(ids, 0, rows - 1), real) for place, ids, real in entries]
    if rows <= total:
        flat = jnp.concatenate([jnp.where(real, ids, rows).ravel() for _, ids, real in entries])
        hit = jnp.zeros(rows, bool).at[flat].set(True, mode="drop")
        positions = {place: ids for place, ids, _ in entries}
        return Touched(rows=jnp.arange(rows, dtype=jnp.int32), hit=hit, positions=positions)
    flat = jnp.concatenate([jnp.where(real, ids, rows).ravel() for _, ids, real in entries]).astype(jnp.int32)
    distinct, inverse = jnp.unique(flat, return_inverse=True, size=total, fill_value=rows)
    positions, start = {}, 0
    for place, ids, _ in entries:
        positions[place] = inverse[start : start + ids.size].reshape(ids.shape).astype(jnp.int32)
        start += ids.size
    return Touched(rows=distinct.astype(jnp.int32), hit=distinct < rows, positions=positions)
