"""Request-major batches: user-side arrays `[R, ...]`, candidate-side arrays `[R, C, ...]`.

Ordinary pointwise training is C = 1. `Batch` holds ids; `Inputs` holds what `EmbeddingTables.lookup` made of them,
and is all an architecture ever sees. Every class is a pytree of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

# Besides arrays on the device these trees hold NumPy arrays, shapes, specifications of sharding.
Array = jax.Array | Any


@flax.struct.dataclass
class History:
    """Events of one sequence, newest first (column 0), padded at the old end.

    ids: field name -> int32 [R, S] (or [R, S, bag]); dense: field name -> float32 [R, S, width];
    length: int32 [R], number of real events, 0 is legal; delta_s: int32 [R, S] seconds between the request and the
    event, >= 0 and 0 on padding, or None without timestamps.
    """

    ids: dict[str, Array]
    dense: dict[str, Array]
    length: Array
    delta_s: Array | None = None


@flax.struct.dataclass
class UserSide:
    """User and context fields.

    ids: name -> int32 [R] (or [R, bag]); dense: name -> float32 [R, width]; histories: sequence name -> History;
    domain: int32 [R] or None.
    """

    ids: dict[str, Array]
    dense: dict[str, Array]
    histories: dict[str, History]
    domain: Array | None = None


@flax.struct.dataclass
class CandidateSide:
    """Candidate and cross fields. ids: name -> int32 [R, C] (or [R, C, bag]); dense: name -> float32 [R, C, width]."""

    ids: dict[str, Array]
    dense: dict[str, Array]


@flax.struct.dataclass
class Batch:
    """One batch of requests.

    labels: float32 [R, C, Y] in {0, 1}; label_mask: float32 [R, C, Y], 1 where the label was observed;
    valid: bool [R, C], False on padded candidates (and padded requests of a short last batch).
    """

    user: UserSide
    candidates: CandidateSide
    labels: Array
    label_mask: Array
    valid: Array

    @property
    def requests(self) -> int:
        """R."""
        return self.valid.shape[0]

    @property
    def rows(self) -> int:
        """B = R * C, padding included."""
        return self.valid.shape[0] * self.valid.shape[1]


@flax.struct.dataclass
class Events:
    """A looked-up history: events float [R, S, A] (zero on padding), length int32 [R], delta_s int32 [R, S] or None."""

    events: Array
    length: Array
    delta_s: Array | None = None


@flax.struct.dataclass
class QueryContent:
    """What a request asks for. tokens int32 [R, n]; query int32 [R], equal where two ask the same; history: sequence
    name -> int32 [R, S], the items of its events, -1 on padding."""

    tokens: Array
    query: Array
    history: dict[str, Array]


@flax.struct.dataclass
class ItemContent:
    """What candidates are made of. ids int32 [R, C], -1 on padding; tokens int32 [R, C, n]."""

    ids: Array
    tokens: Array


@flax.struct.dataclass
class UserInputs:
    """fields: name -> float [R, width]; histories: sequence name -> Events; domain int32 [R] or None; content: only of
    a schema that has it."""

    fields: dict[str, Array]
    histories: dict[str, Events]
    domain: Array | None = None
    content: QueryContent | None = None


@flax.struct.dataclass
class CandidateInputs:
    """fields: name -> float [R, C, width]; valid: bool [R, C], False on padded candidates, None if there are none;
    content: only of a schema that has it.

    Only what accumulates over candidates (running statistics, usage) needs `valid`; losses are masked by the batch's.
    """

    fields: dict[str, Array]
    valid: Array | None = None
    content: ItemContent | None = None

    @property
    def valid_rows(self) -> Array | None:
        """`valid` of the rows in order: bool [B]."""
        return None if self.valid is None else jnp.asarray(self.valid).reshape(-1)


@flax.struct.dataclass
class Inputs:
    """Everything an architecture sees: dense arrays, and ids of items and tokens where a schema has content."""

    user: UserInputs
    candidates: CandidateInputs


@flax.struct.dataclass
class Contrast:
    """A loss that picks each clicked candidate out of the others: see `losses.contrastive_loss`.

    scores: [R, R, C], of every request with every candidate; negative: bool [R, R, C], what a request's own are held
    against; weight: of the loss; clicked_only: whether only clicked candidates are held against; mean: over the
    clicked, else their sum.
    """

    scores: Array
    negative: Array
    weight: float = flax.struct.field(pytree_node=False)
    clicked_only: bool = flax.struct.field(pytree_node=False, default=False)
    mean: bool = flax.struct.field(pytree_node=False, default=True)


@flax.struct.dataclass
class Pairs:
    """A loss that puts clicked candidates above unclicked ones of the same request: see `losses.pair_loss`.

    above, below: bool [R, C], which candidates may stand on either side; weight: of the loss.
    """

    above: Array
    below: Array
    weight: float = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Output:
    """What `score` returns.

    logits: float32 [R, C, Y]; losses: named scalar auxiliary losses, already weighted, added to the task loss;
    stats: named diagnostics (arrays of any shape); scalars are logged;
    loss_logits: what the task loss is made of where that is not the logits alone: name -> (weight, logits like
    `logits`), the task loss is the weighted sum of theirs. Only training fills it (auxiliary heads, a second path).
    contrast, pairs: losses that need the labels, beside other scores or of these; pending: what `Ranker.settle` is to
    be given once the gradient is taken. All only in training.
    """

    logits: Array
    losses: dict[str, Array] = flax.struct.field(default_factory=dict)
    stats: dict[str, Array] = flax.struct.field(default_factory=dict)
    loss_logits: dict[str, tuple[Any, Array]] = flax.struct.field(default_factory=dict)
    contrast: Contrast | None = None
    pairs: Pairs | None = None
    pending: Any = None


def join_fields(fields: Mapping[str, Array], names: Sequence[str]) -> Float[jax.Array, "*rows d"]:
    """The named fields side by side: [..., width] each -> [..., sum of widths].

    Raises:
        KeyError: a field is not there.
    """
    missing = [name for name in names if name not in fields]
    if missing:
        raise KeyError(f"inputs lack the fields {', '.join(missing)}; they hold {', '.join(fields) or 'none'}")
    return jnp.concatenate([fields[name] for name in names], axis=-1)
