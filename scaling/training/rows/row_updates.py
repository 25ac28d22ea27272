"""Row-wise Adagrad and Adam for embedding tables and memory values: only the rows a batch touched are read or written.

    adagrad   s <- s + mean_w(g^2);                       row <- row - rate g / (sqrt(s) + eps)      s: one number a row
    adam      m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  t <- t + 1 (per row);
              row <- row - rate (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

Cost is O(touched rows): gathers and scatters by distinct row index into donated buffers, never an operation over the
table. Adam here is *lazy*: an untouched row keeps its moments, and bias correction counts the row's own updates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recscale.models.inputs.tables import Touched

ROW_OPTIMIZERS = ("rowwise_adagrad", "rowwise_adam")


def init_slots(kind: str, table: jax.Array) -> dict[str, jax.Array]:
    """Optimiser state of a table [V, width]: adagrad {sum [V]}; adam {mean, square [V, width], count [V]}."""
    rows = table.shape[0]
    if kind == "rowwise_adagrad":
        return {"sum": jnp.zeros(rows, jnp.float32)}
    if kind == "rowwise_adam":
        return {"mean": jnp.zeros_like(table), "square": jnp.zeros_like(table), "count": jnp.zeros(rows, jnp.int32)}
    if kind == "rowwise_sgd":
        return {}
    raise ValueError(f"training.embedding_optimizer is {kind!r}, expected one of {', '.join(ROW_OPTIMIZERS)}")


def update_rows(
    kind: str,
    table: jax.Array,
    slots: dict[str, jax.Array],
    touched: Touched,
    vectors: jax.Array,
    grads: jax.Array,
    rate: jax.Array,
    *,
    active: jax.Array | bool = True,
    eps: float = 1e-8,
    b1: float = 0.9,
    b2: float = 0.999,
) -> tuple[jax.Array, dict[str, jax.Array]]:
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
    kind: str,
    slots: dict[str, jax.Array],
    grads: jax.Array,
    *,
    eps: float = 1e-8,
    b1: float = 0.9,
    b2: float = 0.999,
    count: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
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
    raise ValueError(f"training.embedding_optimizer is {kind!r}, expected one of {', '.join(ROW_OPTIMIZERS)}")
