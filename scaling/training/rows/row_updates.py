"""Row-wise Adagrad and Adam for embedding tables and memory values: only the rows a batch touched are read or written.

    adagrad   s <- s + mean_w(g^2);                       row <- row - rate g / (sqrt(s) + eps)      s: one number a row
    adam      m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  t <- t + 1 (per row);
              row <- row - rate (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

Cost is O(touched rows): gathers and scatters by distinct row index into donated buffers, never an operation over the
table. Adam here is *lazy*: an untouched row keeps its moments, and bias correction counts the row's own updates.
"""

from __future__ import annotations

from typing import Literal, assert_never

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from recscale.models.inputs.tables import Touched

RowOptimizer = Literal["rowwise_adagrad", "rowwise_adam", "rowwise_sgd"]

# Name -> what the optimiser keeps of a row.
Slots = dict[str, Num[Array, " rows *_"]]


def init_slots(kind: RowOptimizer, table: Float[Array, "V width"]) -> Slots:
    """Optimiser state of a table: adagrad {sum [V]}; adam {mean, square [V, width], count [V]}; sgd none."""
    rows = table.shape[0]
    if kind == "rowwise_adagrad":
        return {"sum": jnp.zeros(rows, jnp.float32)}
    if kind == "rowwise_adam":
        return {"mean": jnp.zeros_like(table), "square": jnp.zeros_like(table), "count": jnp.zeros(rows, jnp.int32)}
    if kind == "rowwise_sgd":
        return {}
    assert_never(kind)


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
    eps: float = 1e-8,
    b1: float = 0.9,
    b2: float = 0.999,
) -> tuple[Float[Array, "V width"], Slots]:
    """Applies one optimiser step to the touched rows of a table.

    Args:
        table: [V, width]. slots: from `init_slots`. touched: distinct rows [N] of the batch.
        vectors: [N, width], the rows as gathered. grads: [N, width], the loss's gradient with respect to them.
        rate: scalar learning rate. active: scalar bool; False leaves everything as it was (a diverged replica).

    Returns:
        (table, slots), with untouched rows bit-identical.
    """
    write = touched.hit & active
    # Rows not to be written are sent out of range, where a dropping scatter ignores them.
    index = jnp.where(write, touched.rows, table.shape[0])
    gathered = {name: jnp.take(slot, touched.rows, axis=0, mode="clip") for name, slot in slots.items()}
    step, new = row_step(kind, gathered, grads, eps=eps, b1=b1, b2=b2)
    table = table.at[index].set(vectors - rate * step, mode="drop")
    slots = {name: slot.at[index].set(new[name], mode="drop") for name, slot in slots.items()}
    return table, slots


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
        return grads, slots
    if kind == "rowwise_adagrad":
        new = {"sum": slots["sum"] + jnp.mean(jnp.square(grads), axis=-1)}
        return grads / (jnp.sqrt(new["sum"])[:, None] + eps), new
    if kind == "rowwise_adam":
        new = {
            "mean": b1 * slots["mean"] + (1 - b1) * grads,
            "square": b2 * slots["square"] + (1 - b2) * jnp.square(grads),
        }
        if count is None:
            new["count"] = slots["count"] + 1
            times = new["count"][:, None].astype(jnp.float32)
        else:
            times = count.astype(jnp.float32)
        return (new["mean"] / (1 - b1**times)) / (jnp.sqrt(new["square"] / (1 - b2**times)) + eps), new
    assert_never(kind)
