"""Row-wise Adagrad and Adam for embedding tables and memory values: only the rows a batch touched are read or written.

    adagrad   s <- s + mean_w(g^2);                       row <- row - rate g / (sqrt(s) + eps)      s: one number a row
    adam      m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  t <- t + 1 (per row);
              row <- row - rate (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

Cost is O(touched rows): gathers and scatters by distinct row index into donated buffers, never an operation over the
table. Adam here is *lazy*: an untouched row keeps its moments, and bias correction counts the row's own updates.

L2 is a penalty l2 / 2 |row|^2 on every row that was ever trained, in every step, outside the moments:

    row <- row exp(-rate l2 / scale)        scale: what the optimiser divides the row's gradient by

so rows rest where the penalty balances the loss. Between two batches that touch a row its scale stands still and the
factors multiply to exp(-(sum of rates) l2 / scale): paid when the row is read next, exactly what a dense update does.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from recscale.models.inputs.tables import Touched

RowOptimizer = Literal["rowwise_adagrad", "rowwise_adam", "rowwise_sgd"]

# Name -> what the optimiser keeps of a row.
Slots = dict[str, Num[Array, "*_"]]

# Of tables with L2: the sum of all rates so far (one number a table), and that sum when a row last paid, infinite for
# a row that was never trained.
_CLOCK, _PAID = "clock", "paid"


def init_slots(kind: RowOptimizer, table: Float[Array, "V width"], *, l2: bool = False) -> Slots:
    """Optimiser state of a table: adagrad {sum [V]}; adam {mean, square [V, width], count [V]}; sgd none. With `l2`
    also {paid [V], clock []}."""
    slots, rows = _moments(kind, table), table.shape[0]
    if l2:
        slots |= {_PAID: jnp.full(rows, jnp.inf, jnp.float32), _CLOCK: jnp.zeros((), jnp.float32)}
    return slots


def _moments(kind: RowOptimizer, table: Float[Array, "V width"]) -> Slots:
    rows = table.shape[0]
    if kind == "rowwise_adagrad":
        return {"sum": jnp.zeros(rows, jnp.float32)}
    if kind == "rowwise_adam":
        return {"mean": jnp.zeros_like(table), "square": jnp.zeros_like(table), "count": jnp.zeros(rows, jnp.int32)}
    return {}


def update_rows(
    kind: RowOptimizer,
    table: Float[Array, "V width"],
    slots: Slots,
    touched: Touched,
    vectors: Float[Array, "N width"],
    grads: Float[Array, "N width"],
    rate: Float[Array, ""] | float,
    *,
    active: Bool[Array, ""] | bool = True,
    l2: float = 0.0,
    eps: float = 1e-8,
    b1: float = 0.9,
    b2: float = 0.999,
) -> tuple[Float[Array, "V width"], Slots]:
    """Applies one optimiser step to the touched rows of a table.

    Args:
        table: [V, width]. slots: from `init_slots`. touched: distinct rows [N] of the batch.
        vectors: [N, width], the rows as gathered, with `l2` after `pay`. grads: [N, width], the loss's gradient with
            respect to them.
        rate: scalar learning rate. active: scalar bool; False leaves everything as it was (a diverged replica).
        l2: weight of the penalty; above 0 the slots have to be made for it.

    Returns:
        (table, slots), with untouched rows bit-identical.
    """
    write = touched.hit & active
    # Rows not to be written are sent out of range, where a scatter drops them.
    index = jnp.where(write, touched.rows, table.shape[0])
    gathered = take_slots(slots, touched)
    step, new = row_step(kind, gathered, grads, eps=eps, b1=b1, b2=b2)
    kept = {}
    if l2:
        kept = {_CLOCK: slots[_CLOCK] + jnp.where(active, rate, 0.0)}
        vectors = vectors * _kept(kind, new, rate * l2, eps, b2)
        new[_PAID] = jnp.broadcast_to(kept[_CLOCK], gathered[_PAID].shape)
    table = table.at[index].set(vectors - rate * step)
    return table, kept | {name: slots[name].at[index].set(new[name]) for name in slots if name not in kept}


def take_slots(slots: Slots, touched: Touched) -> Slots:
    """The state of the touched rows alone."""
    return {
        name: slot if name == _CLOCK else jnp.take(slot, touched.rows, axis=0, mode="clip")
        for name, slot in slots.items()
    }


def pay(
    kind: RowOptimizer, rows: Float[Array, "N width"], slots: Slots, *, l2: float, eps: float = 1e-8, b2: float = 0.999
) -> Float[Array, "N width"]:
    """Rows after what L2 takes for the steps that did not touch them; slots: theirs, see `take_slots`."""
    owed = jnp.maximum(slots[_CLOCK] - slots[_PAID], 0.0)
    return rows * _kept(kind, slots, l2 * owed[:, None], eps, b2)


def pay_all(
    kind: RowOptimizer, table: Float[Array, "V width"], slots: Slots, **options: float
) -> tuple[Float[Array, "V width"], Slots]:
    """A whole table after `pay`, as it is to be evaluated and kept, and its state, which owes nothing."""
    paid = jnp.where(jnp.isinf(slots[_PAID]), slots[_PAID], slots[_CLOCK])
    return pay(kind, table, slots, **options), slots | {_PAID: paid}


def row_step(
    kind: RowOptimizer,
    slots: Slots,
    grads: Float[Array, "N width"],
    *,
    eps: float = 1e-8,
    b1: float = 0.9,
    b2: float = 0.999,
    count: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "N width"], Slots]:
    """What to subtract, times the rate, from rows with gradients [N, width], and their new optimiser state.

    `count` is the number of updates Adam's bias correction assumes for all rows; None counts each row's own.
    """
    if kind == "rowwise_sgd":
        return grads, dict(slots)
    if kind == "rowwise_adagrad":
        new = {"sum": slots["sum"] + jnp.mean(jnp.square(grads), axis=-1)}
        return grads / _scale(kind, new, eps, b2), new
    new = {
        "mean": b1 * slots["mean"] + (1 - b1) * grads,
        "square": b2 * slots["square"] + (1 - b2) * jnp.square(grads),
    }
    if count is None:
        new["count"] = slots["count"] + 1
        times = new["count"][:, None].astype(jnp.float32)
    else:
        times = count.astype(jnp.float32)
    return (new["mean"] / (1 - b1**times)) / _adam_scale(new["square"], times, eps, b2), new


def _kept(kind: RowOptimizer, slots: Slots, weight: jax.Array | float, eps: float, b2: float) -> jax.Array:
    """What an L2 of summed `weight` leaves of rows; nothing is taken where no gradient ever came."""
    kept = jnp.exp(-weight / _scale(kind, slots, eps, b2))
    if kind == "rowwise_sgd":
        return kept
    trained = slots["sum"][:, None] > 0 if kind == "rowwise_adagrad" else slots["square"] > 0
    return jnp.where(trained, kept, 1.0)


def _scale(kind: RowOptimizer, slots: Slots, eps: float, b2: float) -> jax.Array | float:
    """What the gradients of rows are divided by: [N, 1], [N, width] or 1."""
    if kind == "rowwise_sgd":
        return 1.0
    if kind == "rowwise_adagrad":
        return jnp.sqrt(slots["sum"])[:, None] + eps
    return _adam_scale(slots["square"], jnp.maximum(slots["count"], 1)[:, None].astype(jnp.float32), eps, b2)


def _adam_scale(square: jax.Array, times: jax.Array, eps: float, b2: float) -> jax.Array:
    return jnp.sqrt(square / (1 - b2**times)) + eps
