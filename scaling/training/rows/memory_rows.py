"""Optimisers of memory values: a step touches the rows a batch hit, or (`dense_adam`) all of them.

A slot's gradient is a sum over its hits, dV[m] = sum of w * g, and stays in that form (`RowGrads`): hits are sorted by
row, their products summed a chunk at a time, and every row that ends in a chunk gets one optimiser step. Nothing of the
table's size is built except the table and its moments, which are updated in place.

    rows_adam      one Adam step per touched row on the sum of its hits; moments touched only there
    rows_adagrad   s <- s + mean_d(g^2);  V <- V - rate g / (sqrt(s) + eps)      s: one number a row
    rows_sgd       V <- V - rate g
    dense_adam     Adam on the dense gradient; untouched rows keep moving on their momentum

Bias correction counts the steps of the run ("global") or a row's own updates ("row"). Weight decay is decoupled and,
under row updates, applies to touched rows only. Clipping is of the values' own gradient norm, apart from the rest.

Rates, f the schedule's factor and r the peak rate of the dense parameters:

    multiple   c r f                  constant   c, whatever the schedule
    absolute   c f                    linear     c r f at first, linearly down to r f over `decay_examples`

Letters: M rows, d width, n hits, P replicas.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from recscale.models.memories.value_table import RowGrads
from recscale.pallas_kernels.chunks import fold_rows, rows_within
from recscale.pallas_kernels.sparse_gather import SortedHits, sort_hits
from recscale.scaling.training.config import require_word

from . import row_updates
from .row_updates import RowOptimizer, Slots

ValueUpdate = Literal["rows_adam", "rows_adagrad", "rows_sgd", "dense_adam"]
RateRule = Literal["multiple", "linear", "absolute", "constant"]
BiasCorrection = Literal["global", "row"]

# The rule of one row behind each name.
_RULES: dict[ValueUpdate, RowOptimizer] = {
    "rows_adam": "rowwise_adam",
    "dense_adam": "rowwise_adam",
    "rows_adagrad": "rowwise_adagrad",
    "rows_sgd": "rowwise_sgd",
}

# Most bytes of products w * g alive at once. More of them leave the caches: 16 MiB takes a fifth longer on 2^14 rows of
# width 64 and two fifths on 2^20.
_LIMIT_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class ValueOptions:
    """How memory values train; see the file's head.

    rate: c of the rule. decay_steps: of rule "linear". clip_norm: 0 is off.
    """

    update: ValueUpdate = "rows_adam"
    rate_rule: RateRule = "multiple"
    rate: float = 1.0
    decay_steps: int = 0
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    bias_correction: BiasCorrection = "global"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        require_word("training.value_update", self.update, get_args(ValueUpdate))
        require_word("training.value_lr_rule", self.rate_rule, get_args(RateRule))
        require_word("training.value_bias_correction", self.bias_correction, get_args(BiasCorrection))
        if self.rate_rule == "linear" and self.decay_steps < 1:
            raise ValueError(
                "training.value_lr_rule 'linear' needs training.value_lr_decay_examples, the rows over which the "
                "multiple falls to 1; it is 0"
            )

    @property
    def dense(self) -> bool:
        return self.update == "dense_adam"


def value_options(training: ConfigDict, batch_rows: int) -> ValueOptions:
    """The options a run's `training` section gives, for steps of `batch_rows` rows."""
    return ValueOptions(
        update=training.value_update,
        rate_rule=training.value_lr_rule,
        rate=training.value_lr,
        decay_steps=math.ceil(training.value_lr_decay_examples / batch_rows),
        clip_norm=training.value_clip_norm,
        weight_decay=training.value_weight_decay,
        bias_correction=training.value_bias_correction,
        b1=training.b1,
        b2=training.b2,
        eps=training.eps,
    )


def init_slots(options: ValueOptions, table: Float[Array, "M d"]) -> Slots:
    """Optimiser state of a table."""
    slots = row_updates.init_slots(_RULES[options.update], table)
    if options.bias_correction == "global":
        slots.pop("count", None)
    return slots


def value_rate(
    options: ValueOptions, rate: Float[Array, " P"], factor: Float[Array, ""], step: Int[Array, ""]
) -> Float[Array, " P"]:
    """Rate of the values, [P] like `rate`, the peak rates; `factor` and `step` are the schedule's."""
    if options.rate_rule == "multiple":
        return options.rate * rate * factor
    if options.rate_rule == "linear":
        left = jnp.maximum(1.0 - step / options.decay_steps, 0.0)
        return (1.0 + (options.rate - 1.0) * left) * rate * factor
    return jnp.full_like(rate, options.rate) * (factor if options.rate_rule == "absolute" else 1.0)


def update_rows(
    options: ValueOptions,
    table: Float[Array, "M d"],
    slots: Slots,
    grads: RowGrads,
    rate: Float[Array, ""] | float,
    step: Int[Array, ""],
    active: Bool[Array, ""] | bool = True,
) -> tuple[Float[Array, "M d"], Slots]:
    """One optimiser step on the rows that were hit.

    Args:
        table: [M, d]. slots: from `init_slots`. grads: hits and their factors.
        rate: scalar. step: int32, steps before this one. active: scalar bool; False leaves everything as it was.

    Returns:
        (table, slots), with rows that were not hit bit-identical.
    """
    rows, width = table.shape
    hits = sort_hits(grads.ids, rows)
    chunk = rows_within(_LIMIT_BYTES, 4 * width)
    scale = 1.0
    if options.clip_norm:
        scale = _clip(_squared_norm(grads, hits, rows, chunk), options.clip_norm)

    def apply(carry, index, sums):
        table, slots = carry
        target = jnp.where(active, index, rows)
        old = jnp.take(table, index, axis=0, mode="clip")
        held = {name: jnp.take(slot, index, axis=0, mode="clip") for name, slot in slots.items()}
        new, held = _step(options, old, held, sums * scale, rate, step)
        table = table.at[target].set(new)
        return table, {name: slot.at[target].set(held[name]) for name, slot in slots.items()}

    return _over_rows(apply, (table, slots), grads, hits, rows, chunk)


def update_dense(
    options: ValueOptions,
    table: Float[Array, "M d"],
    slots: Slots,
    grad: Float[Array, "M d"],
    rate: Float[Array, ""] | float,
    step: Int[Array, ""],
    active: Bool[Array, ""] | bool = True,
) -> tuple[Float[Array, "M d"], Slots]:
    """One Adam step on every row; arguments as in `update_rows`, `grad` is dV [M, d]."""
    if options.clip_norm:
        grad = grad * _clip(jnp.sum(jnp.square(grad)), options.clip_norm)
    new, held = _step(options, table, slots, grad, rate, step)
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), (new, held), (table, slots))


def _step(
    options: ValueOptions, old: Array, slots: Slots, grads: Array, rate: Array | float, step: Array
) -> tuple[Array, Slots]:
    count = step + 1 if options.bias_correction == "global" else None
    change, slots = row_updates.row_step(
        _RULES[options.update], slots, grads, eps=options.eps, b1=options.b1, b2=options.b2, count=count
    )
    if options.weight_decay:
        change = change + options.weight_decay * old
    return old - rate * change, slots


def _over_rows(apply: Any, carry: Any, grads: RowGrads, hits: SortedHits, rows: int, chunk: int) -> Any:
    """carry = apply(carry, row ids [c], sums [c, d]) over all rows that were hit, each once with its whole sum.

    Ids of unused places are `rows`. Hits are added in sorted order; a row that goes on in the next chunk is carried.
    """
    width = grads.g.shape[-1]
    nowhere = jnp.full(1, rows + 1, jnp.int32)  # no row, and no unused place either
    following = jnp.concatenate([hits.rows[1:], nowhere])

    def one(state, row, order, after):
        carry, open_row, open_sum = state
        read = jnp.take(grads.read, order, mode="clip")
        products = jnp.take(grads.weights, order, mode="clip")[:, None] * jnp.take(grads.g, read, axis=0, mode="clip")
        # A row left open by the chunk before goes on from its sum, so the order of additions stays that of the hits.
        products = products.at[0].add(jnp.where(open_row == row[0], open_sum, 0.0))
        ends = after != row
        place = jnp.cumsum(ends) - ends  # rows are numbered as they end
        sums = jnp.zeros((row.size, width), jnp.float32).at[place].add(products, indices_are_sorted=True)
        # The last row may be open: it gets no index and stays unwritten.
        index = jnp.full(row.size, rows, jnp.int32).at[place].min(jnp.where(ends, row, rows), indices_are_sorted=True)
        carry = apply(carry, index, sums)
        return (carry, jnp.where(ends[-1:], nowhere, row[-1:]), sums[place[-1]]), ()

    state = (carry, nowhere, jnp.empty(width, jnp.float32))
    (carry, _, _), _ = fold_rows(one, state, chunk, hits.rows, hits.order, following)
    return carry


def _squared_norm(grads: RowGrads, hits: SortedHits, rows: int, chunk: int) -> Array:
    def add(total, index, sums):
        return total + jnp.sum(jnp.where((index < rows)[:, None], jnp.square(sums), 0.0))

    return _over_rows(add, jnp.zeros(()), grads, hits, rows, chunk)


def _clip(squared: Array, limit: float) -> Array:
    return limit / jnp.maximum(jnp.sqrt(squared), limit)
