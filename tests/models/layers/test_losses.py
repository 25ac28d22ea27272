"""Losses over masked labels, by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.inputs.batch import Contrast, Output, Pairs
from recscale.models.layers.losses import masked_bce, training_loss

R, C, Y = 3, 2, 2


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((R, C, Y))
    labels = rng.integers(0, 2, (R, C, Y)).astype(np.float64)
    mask = np.ones((R, C, Y))
    mask[0, 1], mask[2, 0, 1] = 0, 0
    return logits, labels, mask


def by_hand(logits, labels, mask):
    p = 1 / (1 + np.exp(-logits))
    each = -labels * np.log(p) - (1 - labels) * np.log(1 - p)
    return (each * mask).sum((0, 1)) / np.maximum(mask.sum((0, 1)), 1)


def test_mean_over_observed_labels_per_task_and_their_weighted_sum(case):
    expected = by_hand(*case)
    total, per_task = masked_bce(*map(jnp.asarray, case))
    np.testing.assert_allclose(per_task, expected, rtol=1e-6)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    weighted = masked_bce(*map(jnp.asarray, case), task_weights=(0.25, 2.0))[0]
    np.testing.assert_allclose(weighted, 0.25 * expected[0] + 2 * expected[1], rtol=1e-6)


def test_a_task_without_a_label_adds_nothing(case):
    logits, labels, mask = case
    mask[..., 1] = 0
    total, per_task = masked_bce(*map(jnp.asarray, (logits, labels, mask)))
    assert float(per_task[1]) == 0.0 and float(total) == float(per_task[0])
    grad = jax.grad(lambda z: masked_bce(z, jnp.asarray(labels), jnp.asarray(mask))[0])(jnp.asarray(logits))
    assert (np.asarray(grad)[..., 1] == 0).all() and (np.asarray(grad)[1:, :, 0] != 0).all()


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_what_stands_in_an_unobserved_place_reaches_neither_loss_nor_gradient(case, junk):
    logits, labels, mask = case

    def run(logits, labels):
        loss = lambda z: masked_bce(z, jnp.asarray(labels), jnp.asarray(mask))[0]  # noqa: E731
        return jax.value_and_grad(loss)(jnp.asarray(logits))

    expected = run(logits, labels)
    found = run(np.where(mask > 0, logits, junk), np.where(mask > 0, labels, junk))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_training_loss_weighs_other_logits_and_adds_named_losses(case):
    logits, labels, mask = map(jnp.asarray, case)
    plain = Output(logits=logits, losses={"penalty": jnp.float32(0.5)})
    expected = by_hand(*case)
    loss, per_task = training_loss(plain, labels, mask)
    np.testing.assert_allclose([loss, *per_task], [expected.sum() + 0.5, *expected], rtol=1e-6)
    two = plain.replace(loss_logits={"a": (0.5, logits), "b": (2.0, -logits)})
    other = by_hand(-case[0], *case[1:]).sum()
    loss, per_task = training_loss(two, labels, mask, task_weights=(1.0, 1.0))
    np.testing.assert_allclose(loss, 0.5 * expected.sum() + 2 * other + 0.5, rtol=1e-6)
    np.testing.assert_allclose(per_task, expected, rtol=1e-6)  # of the logits themselves


@pytest.fixture
def clicks():
    """Logits, labels and mask of four candidates; which are clicked, and which are known not to be."""
    rng = np.random.default_rng(1)
    logits, labels = rng.standard_normal((R, 4, 1)), rng.integers(0, 2, (R, 4, 1))
    labels[:2, 0], labels[:2, 1] = 1, 0
    mask = np.ones((R, 4, 1))
    mask[0, 2:], mask[2, 1] = 0, 0
    seen = mask[..., 0] > 0
    return logits, labels, mask, seen & (labels[..., 0] == 1), seen & (labels[..., 0] == 0)


def test_pairs_put_clicked_candidates_above_others(clicks):
    """The mean of softplus(s_j - s_i) over pairs of one request whose labels are known."""
    logits, labels, mask, clicked, other = clicks
    above, below = np.ones((R, 4), bool), np.ones((R, 4), bool)
    above[0, 1], below[1, 3] = False, False
    output = Output(logits=jnp.asarray(logits), pairs=Pairs(jnp.asarray(above), jnp.asarray(below), weight=0.7))
    each = [
        np.log1p(np.exp(logits[r, j, 0] - logits[r, i, 0]))
        for r, i, j in np.ndindex(R, 4, 4)
        if above[r, i] and clicked[r, i] and below[r, j] and other[r, j]
    ]
    assert len(each) > 3
    expected = by_hand(logits, labels, mask).sum() + 0.7 * np.mean(each)
    np.testing.assert_allclose(training_loss(output, *map(jnp.asarray, (labels, mask)))[0], expected, rtol=1e-6)
    none = output.replace(pairs=output.pairs.replace(above=jnp.zeros((R, 4), bool)))
    found = training_loss(none, *map(jnp.asarray, (labels, mask)))[0]
    np.testing.assert_allclose(found, by_hand(logits, labels, mask).sum(), rtol=1e-6)


@pytest.mark.parametrize("clicked_only, mean", [(False, True), (True, False)])
def test_a_contrast_picks_clicked_candidates_out_of_others(clicks, clicked_only, mean):
    """-log of a clicked candidate's share among itself and the negatives, for its own request's query."""
    logits, labels, mask, clicked, _ = clicks
    scores = np.random.default_rng(2).standard_normal((R, R, 4))
    negative = np.broadcast_to(~np.eye(R, dtype=bool)[..., None], (R, R, 4)).copy()
    negative[1, 0, 0] = False
    contrast = Contrast(jnp.asarray(scores), jnp.asarray(negative), 0.3, clicked_only=clicked_only, mean=mean)
    total = 0.0
    for r, c in zip(*np.nonzero(clicked), strict=True):
        against = np.exp(scores[r][negative[r] & (clicked if clicked_only else True)]).sum()
        total -= np.log(np.exp(scores[r, r, c]) / (np.exp(scores[r, r, c]) + against))
    expected = by_hand(logits, labels, mask).sum() + 0.3 * total / (clicked.sum() if mean else 1)
    output = Output(logits=jnp.asarray(logits), contrast=contrast)
    np.testing.assert_allclose(training_loss(output, *map(jnp.asarray, (labels, mask)))[0], expected, rtol=1e-5)
