"""One step on a batch in parts: gradients are summed over micro-batches, so that activations are those of one part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recscale.models.inputs import Batch
from recscale.models.inputs.tables import Touched


def check_parts(parts: int, rows: bool) -> None:
    """Raises ValueError if a model cannot train on parts of a batch. rows: it has memory values that train by rows."""
    if parts > 1 and rows:
        raise ValueError(
            f"training.accumulate is {parts}, which does not go with memory values that train by rows "
            "(training.value_update=dense_adam would do): set it to 1"
        )


def in_parts(
    graded: Callable[..., Any],
    parts: int,
    arguments: tuple[Any, ...],
    other: Any,
    seed: jax.Array,
    step: jax.Array,
    batch: Batch,
    touched: Mapping[str, Touched],
) -> Any:
    """What `graded` gives of a whole batch, from its parts, up to the order of sums; what a model computes over a batch
    (balance losses, negatives of other requests) it computes over a part.

    Part i holds requests i, i + parts, ...: on a mesh every device keeps its own. The other variables of a model go
    from part to part.

    Args:
        graded: (*arguments, other, seed, step, batch, touched, shares) -> ((loss [P], (other, metrics, reads,
            pending)), gradients), P replicas. shares: [Y], a part's labels over those of a mean part.
        parts: divides the requests of the batch.

    Raises:
        ValueError: the model has something to settle after each step.
    """

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 1, 0)

    mask = split(batch.label_mask * batch.valid[..., None])
    labels = mask.sum(axis=(1, 2))
    shares = parts * labels / jnp.maximum(labels.sum(axis=0), 1)
    positions = {name: jax.tree.map(split, rows.positions) for name, rows in touched.items()}
    given = (jnp.arange(parts), jax.tree.map(split, batch), positions, shares)

    def of_part(other: Any, given: Any) -> Any:
        number, batch, positions, shares = given
        own = {name: dataclasses.replace(rows, positions=positions[name]) for name, rows in touched.items()}
        (loss, (other, metrics, _, pending)), grads = graded(
            *arguments, other, seed, step * parts + number, batch, own, shares
        )
        if pending is not None:
            raise ValueError(
                f"training.accumulate is {parts}, but the model writes a bank after each step: set it to 1"
            )
        return other, (loss, grads), metrics

    def add(carry: Any, given: Any) -> Any:
        other, total = carry
        other, found, metrics = of_part(other, given)
        return (other, jax.tree.map(jnp.add, total, found)), metrics

    _, shapes, _ = jax.eval_shape(of_part, other, jax.tree.map(lambda array: array[0], given))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (other, total), metrics = jax.lax.scan(add, (other, zeros), given)
    loss, grads = jax.tree.map(lambda value: value / parts, total)
    return (loss, (other, _whole(metrics), {}, None)), grads


def _whole(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a batch from those of its parts [parts, P, ...]."""
    rows = metrics["rows"].sum(axis=0)
    means = {
        name: (metrics[name] * metrics["rows"]).sum(axis=0) / jnp.maximum(rows, 1)
        for name in ("logloss", "prediction", "label")
    }
    stats = jax.tree.map(lambda values: values.mean(axis=0), metrics["stats"])
    return {**means, "rows": rows, "stats": stats}
