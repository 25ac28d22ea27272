"""Intervals: cluster against point resampling, seed noise, profiles, jackknife, two streams."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recscale.scaling.laws import fit, forms
from recscale.scaling.laws.fitting import solver
from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.forms.metric_maps import t_to_auc
from recscale.scaling.laws.uncertainty.bootstrap import bootstrap, cluster_counts
from recscale.scaling.laws.uncertainty.curvature import groupings
from recscale.scaling.laws.uncertainty.profile import profiles

TRUE_ALPHA = 0.35


def shaped(seed, shapes=12, checkpoints=5, shape_sd=3e-4, point_sd=1e-4):
    """Shapes along N, checkpoints along D; every shape carries an effect of its own."""
    generator = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(5e7, 1.6e10, shapes), checkpoints)
    d = np.tile(np.geomspace(8e8, 3e11, checkpoints), shapes)
    y = 1.8 + 480 * n**-TRUE_ALPHA + 2100 * d**-0.37
    effect = np.repeat(generator.normal(size=shapes) * shape_sd, checkpoints) + generator.normal(size=len(n)) * point_sd
    shape = np.repeat(np.arange(shapes), checkpoints)
    return pd.DataFrame({"shape_id": shape, "N": n, "D": d, "loss": y * np.exp(effect)})


def alpha_interval(frame, codes, draws=200):
    logs = np.log(frame[["N", "D"]].to_numpy())
    form = forms.get("chinchilla")
    problem = make_problem(form, logs - logs.mean(0), frame["loss"].to_numpy())
    drawn = bootstrap(problem, solver.solve(problem), codes, draws, seed=1)
    return np.percentile(np.exp(drawn[:, form.names.index("alpha")]), [2.5, 97.5])


def test_cluster_resampling_covers_where_point_resampling_does_not():
    inside = {"cluster": 0, "point": 0}
    tables = 100
    for seed in range(tables):
        frame = shaped(seed)
        for kind, codes in (("cluster", frame["shape_id"].to_numpy()), ("point", np.arange(len(frame)))):
            low, high = alpha_interval(frame, codes)
            inside[kind] += low <= TRUE_ALPHA <= high
    assert inside["cluster"] / tables >= 0.88
    assert inside["point"] / tables <= 0.70


def test_resamples_are_integer_counts_and_repeat_with_the_seed():
    counts = cluster_counts(7, 50, np.random.default_rng(0))
    assert counts.shape == (50, 7) and np.all(counts.sum(axis=1) == 7) and counts.dtype.kind == "i"
    frame = shaped(0)
    axes = {"N": "N", "D": "D"}
    first, again = (fit(frame, "chinchilla", axes, "loss", bootstrap=100, seed=4, profile=False) for _ in range(2))
    other = fit(frame, "chinchilla", axes, "loss", bootstrap=100, seed=5, profile=False)
    assert first.bootstrap_intervals() == again.bootstrap_intervals()
    assert first.bootstrap_intervals()["alpha"] != other.bootstrap_intervals()["alpha"]


def test_warm_started_refits_agree_with_refits_to_the_last_digit():
    frame = shaped(2, point_sd=1e-3)
    logs = np.log(frame[["N", "D"]].to_numpy())
    problem = make_problem(forms.get("chinchilla"), logs - logs.mean(0), frame["loss"].to_numpy())
    solution = solver.solve(problem)
    weights = cluster_counts(12, 100, np.random.default_rng(0))[:, frame["shape_id"]].astype(float)
    starts = np.tile(solution.phi, (100, 1))
    quick = solver.refine(problem, starts, weights=weights, control=solver.WARM)
    full = solver.refine(problem, starts, weights=weights)
    spread = full.phi.std(axis=0)
    assert np.all(np.abs(quick.phi - full.phi).max(axis=0) < 0.05 * spread)


def seeded(table_seed, seeds=5):
    """Nine sizes, repeated seeds, noise of 2e-3 of the metric and nothing else."""
    generator = np.random.default_rng(table_seed)
    x = np.repeat(np.geomspace(1e4, 1e8, 9), seeds)
    clean = 0.42 + 3 * x**-TRUE_ALPHA
    loss = clean * (1 + 2e-3 * generator.standard_normal(len(x)))
    return pd.DataFrame({"shape_id": pd.factorize(x)[0], "x": x, "seed": np.tile(np.arange(seeds), 9), "loss": loss})


def test_seed_noise_is_measured_and_redrawn():
    inside = 0
    for table_seed in range(20):
        law = fit(seeded(table_seed), "power_offset", {"x": "x"}, "loss", bootstrap=100, profile=False)
        assert law.seed_noise is not None and (law.seed_noise.sizes, law.seed_noise.repeats) == (9, 45)
        assert law.seed_noise.sd(0.5) == pytest.approx(1e-3, rel=0.4)
        low, high = law.seed_intervals()["alpha"]
        inside += low <= TRUE_ALPHA <= high
    assert inside >= 16 and "seed noise unknown" not in law.warnings
    single = fit(seeded(0)[lambda t: t["seed"] == 0], "power_offset", {"x": "x"}, "loss", bootstrap=10, profile=False)
    assert single.seed_noise is None and single.seed_intervals() == {}
    assert "seed noise unknown" in single.warnings


def one_axis_groups(form, u, codes):
    return groupings(form.axes, [parameter.slots for parameter in form.parameters], u[:, None], codes)


def test_a_profile_of_independent_rows_is_the_interval_of_linear_regression():
    generator = np.random.default_rng(1)
    x = np.geomspace(1e3, 1e7, 60)
    y = 3 * x**-0.2 * np.exp(1e-2 * generator.standard_normal(60))
    form, u = forms.get("power"), np.log(x) - np.log(x).mean()
    problem = make_problem(form, u[:, None], y)
    found, squares = profiles(problem, solver.solve(problem), ["alpha"], one_axis_groups(form, u, np.arange(60)))
    line = stats.linregress(u, np.log(y))
    half = stats.t.ppf(0.975, 58) * line.stderr
    low, high = found["alpha"].interval
    assert found["alpha"].best == pytest.approx(-line.slope, rel=1e-6)
    # The widest of three variances: that of regression, and those that allow more.
    assert half <= (high - low) / 2 * 1.001 and (high - low) / 2 < 1.4 * half
    assert squares.spread.variance == pytest.approx(np.sum((np.log(y) - line.intercept - line.slope * u) ** 2) / 58)


def test_rows_of_one_cluster_are_not_counted_as_independent():
    generator = np.random.default_rng(2)
    u = np.repeat(np.linspace(-4.6, 4.6, 12), 5)
    codes = np.repeat(np.arange(12), 5)
    effect = 1e-3 * generator.standard_normal(12)[codes] + 1e-5 * generator.standard_normal(60)
    form = forms.get("power_offset")
    problem = make_problem(form, u[:, None], (0.4 + 0.1 * np.exp(-0.3 * u)) * np.exp(effect))
    solution = solver.solve(problem)
    apart, together = (
        profiles(problem, solution, ["alpha"], one_axis_groups(form, u, own))[0]["alpha"].interval
        for own in (np.arange(60), codes)
    )
    assert together[1] - together[0] > 1.8 * (apart[1] - apart[0])


def test_a_grid_has_two_groupings_and_a_ladder_one():
    form = forms.get("chinchilla")
    owners = [parameter.slots for parameter in form.parameters]
    n, d = (axis.ravel().astype(float) for axis in np.indices((7, 5)))
    shapes, amounts = groupings(form.axes, owners, np.stack([n, d], axis=1), n.astype(int))
    assert (shapes.count, amounts.count) == (7, 5) and shapes.clusters and not amounts.clusters
    of = dict(zip(form.names, zip(shapes.between, amounts.between, strict=True), strict=True))
    assert of == {
        "E": (True, True),
        "A": (True, False),
        "alpha": (True, False),
        "B": (False, True),
        "beta": (False, True),
    }
    ladder = np.stack([n, n * 0.7 + 0.01 * d], axis=1)
    assert len(groupings(form.axes, owners, ladder, n.astype(int))) == 1


def test_a_profile_point_below_the_optimum_becomes_the_optimum():
    u = np.linspace(-4.6, 4.6, 12)
    y = (0.4 + 0.1 * np.exp(-0.3 * u)) * np.exp(1e-3 * np.random.default_rng(3).standard_normal(12))
    form = forms.get("power_offset")
    problem = make_problem(form, u[:, None], y)
    right = solver.solve(problem)
    stuck = np.array([np.log(0.1), np.log(0.4), np.log(0.02)])
    lost = dataclasses.replace(right, phi=stuck, starts=solver.refine(problem, stuck[None], free=np.zeros(3)))
    groups = one_axis_groups(form, u, np.arange(12))
    (one, first), (other, second) = (profiles(problem, start, ["alpha", "E"], groups) for start in (right, lost))
    assert second.rss == pytest.approx(first.rss, rel=1e-5)
    assert other["alpha"].interval == pytest.approx(one["alpha"].interval, rel=1e-2)


def test_kappa_is_refused_where_sum_and_bottleneck_are_not_distinguished():
    generator = np.random.default_rng(0)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e7, 6), np.geomspace(1e5, 1e9, 6), indexing="ij"))
    first, second = 1 * n**-0.35, 30 * d**-0.4
    y = (0.42 + (first**8 + second**8) ** (1 / 8)) * np.exp(6e-3 * generator.standard_normal(36))
    law = fit(pd.DataFrame({"N": n, "D": d, "loss": y}), "kappa", {"N": "N", "D": "D"}, "loss", bootstrap=0)
    low, high = law.profiles["kappa"].interval
    refused = [gate for gate in law.refusals if gate.id == "shape"]
    assert (low <= 1 and high >= 20) == bool(refused)
    assert not refused or (law.params["kappa"] is None and "not distinguished" in refused[0].consequence)
    clear = (0.42 + (first**4 + second**4) ** (1 / 4)) * np.exp(1e-4 * generator.standard_normal(36))
    told = fit(pd.DataFrame({"N": n, "D": d, "loss": clear}), "kappa", {"N": "N", "D": "D"}, "loss", bootstrap=0)
    assert told.params["kappa"] == pytest.approx(4.0, rel=0.1)


def test_jackknife_names_the_shape_that_moves_the_fit():
    frame = shaped(3, point_sd=1e-4)
    frame.loc[frame["shape_id"] == 11, "loss"] *= 1.01
    squares = {"huber_delta": np.inf, "profile": False}
    law = fit(frame, "chinchilla", {"N": "N", "D": "D"}, "loss", bootstrap=20, **squares)
    assert law.jackknife["most_influential"] == "11"
    without = fit(frame[frame["shape_id"] != 11], "chinchilla", {"N": "N", "D": "D"}, "loss", bootstrap=0, **squares)
    moved = law.params["alpha"] + law.jackknife["shift"]["alpha"]
    assert moved == pytest.approx(without.params["alpha"], abs=1e-4)


def test_bands_widen_beyond_the_rows_and_noise_widens_them_further():
    frame = shaped(5, point_sd=2e-3)
    law = fit(frame, "chinchilla", {"N": "N", "D": "D"}, "loss", bootstrap=200, profile=False)
    inside, outside = {"N": 1e9, "D": 1e10}, {"N": 2e11, "D": 5e12}
    value, low, high = law.predict(inside, interval=True)
    assert low < value < high and value == law.predict(inside)
    _, far_low, far_high = law.predict(outside, interval=True)
    assert far_high - far_low > high - low
    _, noisy_low, noisy_high = law.predict(inside, interval=True, noise=True)
    assert noisy_high - noisy_low > 2 * (high - low)
    _, half_low, half_high = law.predict(inside, interval=True, level=0.5)
    assert low < half_low < half_high < high


def joint_table(loss_noise, t_noise, seed=0, count=16):
    generator = np.random.default_rng(seed)
    x = np.geomspace(1e4, 1e8, count)
    bracket = 3 * x**-0.35
    t = 1.1 - bracket + t_noise * generator.standard_normal(count)
    loss = 0.42 + 0.15 / 2 * bracket + loss_noise * generator.standard_normal(count)
    return pd.DataFrame({"dense_params": x, "logloss": loss, "auc": t_to_auc(t)})


def test_joint_form_returns_exponent_and_v_from_clean_streams():
    law = fit(joint_table(0.0, 0.0), "joint", bootstrap=0, measured_v=0.15)
    assert law.params["alpha"] == pytest.approx(0.35, abs=1e-6) and law.params["v"] == pytest.approx(0.15, abs=1e-6)
    assert not any("fitted v" in notice for notice in law.warnings)
    suspicious = fit(joint_table(0.0, 0.0), "joint", bootstrap=0, measured_v=0.08)
    assert any("1.88 times" in notice for notice in suspicious.warnings)
    assert law.predict({"x": 1e6}, stream="auc") == pytest.approx(t_to_auc(1.1 - 3 * 1e6**-0.35), abs=1e-9)


def test_noise_in_auc_alone_does_not_move_the_shared_exponent():
    quiet = joint_table(0.0, 0.0)
    exact_loss = fit(quiet.assign(auc=joint_table(0.0, 3e-2, seed=7)["auc"]), "joint", bootstrap=0)
    assert exact_loss.params["alpha"] == pytest.approx(0.35, abs=1e-6)
    # With noise in both, a very noisy AUC leaves the exponent where logloss alone puts it.
    table = joint_table(1e-5, 3e-2)
    both = fit(table, "joint", bootstrap=200, profile=False)
    alone = fit(table, "power_offset", {"x": "dense_params"}, "logloss", bootstrap=0)
    spread = np.exp(both.draws[:, both.form.names.index("alpha")]).std()
    assert abs(both.params["alpha"] - alone.params["alpha"]) < spread


def test_an_auc_law_lives_on_t_and_predicts_auc():
    frame = joint_table(0.0, 0.0)
    law = fit(frame, "auc", bootstrap=0)
    assert law.params == pytest.approx({"S": 1.1, "A": 3.0, "alpha": 0.35}, rel=1e-6)
    np.testing.assert_allclose(law.predict({"x": frame["dense_params"]}), frame["auc"], atol=1e-9)
    # The same data read as 1 - AUC with a free offset return a larger exponent, without any noise.
    wrong = fit(
        frame.assign(one_minus=1 - frame["auc"]),
        "power_offset",
        {"x": "dense_params"},
        "one_minus",
        bootstrap=0,
    )
    assert wrong.solution_params()["alpha"] > 0.36
    assert "values" in [g.id for g in fit(frame.assign(auc=0.45), "auc", bootstrap=0).refusals]
