"""Losses over masked labels, computed from logits in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from recscale.models.inputs.batch import Contrast, Output, Pairs

# A score that leaves nothing of what it stands for, without an infinity on the way.
_NOTHING = -1e30


def binary_cross_entropy(logits: Float[Array, "*any"], labels: Shaped[Array, "*any"]) -> Float[Array, "*any"]:
    """Elementwise logloss in nats: softplus(z) - y z, stable for any z. `labels` may be soft (probabilities)."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - labels * logits


def masked_bce(
    logits: Float[Array, "R C Y"],
    labels: Shaped[Array, "R C Y"],
    mask: Shaped[Array, "R C Y"],
    task_weights: tuple[float | Array, ...] | None = None,
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
    task_weights: tuple[float | Array, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, " Y"]]:
    """What a training step minimises, and the logloss per task [Y] of the logits themselves.

    The weighted sum of `masked_bce` over `output.loss_logits` (the logits alone if there are none), plus
    `output.losses`, the contrast and the pairs of the first label. Arguments as for `masked_bce`.
    """
    loss, per_task = masked_bce(output.logits, labels, mask, task_weights)
    if output.loss_logits:
        parts = output.loss_logits.values()
        loss = sum(weight * masked_bce(logits, labels, mask, task_weights)[0] for weight, logits in parts)
    if output.contrast is not None:
        clicked = (labels[..., 0] > 0.5) & (mask[..., 0] > 0)
        loss = loss + output.contrast.weight * contrastive_loss(output.contrast, clicked)
    if output.pairs is not None:
        given = output.logits[..., 0], labels[..., 0], mask[..., 0]
        loss = loss + output.pairs.weight * pair_loss(*given, output.pairs)
    return loss + sum(output.losses.values(), jnp.zeros((), jnp.float32)), per_task


def pair_loss(
    scores: Float[Array, "R C"], labels: Shaped[Array, "R C"], mask: Shaped[Array, "R C"], pairs: Pairs
) -> Float[Array, ""]:
    """Mean softplus(s_j - s_i) over candidates i that were clicked and j that were not, of one request (Bayesian
    personalised ranking); 0 without a pair."""
    seen = mask > 0
    i, j = pairs.above & seen & (labels > 0.5), pairs.below & seen & (labels < 0.5)
    both = i[:, :, None] & j[:, None, :]
    scores = jnp.where(seen, scores.astype(jnp.float32), 0.0)
    each = jax.nn.softplus(scores[:, None, :] - scores[:, :, None])
    return jnp.where(both, each, 0.0).sum() / jnp.maximum(both.sum(), 1)


def contrastive_loss(contrast: Contrast, clicked: Bool[Array, "R C"]) -> Float[Array, ""]:
    """How well each request's query picks its clicked candidates out of those of other queries (SQDC of LEMUR).

        -l[r,(r,c)] + log( exp l[r,(r,c)] + sum over negatives (r',c') of exp l[r,(r',c')] )      over clicked (r,c)

    One logsumexp per request serves all its positives, which are no negatives of each other. 0 without a positive, and
    exactly 0 for a request without negatives.
    """
    scores, negative = contrast.scores.astype(jnp.float32), contrast.negative
    if contrast.clicked_only:
        negative = negative & clicked[None]
    others = jax.nn.logsumexp(jnp.where(negative, scores, _NOTHING), axis=(1, 2))
    rows = jnp.arange(scores.shape[0])
    own = scores[rows, rows]
    each = jnp.where(clicked, jnp.logaddexp(own, others[:, None]) - own, 0.0)
    return each.sum() / (jnp.maximum(clicked.sum(), 1) if contrast.mean else 1)
