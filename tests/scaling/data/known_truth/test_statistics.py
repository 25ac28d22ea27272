"""Statistics of drawn rows against their closed forms: moments, orthogonality, pairs, labels."""

import itertools

import jax
import numpy as np
import pytest

from recscale.scaling.data.known_truth import build_world, make_batch, preset
from recscale.scaling.data.known_truth.card import SAMPLE_ROWS
from recscale.scaling.data.known_truth.evaluate import stack_truth
from recscale.scaling.data.known_truth.exact import order_variances, part_variances, sample
from recscale.scaling.data.known_truth.logit_parts import decode, padded_words, term_values

# Every part and every kind of correlation at a quarter of the default's cost.
CHECKED = preset("base", history_max=32, quanta=512, blocks=16, clusters=32, pair_items=256)


def draw_rows(config, rows, seed=11):
    world = build_world(config)
    drawn = [sample(world, seed, index, SAMPLE_ROWS) for index in range(rows // SAMPLE_ROWS)]
    truth = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:, 0], stack_truth([row for _, row in drawn]))
    labels = np.concatenate([batch.labels for batch, _ in drawn])[:, 0]
    return world, truth, labels


@pytest.fixture(scope="module")
def drawn():
    return draw_rows(CHECKED, 2**17)


def merged(parts):
    values = {name: parts[name][:, 0] for name in ("N1", "N2", "N3", "N4", "L", "M", "B_user", "B_item")}
    return {name: value for name, value in values.items() if value.any()}


def check_moments(world, rows, tolerance):
    n = len(rows.z)
    parts = merged(rows.parts)
    exact = part_variances(world.config) | order_variances(world)
    exact |= {"B_user": exact["B"] / 2, "B_item": exact["B"] / 2}
    for name, value in parts.items():
        assert abs(value.mean()) < 4 * value.std() / np.sqrt(n), name
        slack = 2 if name in ("L", "N1", "N2", "N3", "N4") else 1  # sums of products have heavy tails
        assert value.var() == pytest.approx(exact[name], rel=slack * tolerance), name
    total = sum(parts[name] for name in ("N1", "N2", "N3", "N4"))
    assert total.var() == pytest.approx(exact["N"], rel=tolerance)
    assert rows.z[:, 0].var() == pytest.approx(sum(part_variances(world.config).values()), rel=tolerance)
    for (one, x), (other, y) in itertools.combinations(parts.items(), 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(n), (one, other)
    np.testing.assert_allclose(rows.z[:, 0] - sum(parts.values()), world.task_bias[0] / world.scale, atol=1e-9)


def test_parts_have_their_moments_and_are_uncorrelated(drawn):
    check_moments(drawn[0], drawn[1], 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "base"])
def test_parts_of_presets_at_full_size(name):
    world, rows, _ = draw_rows(preset(name), 2**19)
    check_moments(world, rows, 0.01)


def test_first_forty_terms_are_orthonormal():
    world = build_world(CHECKED)
    n = 2**16
    terms = world.terms[0]
    first = np.argsort(terms.number)[:40]
    chosen = terms.replace(field=terms.field[first], bit=terms.bit[first])
    rows = jax.jit(lambda k: decode(world, make_batch(world, 11, k, n)))(np.int32(0))
    psi = np.asarray(term_values(padded_words(rows)[..., 0], chosen), np.float64)
    assert psi.shape == (40, n)
    assert np.abs(psi.mean(axis=1)).max() < 4.5 / np.sqrt(n)
    products = psi @ psi.T / n
    assert np.abs(products - np.eye(40)).max() < 4.5 / np.sqrt(n)


def test_pairs_carry_the_signal_and_single_ids_none():
    world = build_world(CHECKED)
    n = 2**17
    batch = jax.device_get(jax.jit(lambda k: make_batch(world, 11, k, n))(np.int32(0)))
    rank = np.asarray(jax.jit(lambda batch: decode(world, batch).rank)(batch))[:, 0]
    mem_u, mem_i = batch.user.ids["mem_u"], batch.candidates.ids["mem_i"][:, 0]
    known = rank < CHECKED.pair_items
    word = world.pair_signs[mem_u // 2, np.where(known, rank, 0) // 32]
    sign = 1.0 - 2.0 * (((word >> (rank % 32).astype(np.uint32)) + mem_u + mem_i) % 2)
    for ids in (mem_u[known], mem_i[known]):
        count = np.bincount(ids)
        z = np.bincount(ids, weights=sign[known])[count >= 20] / np.sqrt(count[count >= 20])
        assert 0.85 < np.sqrt(np.mean(z**2)) < 1.15
    pair = mem_u[known] * 1000 + mem_i[known]
    for value in np.unique(pair)[:50]:
        assert np.ptp(sign[known][pair == value]) == 0
    for ranks in (1, 4, 16, 64, 256):
        mass = CHECKED.missed_mass(ranks)
        assert abs(np.mean(rank >= ranks) - mass) < 3 * np.sqrt(mass * (1 - mass) / n)
    assert (mem_i[~known] == 2 * CHECKED.pair_items).all()
    assert abs(np.mean(~known) - CHECKED.fresh_share()) < 3 * np.sqrt(CHECKED.fresh_share() / n)


def check_labels(rows, labels):
    p, y = rows.p[:, 0], labels[:, 0]
    variance = p * (1 - p)
    assert abs((y - p).sum()) < 3 * np.sqrt(variance.sum())
    for part in np.array_split(np.argsort(p), 10):
        assert abs((y - p)[part].sum()) < 4 * np.sqrt(variance[part].sum())
    assert p[y == 1].mean() > p[y == 0].mean() + 0.05


def test_labels_follow_their_probability(drawn):
    check_labels(drawn[1], drawn[2])


def test_labels_of_a_cascade_with_domains_drift_and_ragged_histories_follow_their_probability():
    variant = dict(
        ragged=True, domains=3, tasks=2, cascade=True, drift=3, drift_variance=1.0, match_groups=4, quanta=64
    )
    config = preset("base", history_max=32, blocks=16, clusters=32, pair_items=256, **variant)
    _, rows, labels = draw_rows(config, 2**15)
    check_labels(rows, labels)
    clicked = labels[:, 0] == 1
    check_labels(rows.replace(p=rows.p[clicked][:, 1:]), labels[clicked][:, 1:])
    both = (rows.p[:, 0] * rows.p[:, 1]).sum()
    assert abs(labels[:, 1].sum() - both) < 3 * np.sqrt(both)
    for task in range(2):
        exact = part_variances(config, task)
        assert rows.parts["L"][:, task].var() == pytest.approx(exact["L"], rel=0.1)
        assert rows.parts["X"][:, task].var() == pytest.approx(exact["X"], rel=0.03)
        assert rows.z[:, task].var() == pytest.approx(sum(exact.values()), rel=0.05)
    assert not rows.parts["M"][:, 1].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "base", "sparse"])
def test_labels_of_presets_follow_their_probability(name):
    _, rows, labels = draw_rows(preset(name), 2**19)
    check_labels(rows, labels)
