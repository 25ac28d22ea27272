"""Frontier and isoFLOP optima: against closed-form allocation, the public table of arXiv 2406.19146, and
hand-made failures.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.isoflop import frontier

TABLES = Path(__file__).parents[3] / "tables"
TRUE_EXPONENT = 0.37 / (0.35 + 0.37)


def surface(params, tokens):
    return 1.8 + 480 * params**-0.35 + 2100 * tokens**-0.37


def isoflop_table(drift=0.15, half_width=2.3, sizes=9, centre_shift=0.0):
    """Runs on the C = 6 N D lines of `surface`; the grid centre moves by `drift` in ln size per budget around
    the true optimum.
    """
    rows = []
    scale = (0.35 * 480 / (0.37 * 2100)) ** (1 / 0.72)
    for step, budget in enumerate(np.geomspace(1e18, 1e21, 7)):
        best = scale * (budget / 6) ** TRUE_EXPONENT
        centre = np.log(best) + drift * (step - 3) + centre_shift
        for params in np.exp(centre + np.linspace(-half_width, half_width, sizes)):
            rows.append(
                dict(
                    dense_params=params,
                    train_flops=budget,
                    flops_target=budget,
                    logloss=surface(params, budget / 6 / params),
                )
            )
    table = pd.DataFrame(rows)
    table["run_id"] = [f"run{i}" for i in range(len(table))]
    return table


@pytest.mark.parametrize("drift", [0.15, -0.15])
def test_drifting_grids_bias_the_parabola_and_not_akima(drift):
    found = frontier.isoflop(isoflop_table(drift))
    assert found.akima.exponent == pytest.approx(0.5139, abs=5e-4)
    assert abs(found.parabola.exponent - TRUE_EXPONENT) > 1.5e-3
    assert not found.quotable and "differ by" in found.reasons[0]
    assert found.akima.interval is None and found.akima.se_source == "regression"


def test_minimum_at_the_edge_is_rejected_with_a_reason():
    table = isoflop_table(drift=0.0)
    first = table["flops_target"].min()
    small = table[(table["flops_target"] > first) | (table["dense_params"] < 0.5 * table["dense_params"][:9].median())]
    found = frontier.isoflop(small, min_sizes=3)
    assert found.groups[0].akima is None
    assert "too near the largest size" in found.groups[0].rejected["akima"]
    assert found.akima.n_optima == 6
    everywhere = frontier.isoflop(isoflop_table(drift=0.0, centre_shift=2.2))
    assert everywhere.akima is None and not everywhere.quotable
    assert all("smallest" in g.rejected["akima"] for g in everywhere.groups)


def test_minimum_within_half_a_spacing_of_the_edge_is_rejected():
    spacing = 4.6 / 8
    for shift, accepted in [(2.3 - 0.4 * spacing, False), (2.3 - 0.7 * spacing, True)]:
        found = frontier.isoflop(isoflop_table(drift=0.0, centre_shift=shift))
        assert (found.groups[3].akima is not None) == accepted


def test_upside_down_and_short_groups_are_rejected():
    table = isoflop_table(drift=0.0)
    budgets = np.sort(table["flops_target"].unique())
    table.loc[table["flops_target"] == budgets[0], "logloss"] = (
        5 - table.loc[table["flops_target"] == budgets[0], "logloss"]
    )
    few = table[(table["flops_target"] != budgets[1]) | (np.arange(len(table)) % 3 == 0)]
    found = frontier.isoflop(few)
    assert found.groups[0].rejected["parabola"] == "curvature is not positive"
    assert found.groups[1].rejected["akima"] == "3 sizes, at least 5 needed"
    assert found.akima.n_optima == 5


def test_seed_noise_reaches_the_exponent():
    clean = isoflop_table(drift=0.0, half_width=1.5)
    exponents, intervals = [], []
    for seed in range(12):
        noisy = clean.assign(
            logloss=clean["logloss"] * (1 + 5e-4 * np.random.default_rng(seed).standard_normal(len(clean)))
        )
        found = frontier.isoflop(noisy, noise=lambda y: 5e-4 * y, draws=200, seed=seed)
        exponents.append((found.akima.exponent, found.parabola.exponent))
        intervals.append(found.akima.interval)
        assert (
            found.akima.se_source == "seed noise"
            and found.akima.interval[0] < found.akima.exponent < found.akima.interval[1]
        )
        assert all(g.akima.log_sd > 0 for g in found.groups if g.akima)
    scatter = np.std(exponents, axis=0)
    assert scatter[0] > 3 * scatter[1]  # Akima passes the noise on, the parabola averages it
    covered = np.mean([low <= TRUE_EXPONENT <= high for low, high in intervals])
    assert covered >= 0.75
    assert found.akima.se == pytest.approx(scatter[0], rel=0.6)


def test_noise_is_estimated_from_repeated_seeds():
    clean = isoflop_table(drift=0.0, half_width=1.5)
    rng = np.random.default_rng(4)
    repeats = [
        clean.assign(seed=seed, logloss=clean["logloss"] * (1 + 5e-4 * rng.standard_normal(len(clean))))
        for seed in range(4)
    ]
    found = frontier.isoflop(pd.concat(repeats, ignore_index=True), draws=300)
    assert found.settings["noise"] == "repeated seeds" and found.quotable
    assert found.akima.interval[0] < TRUE_EXPONENT < found.akima.interval[1]
    known = frontier.isoflop(pd.concat(repeats, ignore_index=True), draws=300, noise=lambda y: 5e-4 * y)
    assert found.parabola.se == pytest.approx(known.parabola.se, rel=0.3)
    single = frontier.isoflop(repeats[0])
    assert not single.quotable and any("seed noise unknown" in reason for reason in single.reasons)
    with pytest.raises(ValueError, match="'guess'"):
        frontier.isoflop(clean, noise="guess")


def test_off_budget_runs_are_moved_along_their_own_curve_or_named():
    table = isoflop_table(drift=0.0)
    off = table["train_flops"] * 1.1
    moved = table.assign(
        train_flops=off,
        logloss=surface(table["dense_params"], off / 6 / table["dense_params"]),
        decayed=True,
        seed=0,
    )
    lower = table.assign(
        train_flops=table["train_flops"] * 0.95,
        logloss=surface(table["dense_params"], table["train_flops"] * 0.95 / 6 / table["dense_params"]),
        decayed=True,
        seed=0,
        flops_target=np.nan,
        run_id=table["run_id"] + "_lower",
    )
    # The second set has no budget of its own: it takes part only as the other side of the interpolation.
    found = frontier.isoflop(pd.concat([moved, lower], ignore_index=True))
    exact = frontier.isoflop(table)
    for moved_group, exact_group in zip(found.groups, exact.groups, strict=True):
        np.testing.assert_allclose(moved_group.values, exact_group.values, rtol=1e-4)
    assert dict(found.excluded)["run0_lower"] == "flops_target is missing or not a finite number"
    alone = frontier.isoflop(moved)
    assert alone.akima is None and len(alone.excluded) == len(moved)
    assert "+10.0% off the budget" in alone.excluded[0][1]


def test_other_decay_state_is_not_used_for_interpolation():
    table = isoflop_table(drift=0.0)
    above = table.assign(train_flops=table["train_flops"] * 1.1, decayed=True)
    below = table.assign(train_flops=table["train_flops"] * 0.9, decayed=False)
    found = frontier.isoflop(pd.concat([above, below], ignore_index=True))
    assert len(found.excluded) == 2 * len(table) and found.akima is None


def test_efficient_frontier_is_the_lower_hull_of_decayed_rows():
    x = np.array([1e9, 1e10, 1e11, 1e12, 1e13])
    table = pd.DataFrame(
        {
            "run_id": list("abcdefgh"),
            "train_flops": [*x, 1e10, 1e10, 1e11],
            "logloss": [0.60, 0.50, 0.46, 0.44, 0.45, 0.55, 0.40, np.nan],
            "decayed": [True, True, True, True, True, True, False, True],
            "status": ["done"] * 7 + ["diverged"],
            "shape_id": list("stuvwxyz"),
        }
    )
    found = frontier.efficient_frontier(table)
    assert found.rows["run_id"].tolist() == ["a", "b", "c", "d"]
    assert "shape_id" in found.rows.columns
    assert dict(found.excluded) == {"g": "learning rate not decayed", "h": "status is diverged"}
    bent = table.assign(logloss=[0.60, 0.58, 0.46, 0.44, 0.45, 0.59, 0.40, np.nan])
    assert frontier.efficient_frontier(bent).rows["run_id"].tolist() == ["a", "c", "d"]
    with pytest.raises(KeyError, match="nonsense"):
        frontier.efficient_frontier(table, target="nonsense")


GOLDEN = [g for g in json.loads((TABLES / "golden.json").read_text()) if g["id"].startswith("porian")]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["id"])
def test_public_isoflop_exponents(golden):
    points = pd.read_csv(TABLES / "porian" / "isoflop_points.csv")
    for column, value in golden["select"].items():
        points = points[points[column] == value]
    found = frontier.isoflop(
        points, size="params", flops="flops", budget="flops", target="loss",
        min_sizes=3, edge_spacing=0.0, reduce="min", points_per_interval=25,
    )  # fmt: skip
    assert found.akima.n_optima == golden["expect"]["optima"]
    assert found.akima.exponent == pytest.approx(golden["expect"]["a"], abs=golden["tolerance"]["a_vs_recomputed"])
    assert found.akima.exponent == pytest.approx(golden["published"]["a"], abs=golden["tolerance"]["a_vs_published"])
    low, high = golden["published"]["ci95"]
    assert low <= found.akima.exponent <= high


@pytest.mark.parametrize(("dataset", "expected"), [("rw", 0.497), ("owt2", 0.518)])
def test_stored_optimal_pairs_give_the_tuned_exponent(dataset, expected):
    pairs = pd.read_csv(TABLES / "porian" / "optimal_pairs.csv").dropna(subset=["n_opt"])
    chosen = pairs[
        (pairs["file"] == dataset)
        & (pairs["hparams"] == "tuned")
        & (pairs["param_count"] == "standard")
        & (pairs["loss_kind"] == "val")
    ]
    slope = np.polyfit(np.log(chosen["flops"]), np.log(chosen["n_opt"]), 1)[0]
    assert slope == pytest.approx(expected, abs=1e-3)
