"""Losses over masked labels, computed from logits in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from recscale.models.inputs.batch import Output


def binary_cross_entropy(logits: Float[Array, "*any"], labels: Shaped[Array, "*any"]) -> Float[Array, "*any"]:
    """Elementwise logloss in nats: softplus(z) - y z, stable for any z. `labels` may be soft (probabilities)."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - labels * logits


def masked_bce(
    logits: Float[Array, "R C Y"],
    labels: Shaped[Array, "R C Y"],
    mask: Shaped[Array, "R C Y"],
    task_weights: tuple[float, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, " Y"]]:
    """Mean logloss per task over observed labels, and their weighted sum.

    Args:
        logits, labels: [R, C, Y]. mask: [R, C, Y], 0 removes a label from the mean.
        task_weights: one weight per task, default 1.

    Returns:
        (scalar loss, per-task mean [Y]). A task without a single observed label contributes 0.
    """
    seen = mask > 0
    # Blanked before the product too: NaN in the place of an unknown label would reach the gradient through 0 * NaN.
    logits, labels = jnp.where(seen, logits, 0.0), jnp.where(seen, labels, 0.0)
    each = jnp.where(seen, binary_cross_entropy(logits, labels), 0.0)
    observed = jnp.sum(seen, axis=(0, 1)).astype(jnp.float32)
    per_task = jnp.sum(each, axis=(0, 1)) / jnp.maximum(observed, 1.0)
    weights = jnp.asarray(task_weights if task_weights is not None else (1.0,) * labels.shape[-1], jnp.float32)
    return jnp.sum(per_task * weights), per_task


def training_loss(
    output: Output,
    labels: Shaped[Array, "R C Y"],
    mask: Shaped[Array, "R C Y"],
    task_weights: tuple[float, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, " Y"]]:
    """What a training step minimises, and the logloss per task [Y] of the logits themselves.

    The weighted sum of `masked_bce` over `output.loss_logits` (the logits alone if there are none), plus
    `output.losses`. Arguments as for `masked_bce`.
    """
    loss, per_task = masked_bce(output.logits, labels, mask, task_weights)
    if output.loss_logits:
        parts = output.loss_logits.values()
        loss = sum(weight * masked_bce(logits, labels, mask, task_weights)[0] for weight, logits in parts)
    return loss + sum(output.losses.values(), jnp.zeros((), jnp.float32)), per_task
