"""Rules of histories, in one place: order, masks, positions, time differences, and what an encoder hands on.

Column 0 is the newest event; `valid[r, s] = s < length[r]`, so padding exists only at the old end. `delta_s` is the
request time minus the event time: >= 0, non-decreasing along the columns, 0 on padding, never relative to a candidate.
A shorter history keeps the first columns. A history of length 0 is legal everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from recscale.models.layers import param
from recscale.models.options import Options

from .batch import Events, UserInputs
from .schema import Schema, Sequence

TIME_BUCKETS = 64
TIME_WIDTH = 8

# First second of buckets 1, 2, ...: the smallest d with 2*log2(1 + d) >= k. An int32 never reaches bucket 63.
_BUCKET_STARTS = np.asarray([math.isqrt(2**k - 1) for k in range(1, TIME_BUCKETS - 1)], np.int32)


@dataclasses.dataclass(frozen=True)
class TokenShape:
    """How many tokens a sequence encoder hands to a backbone: per request, per candidate, and their width A.

    The `trained` flags say whether a gradient must flow back into them (not if raw dense events reach them unchanged).
    """

    user: int = 0
    candidate: int = 0
    width: int = 0
    user_trained: bool = True
    candidate_trained: bool = True

    @property
    def tokens(self) -> int:
        return self.user + self.candidate


NO_TOKENS = TokenShape()


# Tokens of a sequence encoder, of requests and of candidates.
RequestTokens = Float[Array, "R t A"]
RowTokens = Float[Array, "R C t A"]


class SequenceTokens(NamedTuple):
    """user [R, t_u, A] or None, candidate [R, C, t_c, A] or None."""

    user: RequestTokens | None
    candidate: RowTokens | None


class HistoryView(NamedTuple):
    """events [R, S, A], zero on padding; valid bool [R, S]; position int32 [S]; delta_s int32 [R, S] or None;
    length int32 [R], events that are kept."""

    events: Float[Array, "R S A"]
    valid: Bool[Array, "R S"]
    position: Int32[Array, " S"]
    delta_s: Int32[Array, "R S"] | None
    length: Int32[Array, " R"]


def read_history(history: Events, length: int | None = None, *, check: bool = False) -> HistoryView:
    """The events of a history with their mask, positions and ages; whatever stands on padding is replaced by zeros.

    Args:
        history: a looked-up sequence.
        length: keep the newest `length` columns.
        check: assert the order rules (concrete arrays only; for debugging).

    Raises:
        ValueError: with `check`, ages negative or decreasing along the columns, or a length outside [0, S].
    """
    events, delta_s = history.events[:, :length], history.delta_s
    columns = events.shape[1]
    kept = jnp.minimum(history.length, columns)
    position = jnp.arange(columns, dtype=jnp.int32)
    valid = position[None, :] < kept[:, None]
    if check:
        _check_order(history)
    # `where` and not a product: padding may hold anything, NaN included.
    events = jnp.where(valid[..., None], events, 0)
    if delta_s is not None:
        delta_s = jnp.where(valid, delta_s[:, :length], 0)
    return HistoryView(events, valid, position, delta_s, kept)


def time_bucket(delta_s: Int[Array, "*rows"]) -> Int32[Array, "*rows"]:
    """clip(floor(2 * log2(1 + seconds)), 0, 63), int32 of the same shape; exact, by comparing with integer bounds."""
    starts = jnp.asarray(_BUCKET_STARTS)
    return jnp.searchsorted(starts, delta_s, side="right", method="scan_unrolled").astype(jnp.int32)


class TimeFeature(nnx.Module):
    """Appends an embedding of the age bucket to every event: [R, S, A] -> [R, S, A + 8]. 64*8 parameters, no FLOPs."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.table = param.normal(rngs, (TIME_BUCKETS, TIME_WIDTH), ("buckets", "embed"), TIME_WIDTH**-0.5)

    def __call__(self, view: HistoryView) -> HistoryView:
        if view.delta_s is None:
            raise ValueError("the model was built for a history with timestamps, and the inputs carry no delta_s")
        ages = jnp.take(self.table[...], time_bucket(view.delta_s), axis=0)
        ages = jnp.where(view.valid[..., None], ages, 0).astype(view.events.dtype)
        return view._replace(events=jnp.concatenate([view.events, ages], axis=-1))


class Positions(nnx.Module):
    """Adds a learned vector per position to the valid events: [R, S, A] -> [R, S, A]. S_max*A parameters, no FLOPs.

    Position 0 is the newest event, so a position means the same at every length.
    """

    def __init__(self, longest: int, width: int, *, rngs: nnx.Rngs):
        self.table = param.normal(rngs, (longest, width), ("events", "embed"), width**-0.5)

    def __call__(self, view: HistoryView) -> HistoryView:
        longest, columns = self.table.shape[0], view.position.shape[0]
        if columns > longest:
            raise ValueError(f"the history has {columns} columns, the position table {longest}; raise max_length")
        vectors = self.table[...][None, :columns]
        events = view.events + jnp.where(view.valid[..., None], vectors, 0).astype(view.events.dtype)
        return view._replace(events=events)


@dataclasses.dataclass(frozen=True)
class HistoryOptions(Options):
    """Flags every sequence encoder's config may inherit.

    sequence: which history, None if there is one; recent: keep the newest columns only, None for all; time_feature:
    see `uses_time`.
    """

    sequence: str | None = None
    recent: int | None = None
    time_feature: Literal["auto", "bucket", "none"] = "auto"


@dataclasses.dataclass(frozen=True)
class EventPlan:
    """Which events an encoder reads: the newest S of history `sequence`, of width A (time feature included).

    trained: whether a gradient must flow back into them. params: of the time feature.
    """

    sequence: str
    length: int
    width: int
    use_time: bool
    timestamps: bool
    trained: bool

    @property
    def params(self) -> int:
        return TIME_BUCKETS * TIME_WIDTH * self.use_time


def plan_events(schema: Schema, options: HistoryOptions) -> EventPlan:
    """Resolves the flags for one schema; `options` may be any config that inherits `HistoryOptions`.

    Raises:
        ValueError: see `choose_sequence` and `uses_time`; or `recent` below 1.
    """
    sequence = choose_sequence(schema, options.sequence)
    use_time = uses_time(sequence, options.time_feature)
    if options.recent is not None and options.recent < 1:
        raise ValueError(f"recent is {options.recent}, expected at least 1 event; None reads all")
    return EventPlan(
        sequence=sequence.name,
        length=min(sequence.length, options.recent or sequence.length),
        width=sequence.width + TIME_WIDTH * use_time,
        use_time=use_time,
        timestamps=sequence.timestamps,
        trained=use_time or any(not field.is_dense for field in sequence.fields),
    )


def longest_history(events: EventPlan, max_length: int | None) -> int:
    """S_max, the events that positions and generated queries are made for: `max_length`, or those that are read.

    Raises:
        ValueError: more events are read than that.
    """
    if max_length is not None and max_length < events.length:
        raise ValueError(
            f"max_length is {max_length}, but the history has {events.length} events; raise it or set recent"
        )
    return events.length if max_length is None else max_length


def event_columns(schema: Schema, events: EventPlan, names: tuple[str, ...], flag: str) -> tuple[tuple[int, ...], ...]:
    """Which columns of the vectors that `EventReader` gives belong to each of the event fields `names`.

    Raises:
        ValueError: an unknown name; the message calls the setting `flag`.
    """
    found, first = {}, 0
    for field in choose_sequence(schema, events.sequence).fields:
        found[field.name] = tuple(range(first, first + field.width))
        first += field.width
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"{flag} names {', '.join(unknown)}; the event fields of {events.sequence!r} are {', '.join(found)}"
        )
    return tuple(found[name] for name in names)


class EventReader(nnx.Module):
    """The events of a plan, with the time feature if it is used; columns beyond the plan's S are never read."""

    def __init__(self, plan: EventPlan, *, rngs: nnx.Rngs):
        self.plan = plan
        self.time = TimeFeature(rngs=rngs) if plan.use_time else None

    def __call__(self, user: UserInputs) -> HistoryView:
        view = read_history(find_history(user, self.plan.sequence), self.plan.length)
        return view if self.time is None else self.time(view)


def random_suffixes(user: UserInputs, key: PRNGKeyArray, alpha: float, beta: float, multiple: int = 8) -> UserInputs:
    """Every history cut to a random number of its newest events, for training one model on all lengths.

    The kept share of the S columns is Beta(alpha, beta) per request (alpha, beta < 1: mostly very short or whole),
    rounded up to `multiple` events (to whole events where S is no larger than that, else nothing would be cut); a
    history shorter than that stays as it is.
    """

    def cut(history: Events, key: Array) -> Events:
        columns = history.events.shape[1]
        step = multiple if columns > multiple else 1
        share = jax.random.beta(key, alpha, beta, history.length.shape)
        kept = step * jnp.ceil(share * columns / step).astype(jnp.int32)
        return dataclasses.replace(history, length=jnp.minimum(history.length, jnp.maximum(kept, 1)))

    keys = jax.random.split(key, max(len(user.histories), 1))
    names = sorted(user.histories)
    cuts = {name: cut(user.histories[name], k) for name, k in zip(names, keys, strict=True)}
    return dataclasses.replace(user, histories=cuts)


def choose_sequence(schema: Schema, name: str | None) -> Sequence:
    """The history called `name`, or the schema's only one.

    Raises:
        ValueError: no history, none of that name, or several and no name.
    """
    names = [sequence.name for sequence in schema.sequences]
    if not names:
        raise ValueError("a sequence encoder needs a history, and the schema has no sequences; use a backbone alone")
    if name is None and len(names) > 1:
        raise ValueError(f"the schema has several histories ({', '.join(names)}); set `sequence` to one of them")
    if name is not None and name not in names:
        raise ValueError(f"sequence is {name!r}, but the schema's histories are {', '.join(names)}")
    return schema.sequences[names.index(name) if name is not None else 0]


def uses_time(sequence: Sequence, time_feature: str) -> bool:
    """Resolves the flag: "auto" = where the log has timestamps, "bucket" = always, "none" = never."""
    if time_feature == "bucket" and not sequence.timestamps:
        raise ValueError(f"time_feature='bucket', but history {sequence.name!r} has no timestamps; use 'none'")
    return sequence.timestamps if time_feature == "auto" else time_feature == "bucket"


def find_history(user: UserInputs, name: str) -> Events:
    """The looked-up history called `name`; KeyError lists those that exist."""
    if name not in user.histories:
        raise KeyError(f"inputs hold no history {name!r}; they hold {', '.join(user.histories) or 'none'}")
    return user.histories[name]


def _check_order(history: Events) -> None:
    length, columns = np.asarray(history.length), history.events.shape[1]
    if (length < 0).any() or (length > columns).any():
        raise ValueError(f"history lengths lie in [{length.min()}, {length.max()}], expected [0, {columns}]")
    if history.delta_s is None:
        return
    ages = np.asarray(history.delta_s)
    valid = np.arange(columns)[None] < length[:, None]
    rows = ((ages < 0) & valid).any(axis=1) | ((np.diff(ages, axis=1) < 0) & valid[:, 1:]).any(axis=1)
    if rows.any():
        raise ValueError(
            f"request {int(np.argmax(rows))}: delta_s must be >= 0 and non-decreasing (column 0 is the newest event)"
        )
