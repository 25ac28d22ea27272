"""The bound on cold items: Bayes' rule on an item's own feedback, and the closed form for items without any."""

import jax
import numpy as np
import pytest
from scipy.special import expit, logit

from recscale.scaling.data.known_truth.batches import make_batch
from recscale.scaling.data.known_truth.config import KnownTruthConfig, replace
from recscale.scaling.data.known_truth.exact import truth
from recscale.scaling.data.known_truth.expectations import divergence
from recscale.scaling.data.known_truth.item_bias import bayes_logits, fresh_excess, item_weights, rest_of_logit
from recscale.scaling.data.known_truth.world import build_world

CONFIG = KnownTruthConfig(
    b=-1.0, shares=(0.0, 0.5, 0.0, 0.5), codes="none", blocks=4, history_max=8, match_groups=1, code_width=4,
    timestamps=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return build_world(CONFIG)


@pytest.fixture(scope="module")
def drawn(world):
    """Rows of a log and of its evaluation: items, rest of the logit, noise, labels, p*, 1 - p*, z."""

    def rows(evaluation):
        batch = jax.device_get(jax.jit(lambda: make_batch(world, 3, np.int32(0), 4096, 2, evaluation))())
        found = truth(world, batch)
        columns = batch.candidates.ids["item"], rest_of_logit(found), found.noise_sd[..., 0], batch.labels[..., 0]
        return tuple(np.asarray(x).reshape(-1) for x in (*columns, found.p, found.q, found.z))

    return rows(False), rows(True)


def test_an_item_without_feedback_is_the_mean_over_scores(world, drawn):
    items, rest, sd, _, p, q, z = drawn[1]
    empty = np.zeros(0)
    weights = item_weights(world, empty.astype(int), empty, empty, empty)
    np.testing.assert_array_equal(weights, 1 / 32)
    excess = divergence(p, q, bayes_logits(world, items, rest, sd, weights))
    expected = fresh_excess(CONFIG)
    assert abs(excess.mean() - expected) < 4 * excess.std() / np.sqrt(len(excess)) + 0.02 * expected
    v = (p * q).mean()
    assert 0.8 < expected / (0.5 * v * CONFIG.c_b / 2) < 1  # the second order overstates large deficits


def test_bayes_rule_of_one_item_by_hand(world, drawn):
    items, rest, _, labels, *_ = drawn[0]
    item = items[0]
    own = np.flatnonzero(items == item)[:5]
    weights = item_weights(world, items[own], rest[own], np.zeros(5), labels[own])[item]
    chance = expit(rest[own, None] + world.bias_scores / world.scale)
    expected = np.where(labels[own, None] > 0, chance, 1 - chance).prod(axis=0)
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-9)
    table = np.zeros((CONFIG.vocabulary, 32))
    table[item] = weights
    p = weights @ expit(0.3 + world.bias_scores / world.scale)
    found = bayes_logits(world, np.array([item]), np.array([0.3]), np.array([0.0]), table)
    assert found[0] == pytest.approx(logit(p), rel=1e-9)


def test_feedback_lowers_the_excess_towards_zero(world, drawn):
    (items, rest, sd, labels, *_), (late, late_rest, late_sd, _, p, q, _) = drawn
    means = []
    for rows in (0, 500, 2000, len(items)):
        weights = item_weights(world, items[:rows], rest[:rows], sd[:rows], labels[:rows])
        means.append(divergence(p, q, bayes_logits(world, late, late_rest, late_sd, weights)).mean())
    assert means == sorted(means, reverse=True) and means[-1] < 0.4 * means[0]
    sure = np.zeros((CONFIG.vocabulary, 32))
    score = np.round((drawn[1][6] - late_rest) * world.scale).astype(int)
    sure[late, np.abs(score[:, None] - world.bias_scores).argmin(axis=1)] = 1
    assert divergence(p, q, bayes_logits(world, late, late_rest, late_sd, sure)).max() < 1e-12


def test_logs_without_it_are_refused(world):
    none = replace(CONFIG, shares=(0.0, 1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="no biases of items: give B"):
        fresh_excess(none)
    with pytest.raises(ValueError, match="feedback is 0 or 1"):
        item_weights(world, np.zeros(1, int), np.zeros(1), np.zeros(1), np.array([0.3]))
    with pytest.raises(ValueError, match="without drift and ragged"):
        fresh_excess(replace(CONFIG, ragged=True))
