"""Truth, card, metrics, oracles and laws of the known-truth log."""

import itertools
import json

import jax
import numpy as np
import pytest
from scipy.special import expit

from recscale.scaling.data.known_truth import build_world, make_batch, preset
from recscale.scaling.data.known_truth.card import card
from recscale.scaling.data.known_truth.evaluate import evaluate, stack_truth
from recscale.scaling.data.known_truth.exact import oracle_logits, sample, truth
from recscale.scaling.data.known_truth.expectations import (
    divergence,
    entropy_of_both,
    entropy_of_logit,
    expected_auc,
    gaussian_constants,
    logit,
    noise_mean,
    on_grid,
    posterior,
    smoothed,
    state_weights,
    states,
)
from recscale.scaling.data.known_truth.laws import missing_quanta, predict, surface

REQUESTS, CANDIDATES, BATCHES = 4096, 4, 2


@pytest.fixture(scope="module")
def world():
    return build_world(preset("smoke"))


@pytest.fixture(scope="module")
def constants(world):
    return card(world, rows=2**17)


@pytest.fixture(scope="module")
def batches(world):
    make = jax.jit(lambda k: make_batch(world, 3, k, REQUESTS, CANDIDATES, evaluation=True))
    return [jax.device_get(make(np.uint32(k))) for k in range(BATCHES)]


@pytest.fixture(scope="module")
def rows(world, batches):
    return stack_truth([truth(world, batch) for batch in batches])


# p* and quadrature ---------------------------------------------------------------------------------------------


def test_truth_of_a_batch_equals_truth_drawn_with_it(world, batches):
    slim, drawn = sample(world, 3, 0, REQUESTS, CANDIDATES)
    jax.tree.map(np.testing.assert_array_equal, drawn, truth(world, batches[0]))
    np.testing.assert_array_equal(slim.labels, batches[0].labels)


def test_quadrature_has_converged(rows, world):
    amplitude = np.where(rows.fresh[..., None], world.pair_amplitude / world.scale, 0.0)
    p, q = smoothed(rows.z, rows.noise_sd, amplitude, nodes=81)
    assert np.abs(p - rows.p).max() < 1e-10
    assert np.abs(p + q - 1).max() < 1e-15


def test_probability_agrees_with_a_million_draws(rows, world):
    rng = np.random.default_rng(0)
    normal, coin = rng.standard_normal(10**6), rng.choice([-1.0, 1.0], 10**6)
    fresh = np.flatnonzero(rows.fresh.ravel())[:50]
    ordinary = np.flatnonzero(~rows.fresh.ravel())[:50]
    amplitude = world.pair_amplitude / world.scale
    for row in np.concatenate([fresh, ordinary]):
        shift = amplitude * coin if row in fresh else 0.0
        p = expit(rows.z.ravel()[row] + world.config.noise_variance() ** 0.5 * normal + shift)
        assert abs(p.mean() - rows.p.ravel()[row]) < 4 * p.std() / 1000


def test_spline_of_a_smooth_function_is_exact_enough():
    z = np.random.default_rng(0).normal(-1.7, 1.1, 5000)
    mean = noise_mean(entropy_of_logit, 0.45)
    assert np.abs(on_grid(mean, z) - mean(z)).max() < 1e-10


# Card ----------------------------------------------------------------------------------------------------------


def check_card(name, constants):
    config = preset(name)
    check = gaussian_constants(config.b, config.signal)
    assert abs(constants["asymptote"] - check["asymptote"]) < 1e-3
    assert abs(constants["t_asymptote"] - check["t"]) < 0.015
    assert abs(constants["v"] - check["v"]) < 1e-3
    floor = constants["entropy_floor"] - constants["asymptote"]
    unseen = constants["noise_variance"] + config.c_m * config.fresh_share()
    assert floor > 0
    assert floor == pytest.approx(0.5 * constants["v"] * unseen, rel=0.15)
    assert constants["auc_best"] < constants["auc_asymptote"]
    assert constants["standard_errors"]["entropy_floor"] < 2e-4


def test_gaussian_constants_are_the_published_check():
    for (b, s), loss, t in zip(
        ((-1.7, 1.2), (-2.0, 1.2), (-3.5, 1.2)), (0.42551, 0.37804, 0.16778), (1.013, 1.030, 1.119), strict=True
    ):
        found = gaussian_constants(b, s)
        assert found["asymptote"] == pytest.approx(loss, abs=1e-5)
        assert found["t"] == pytest.approx(t, abs=1e-3)


def test_card_agrees_with_normal_logits(constants):
    check_card("smoke", constants)
    assert constants["variance"]["total"] == pytest.approx(1.2 - constants["noise_variance"] - 0.18 * 0.1185, abs=1e-4)
    assert [p["order"] for p in constants["plateaus"]] == [1, 2, 3]
    missing = [p["missing_variance"] for p in constants["plateaus"]]
    assert missing[0] == pytest.approx(constants["variance"]["N"] - constants["variance"]["N1"])
    json.dumps(constants, allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "base", "sparse"])
def test_cards_of_presets_agree_with_normal_logits(name):
    constants = card(build_world(preset(name)), rows=2**20)
    check_card(name, constants)
    measured = {"smoke": (0.199, 0.4402, 0.736), "base": (0.162, 0.3839, 0.752), "sparse": (0.048, 0.1700, 0.763)}
    rate, floor, auc = measured[name]  # of another world of the same law
    assert constants["base_rate"] == pytest.approx(rate, abs=2e-3)
    assert constants["entropy_floor"] == pytest.approx(floor, abs=1e-3)
    assert constants["auc_best"] == pytest.approx(auc, abs=4e-3)


@pytest.mark.slow
def test_dense_card_is_exact_though_its_logits_are_not_normal():
    """Pairs of 64 signs are far from a sum of many independent parts, so only the variance is that of the check."""
    world = build_world(preset("dense_nested"))
    constants = card(world, rows=2**20)
    z = np.concatenate([sample(world, 5, index, 4096)[1].z.ravel() for index in range(128)])
    assert z.var() == pytest.approx(constants["variance"]["total"], rel=0.02)
    gap = constants["entropy_floor"] - constants["asymptote"]
    assert gap == pytest.approx(0.5 * constants["v"] * constants["noise_variance"], rel=0.05)
    assert constants["auc_best"] < constants["auc_asymptote"]


def test_control_variates_change_the_error_not_the_value(world, constants):
    drawn = [sample(world, 0xCA4D, index, 4096)[1] for index in range(16)]
    floor = entropy_of_both(np.concatenate([row.p.ravel() for row in drawn]))
    assert abs(floor.mean() - constants["entropy_floor"]) < 3 * floor.std() / np.sqrt(floor.size)
    assert constants["standard_errors"]["entropy_floor"] < 0.5 * floor.std() / np.sqrt(2**17)


def test_card_depends_on_the_world_alone_and_is_stored(world, constants, tmp_path, monkeypatch):
    assert card(world, rows=2**17) == constants
    wider = build_world(preset("smoke", embedding_width=4))
    assert card(wider, rows=2**17) == constants
    monkeypatch.setattr("recscale.scaling.data.known_truth.card._CARDS", {})
    fresh = card(world, rows=4096, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr("recscale.scaling.data.known_truth.card._CARDS", {})
    stored = json.loads(path.read_text())
    assert stored["check"] and stored["name"] == path.name
    assert card(world, rows=4096, cache_dir=tmp_path) == fresh == stored["card"]


# Metrics -------------------------------------------------------------------------------------------------------


def auc_by_pairs(score, positive, negative, groups=None):
    groups = np.zeros(len(score)) if groups is None else groups
    wins = pairs = 0.0
    for i, j in itertools.product(range(len(score)), repeat=2):
        if i != j and groups[i] == groups[j]:
            mass = positive[i] * negative[j]
            pairs += mass
            wins += mass * (1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
    return wins / pairs


def test_expected_auc_by_sorting_equals_pairs():
    rng = np.random.default_rng(1)
    p, weight = rng.uniform(0.05, 0.6, 120), rng.uniform(0.5, 1, 120)
    groups = rng.integers(0, 9, 120)
    for score in (rng.normal(size=120), rng.integers(0, 6, 120).astype(float)):
        exact = auc_by_pairs(score, weight * p, weight * (1 - p))
        assert expected_auc(score, weight * p, weight * (1 - p)) == pytest.approx(exact, abs=1e-12)
        grouped = auc_by_pairs(score, p, 1 - p, groups)
        assert expected_auc(score, p, 1 - p, groups) == pytest.approx(grouped, abs=1e-12)
    assert expected_auc(np.zeros(120), p, 1 - p) == pytest.approx(0.5, abs=1e-12)
    assert np.isnan(expected_auc(p, p, 1 - p, np.arange(120)))


def test_expected_auc_is_the_mean_over_label_draws():
    rng = np.random.default_rng(2)
    z = rng.normal(-1, 1, 500)
    p, score = expit(z), np.round(z + rng.normal(0, 1, 500), 1)
    draws = []
    for _ in range(2000):
        y = rng.random(500) < p
        order = np.argsort(score, kind="stable")
        _, inverse, count = np.unique(score[order], return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
        wins = rank[y[order]].sum() - y.sum() * (y.sum() + 1) / 2
        draws.append(wins / (y.sum() * (~y).sum()))
    assert abs(np.mean(draws) - expected_auc(score, p, 1 - p)) < 3 * np.std(draws) / np.sqrt(2000) + 0.1 / 500


def test_parts_of_the_request_are_invisible_inside_it(rows):
    groups = np.repeat(np.arange(rows.z.size // CANDIDATES), CANDIDATES)
    hidden = (rows.parts["N_request"] + rows.parts["B_user"]).ravel()
    assert hidden.std() > 0.3
    p = rows.p.ravel()
    assert expected_auc(hidden, p, 1 - p, groups) == pytest.approx(0.5, abs=1e-12)
    assert expected_auc(hidden, p, 1 - p) > 0.55
    assert expected_auc(rows.parts["B_item"].ravel(), p, 1 - p, groups) > 0.51


def report(world, batches, constants, **known):
    logits = np.stack([oracle_logits(world, batch, **known) for batch in batches])
    return evaluate(world, batches, logits, constants)


def test_knowing_everything_costs_nothing(world, batches, constants, rows):
    best = report(world, batches, constants)
    assert abs(best["excess_logloss"]) < 1e-12
    assert best["logloss"] == pytest.approx(constants["entropy_floor"], abs=1e-12)
    assert best["calibration"] == pytest.approx(1.0, abs=1e-12)
    assert best["auc"] == pytest.approx(constants["auc_best"], abs=0.006)
    assert best["gauc_weighting"].endswith("of the request")
    assert min(best["recovery"].values()) > 0.98
    assert set(best["recovery"]) == {"N1", "N2", "N3", "N4", "L", "M", "B"}
    tenths = [value for value in best["item_bias_by_popularity"] if value is not None]
    assert len(tenths) >= 5
    np.testing.assert_allclose(tenths, best["coefficients"]["B"], rtol=0.05)
    assert abs(best["excess_logloss_rare"]) < 1e-12


def test_knowing_nothing_costs_the_entropy_of_the_base_rate(world, batches, constants):
    known = dict(quanta=0, history=0, ranks=0, biases=False)
    worst = report(world, batches, constants, **known)
    assert (
        abs(worst["logloss"] - entropy_of_both(constants["base_rate"])) < 3e-3
    )  # 32,768 rows: the rate is off by 2e-3
    logits = np.stack([oracle_logits(world, batch, **known) for batch in batches])
    rate = expit(logits.ravel()[0])
    assert np.ptp(logits) < 1e-12
    assert -np.log(rate) * constants["base_rate"] - np.log1p(-rate) * (1 - constants["base_rate"]) == pytest.approx(
        float(entropy_of_both(constants["base_rate"])), abs=3e-4
    )
    assert worst["auc"] == pytest.approx(0.5, abs=1e-12)


ORACLES = {
    "terms": dict(quanta=16),
    "events": dict(history=4),
    "pairs": dict(ranks=8),
    "order": dict(orders=1),
    "no biases": dict(biases=False),
}


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_oracles_miss_what_they_should(name, world, batches, constants):
    config, known = world.config, ORACLES[name]
    found = report(world, batches, constants, **known)
    assert abs(found["observed_excess"] - found["excess_logloss"]) < 3 * found["observed_excess_se"]
    part = {"terms": "N", "order": "N", "events": "L", "pairs": "M", "no biases": "B"}[name]
    missing = {
        "terms": config.c_n * 17**-config.alpha - config.quanta_tail(),
        "order": constants["plateaus"][0]["missing_variance"],
        "events": config.c_l * 5**-config.lam - config.history_tail(),
        "pairs": config.c_m * (config.missed_mass(8) - config.fresh_share()),
        "no biases": config.c_b,
    }[name]
    assert found["excess_logloss"] == pytest.approx(0.5 * constants["v"] * missing, rel=0.12)
    # The coefficient of a part is the share of it that is known, times the shrinkage that all parts have in common.
    observable = constants["variance"][part]
    share = np.average(
        [found["coefficients"][k] for k in rows_of(part)],
        weights=[constants["variance"].get(k, 1.0) for k in rows_of(part)],
    )
    others = np.median([value for k, value in found["coefficients"].items() if k[0] != part])
    assert share / others == pytest.approx(1.0 - missing / observable, abs=0.05)
    if name == "order":
        assert found["coefficients"]["N1"] / others == pytest.approx(1.0, abs=0.05)
        assert found["recovery"]["N1"] > 0.95
        assert max(found["recovery"][k] for k in ("N2", "N3", "N4")) < 0.1
    if name == "terms":
        known = np.asarray([number <= 16 for number in world.terms[0].number])
        for order in (2, 3):
            own = np.concatenate([np.arange(g.start, g.stop) for g in world.terms[0].groups if g.order == order])
            squares = np.square(world.terms[0].coefficient[own].astype(float))
            exact = squares[known[own]].sum() / squares.sum()
            assert found["recovery"][f"N{order}"] == pytest.approx(exact, abs=0.05)
    if name == "events":
        assert min(found["recovery"][f"N{order}"] for order in range(1, 5)) > 0.9


def rows_of(part):
    return [f"N{order}" for order in range(1, 5)] if part == "N" else [part]


def test_excess_is_exact_whatever_the_scale_of_the_logits(rows):
    p, q = rows.p.ravel()[:1000], rows.q.ravel()[:1000]
    assert np.abs(divergence(p, q, logit(p, q))).max() < 1e-14
    far = divergence(p, q, np.full(1000, -800.0))
    np.testing.assert_allclose(far, 800 * p - entropy_of_both(p), rtol=1e-12)


def test_evaluation_refuses_other_shapes(world, batches, constants):
    with pytest.raises(ValueError, match="logits have shape"):
        evaluate(world, batches, np.zeros((1, 2, 3, 1)), constants)
    with pytest.raises(ValueError, match="drift"):
        oracle_logits(build_world(preset("smoke", drift=2)), batches[0])


# Laws ----------------------------------------------------------------------------------------------------------


def test_surface_is_the_sum_it_stands_for():
    grid = surface(0.35)
    assert grid.loss.shape == (11, 13)
    assert grid.quanta[0] == 30
    assert grid.quanta[-1] == 30_000
    for i, j in ((0, 0), (-1, -1)):
        n, d = int(grid.quanta[i]), float(grid.examples[j])
        k = np.arange(1, n + 1, dtype=np.longdouble)
        a2 = k**-0.35 - (k + 1) ** -0.35
        direct = 0.42 + 0.075 * (np.sum(a2 / (1 + 0.15 * d * a2)) + np.longdouble(n + 1) ** -0.35)
        assert abs(grid.loss[i, j] - float(direct)) < 1e-12


def slope(x, y):
    return -np.polyfit(np.log(x), np.log(y), 1)[0]


def effective_quanta(examples, alpha, c, v):
    """n_eff(D): more terms than this cannot be learned from D examples."""
    return (c * alpha * v * np.asarray(examples)) ** (1.0 / (1.0 + alpha))


@pytest.mark.parametrize("alpha", [0.2, 0.35, 0.5, 0.7, 1.0])
def test_edge_slopes_inside_the_windows(alpha):
    """Where capacity binds the slope is alpha, where data bind it is alpha / (1 + alpha)."""
    limit, most = 300_000, 3e14
    quanta = np.geomspace(30, effective_quanta(most, alpha, 1.0, 0.15) / 5, 40)
    quanta = quanta[quanta <= limit].astype(int)
    assert slope(quanta + 1.0, missing_quanta(quanta, most, alpha, 1.0, 0.15)) == pytest.approx(alpha, abs=0.005)
    examples = np.geomspace(1e-2, 1e16, 400)
    inside = effective_quanta(examples, alpha, 1.0, 0.15)
    examples = examples[(inside >= 5) & (inside <= limit / 5)]
    found = slope(examples, missing_quanta(limit, examples, alpha, 1.0, 0.15))
    assert found == pytest.approx(alpha / (1 + alpha), abs=0.005)


def test_wider_windows_test_the_window():
    quanta = np.unique(np.geomspace(30, 3e4, 11).astype(int))
    assert slope(quanta + 1.0, missing_quanta(quanta, 3e8, 0.7, 1.0, 0.15)) == pytest.approx(0.651, abs=0.01)


def test_prediction_agrees_with_oracles_and_with_its_limits(world, batches, constants):
    predicted = predict(world, quanta=16, constants=constants, exact=True)
    found = report(world, batches, constants, quanta=16)
    assert found["logloss"] == pytest.approx(float(predicted), abs=6e-4)
    everything = predict(world, quanta=np.inf, history_length=np.inf, ranks=np.inf, constants=constants)
    assert everything == pytest.approx(constants["asymptote"], abs=1e-12)
    assert predict(world, constants=constants, exact=True) == pytest.approx(constants["entropy_floor"], abs=2e-4)
    curve = predict(world, quanta=[[4], [16]], examples=[1e3, 1e5, np.inf], constants=constants)
    assert curve.shape == (2, 3)
    assert (np.diff(curve, axis=1) < 0).all()
    assert (np.diff(curve, axis=0) < 0).all()
    stored = predict(world, pairs=4 * world.config.clusters * 8.0, constants=constants)
    assert stored == predict(world, ranks=8.0, constants=constants)
    with pytest.raises(ValueError, match="pairs or ranks"):
        predict(world, pairs=1, ranks=1, constants=constants)


def test_prediction_of_ragged_histories_counts_what_they_hold():
    world = build_world(preset("smoke", ragged=True))
    constants = {"asymptote": 0.4, "v": 0.1}
    loss = predict(world, history_length=[4, 32], constants=constants)
    missing = world.config.missing_history([4, 32])
    np.testing.assert_allclose(loss[0] - loss[1], 0.05 * (missing[0] - missing[1]), rtol=1e-9)
    for overrides in (dict(ragged=True), dict(domains=3), dict(tasks=2), dict(drift=1)):
        with pytest.raises(ValueError, match="exact prediction covers"):
            predict(build_world(preset("smoke", **overrides)), constants=constants, exact=True)


def test_pairs_are_two_points_and_not_a_normal():
    """Where a pair is unknown the best prediction of a log of pairs alone is 1/2; where it is known, sigmoid(+-m)."""
    pairs = dict(shares=(0.0, 0.0, 1.0, 0.0), b=0.0, signal=4.0, clusters=4, pair_items=256)
    world = build_world(preset("memory", **pairs))
    p = 1 / (1 + np.exp(-2.0))
    known = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    constants = {"asymptote": known, "v": p * (1 - p)}
    stored = np.asarray([16, 256, 4096])
    missed = world.config.missed_mass(stored / 16)
    found = predict(world, pairs=stored, constants=constants, exact=True)
    np.testing.assert_allclose(found, known + missed * (np.log(2) - known), atol=1e-9)

    # Pairs alike: what is missed falls linearly, none is fresh, and every rank has the same share of 2^32 words.
    world = build_world(preset("memory", a=0.0, **pairs))
    np.testing.assert_allclose(world.config.missed_mass([0, 64, 256, 300]), [1, 0.75, 0, 0])
    assert world.config.fresh_share() == 0.0
    np.testing.assert_array_equal(np.diff(world.rank_threshold[:-1].astype(np.int64)), 2**24)
    found = predict(world, pairs=1024, constants=constants, exact=True)
    assert float(found) == pytest.approx(known + 0.75 * (np.log(2) - known), abs=1e-9)

    # Beside a normal part, half of it unknown: against draws.
    config = preset("memory", shares=(0.5, 0.0, 0.5, 0.0), b=-1.0, signal=2.0)
    points, rng = np.polynomial.hermite_e.hermegauss(61), np.random.default_rng(0)
    z = config.b + rng.standard_normal(200_000) + rng.choice([-1.0, 1.0], 200_000)

    def entropy_without(spread, coin):
        """Mean entropy of what is left of z if a normal of that variance and, of all rows, the pair are unknown."""
        rest = config.b + (1.0 - spread) ** 0.5 * rng.standard_normal(200_000)
        shifts = (-1.0, 1.0) if coin else (rng.choice([-1.0, 1.0], 200_000),)
        weights = points[1] / points[1].sum()
        p = np.mean(
            [1 / (1 + np.exp(-(rest + c)[:, None] - spread**0.5 * points[0])) @ weights for c in shifts], axis=0
        )
        return float(np.mean(-(p * np.log(p) + (1 - p) * np.log(1 - p))))

    everything = float(np.mean(np.logaddexp(0, -z) / (1 + np.exp(-z)) + np.logaddexp(0, z) / (1 + np.exp(z))))
    spread = float(missing_quanta(8, np.inf, config.alpha, config.c_n, 0.15))
    world, missed = build_world(config), float(config.missed_mass(2.0))
    expected = (1 - missed) * entropy_without(spread, False) + missed * entropy_without(spread, True)
    found = predict(world, quanta=8, ranks=2.0, constants={"asymptote": everything, "v": 0.15}, exact=True)
    assert float(found) == pytest.approx(expected, abs=2e-3)


# Drift ---------------------------------------------------------------------------------------------------------


def test_drift_posterior_equals_enumeration_of_all_paths():
    rng = np.random.default_rng(3)
    events, r = 6, 2
    refresh, flip = np.array([0.2, 0.05]), np.array([0.3, 0.15])
    observed = rng.choice([-1, 1], (5, events, r))
    length = np.array([6, 6, 3, 1, 0])
    found = posterior(observed, length, refresh, flip)
    for row in range(5):
        seen = observed[row, : length[row]]  # newest first
        mass = {signs: 0.0 for signs in itertools.product((-1, 1), repeat=r)}
        for path in itertools.product(itertools.product((-1, 1), repeat=events), repeat=r):
            weight = 1.0
            for i in range(r):
                chain = path[i][::-1]  # oldest first
                weight *= 0.5
                for before, after in itertools.pairwise(chain):
                    weight *= refresh[i] / 2 + (1 - refresh[i]) * (before == after)
                for event in range(len(seen)):
                    weight *= 1 - flip[i] if seen[event, i] == path[i][event] else flip[i]
            mass[tuple(path[i][0] for i in range(r))] += weight
        total = sum(mass.values())
        for i in range(r):
            up = sum(value for signs, value in mass.items() if signs[i] == 1) / total
            assert found[row, i] == pytest.approx(up, abs=1e-12)
        weights = state_weights(found[row : row + 1])[0]
        joint = [mass[tuple(int(s) for s in signs)] / total for signs in states(r)]
        np.testing.assert_allclose(weights, joint, atol=1e-12)
