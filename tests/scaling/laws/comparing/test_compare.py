"""Comparisons on generated ladders with a known shift and known exponents."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling import cli
from recscale.scaling.laws import compare
from recscale.scaling.laws.comparing.compare import Comparison
from recscale.scaling.laws.comparing.compare_command import compare as compare_command
from recscale.scaling.laws.comparing.decision_accuracy import decision_accuracy, wilson_interval
from recscale.scaling.laws.comparing.pair_models import PairData, fit_pair, nesting_p_value, resampling_weights
from recscale.scaling.laws.comparing.pairing import match_clusters, paired_seeds

FLOOR, ALPHA, SHIFT = 0.42, 0.35, 1.7


def ladder(seed, difference=0.0, noise=2e-4, shapes=8, seeds=3, shift=SHIFT, decades=3.0):
    """Two matched architectures: y = .42 + .010 (x / centre)^-.35, and a shifted, possibly steeper one."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, own_shift, own_alpha in (("fast", shift, ALPHA + difference), ("slow", 1.0, ALPHA)):
        for k, x in enumerate(np.geomspace(10 ** (15 - decades / 2), 10 ** (15 + decades / 2), shapes)):
            for s in range(seeds):
                loss = FLOOR + 0.010 * (own_shift * x / 1e15) ** -own_alpha + noise * rng.standard_normal()
                rows.append(
                    dict(
                        run_id=f"{name}-{k}-{s}", architecture=name, shape_id=f"{name}-{k}", seed=s,
                        data_seed=s, status="done", train_flops=x, flops_target=x, dense_params=x**0.5,
                        logloss=loss, decayed=True, dataset="known_truth", epochs=1,
                        lr_bracketed=True, lr_trials=3,
                    )
                )  # fmt: skip
    return pd.DataFrame(rows)


def outcomes(difference, tables, bootstrap=200):
    """Shares of tables: multiplier, shift, difference covered (both floors; of those granted), steeper."""
    rows = []
    for seed in range(tables):
        found = compare(ladder(seed, difference), "fast", "slow", bootstrap=bootstrap)
        middle = next(m for m in found.multipliers if m.where == "middle")
        by_model = {d.model: d for d in found.differences}
        rows.append(
            [
                middle.interval.low <= SHIFT <= middle.interval.high,
                found.shift_interval.low <= SHIFT <= found.shift_interval.high,
                *(_covers(by_model[model].interval, difference) for model in ("exponents", "own")),
                found.steeper == "a",
            ]
        )
    granted = np.isfinite(rows).mean(axis=0)
    assert granted.min() >= 0.8
    return np.nanmean(rows, axis=0)


def _covers(interval, value):
    """NaN where no interval was granted."""
    return np.nan if interval is None else not interval.excludes(value)


def test_known_shift_and_exponents_are_covered_on_a_few_tables():
    same = outcomes(0.0, tables=5)
    assert np.all(same[:4] >= 0.6) and same[4] == 0
    assert outcomes(0.1, tables=3)[4] == 1.0


@pytest.mark.slow
def test_known_shift_and_exponents_are_covered_on_forty_tables():
    multiplier, shift, common, own, steeper = outcomes(0.0, tables=40, bootstrap=400)
    assert min(multiplier, shift, common, own) >= 0.85
    assert steeper <= 0.05
    assert outcomes(0.1, tables=40)[4] >= 0.95


@pytest.fixture(scope="module")
def steeper():
    return compare(
        ladder(0, difference=0.1, shapes=6, seeds=5),
        "fast",
        "slow",
        bootstrap=200,
        known_truth="recovery record",
    )


def test_a_steeper_architecture_gets_a_yes_with_every_item_ticked(steeper):
    assert (steeper.answer, steeper.evidence, steeper.steeper) == ("yes", "a steeper", "a")
    assert steeper.matched and steeper.level == "exponents"
    required = [item for item in steeper.checklist if item.required]
    assert len(required) == 9 and all(item.ticked for item in required)
    assert sum(d.admissible for d in steeper.differences) == 2
    assert {d.model for d in steeper.differences if not d.admissible} == {"power", "log_linear"}
    worst, middle, best = (m.multiplier for m in steeper.multipliers)
    assert worst < middle < best  # the advantage grows towards low losses


def test_a_comparison_holds_all_that_it_rests_on(steeper):
    """No field is left as it is where nothing could be compared, and the settings are those of the call."""
    nothing = Comparison("fast", "slow", "train_flops", "logloss")
    told = {f.name for f in dataclasses.fields(Comparison) if getattr(steeper, f.name) != getattr(nothing, f.name)}
    assert told == {f.name for f in dataclasses.fields(Comparison)} - {"a", "b", "axis", "target", "excluded"}
    settings = dict(steeper.settings)
    assert len(settings.pop("table_hash")) == 16 and settings == {
        "by": "architecture", "cluster": None, "match": None, "bootstrap": 200, "delta": 1e-3, "margin": 0.1,
        "paired_seeds_needed": 5, "equalised": None, "known_truth": "recovery record", "seed": 0,
    }  # fmt: skip
    assert [one.parameters for one in steeper.levels] == [3, 4, 5, 6]
    assert {gate.id: gate.passed for gate in steeper.gates} == dict.fromkeys(("span", "clusters", "convergence"), True)
    assert (
        {one.interval.kind for one in steeper.multipliers} == {"cluster bootstrap 95%"} == {steeper.shift_interval.kind}
    )
    items = {item.id: item for item in steeper.checklist}
    assert items["known_truth"].ticked and items["divergences"].detail == "fast: 0; slow: 0"
    assert steeper.settings["table_hash"] in items["attached"].detail and "gap predicted" in items["held_out"].detail


def test_without_a_bootstrap_one_cluster_is_left_out_at_a_time(steeper):
    table = ladder(0, difference=0.1, shapes=6, seeds=5)
    found = compare(table.set_axis(range(7, 67)), "fast", "slow", bootstrap=0, delta=1e6, equalised="FLOPs", seed=3)
    assert found.evidence == "undecided" and "no bootstrap interval" in found.reasons[0]
    own, other = found.differences[0], steeper.differences[0]
    assert (
        own.interval.kind == "leave-one-cluster-out range" and own.interval.low <= own.difference <= own.interval.high
    )
    assert own.difference != other.difference and own.difference == pytest.approx(other.difference, abs=0.02)
    details = {item.id: item.detail for item in found.checklist}
    assert details["difference_test"].startswith("no bootstrap") and "equalised: FLOPs" in details["counts"]


def test_the_other_way_round_is_a_no(steeper):
    turned = compare(ladder(0, difference=0.1, shapes=6, seeds=5), "slow", "fast", bootstrap=200)
    assert (turned.answer, turned.steeper) == ("no", "b")
    for forward, backward in zip(steeper.multipliers, turned.multipliers, strict=True):
        assert forward.multiplier == pytest.approx(1 / backward.multiplier, rel=1e-6)


def test_a_constant_factor_is_no_better_scaling():
    found = compare(ladder(1, shapes=6, seeds=5), "fast", "slow", bootstrap=200)
    assert (found.answer, found.evidence, found.level) == ("no", "no relevant difference", "shift")
    assert found.shift == pytest.approx(SHIFT, rel=0.05)
    assert "ruled out" in found.reasons[0]


def test_noise_free_pair_is_recovered_exactly():
    found = compare(ladder(0, difference=0.1, noise=0.0), "fast", "slow", bootstrap=20)
    for d in found.differences[:2]:
        assert d.difference == pytest.approx(0.1, abs=1e-6)
        assert (d.alpha_a, d.alpha_b) == pytest.approx((ALPHA + 0.1, ALPHA), abs=1e-6)


def test_too_much_noise_cannot_tell():
    found = compare(ladder(3, difference=0.05, noise=4e-3, shapes=6, seeds=5), "fast", "slow", bootstrap=200)
    assert found.answer == "cannot tell" and found.evidence == "undecided"
    assert "decide nothing" in found.reasons[0] or "admissible" in found.reasons[0]


@pytest.mark.parametrize(
    ("change", "item"),
    [
        (lambda t: t.drop(columns="lr_bracketed"), "learning_rate"),
        (lambda t: t.assign(lr_trials=np.where(t["architecture"] == "fast", 9, 3)), "learning_rate"),
        (lambda t: t[t["seed"] < 3], "paired_seeds"),
        (lambda t: t.assign(data_seed=t["data_seed"] + 10 * (t["architecture"] == "fast")), "data_stream"),
        (lambda t: t.rename(columns={"logloss": "my_loss"}), "primary_metric"),
        (lambda t: t[(t["seed"] < 2) | (t["train_flops"] < 3e14)], "seeds"),
    ],
)
def test_one_missing_item_withholds_the_claim(change, item):
    table = change(ladder(0, difference=0.1, shapes=6, seeds=5))
    target = "my_loss" if "my_loss" in table else "logloss"
    found = compare(table, "fast", "slow", target=target, bootstrap=100)
    assert found.evidence == "a steeper"
    assert found.answer == "cannot tell"
    ticks = {i.id: i.ticked for i in found.checklist}
    assert ticks[item] is not True
    assert len(found.reasons) >= 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t[t["train_flops"] > 1e15], "span"),
        (lambda t: t[t["shape_id"].str[-1].astype(int) < 2], "dof"),
        (lambda t: t[(t["architecture"] == "slow") | (t["status"] == "diverged")], "cannot"),
        (lambda t: t.assign(logloss=t["logloss"].where(t.index > 0)), "values"),
        (lambda t: t[t["shape_id"].str[-1] != "5"], "clusters"),
    ],
)
def test_poor_tables_are_refused_with_a_reason(change, word):
    table = change(ladder(0, difference=0.1, shapes=6, seeds=5))
    if word == "cannot":
        with pytest.raises(KeyError, match="no run of architecture 'fast'"):
            compare(table, "fast", "slow")
        return
    found = compare(table, "fast", "slow", bootstrap=50)
    assert found.answer == "cannot tell"
    assert any(word in reason for reason in found.reasons)


def test_diverged_rows_are_counted_and_named():
    table = ladder(0, shapes=6, seeds=5)
    table.loc[table["run_id"] == "fast-5-4", ["status", "logloss"]] = ["diverged", np.nan]
    found = compare(table, "fast", "slow", bootstrap=50)
    assert ("fast-5-4", "status diverged") in found.excluded
    item = next(i for i in found.checklist if i.id == "divergences")
    assert item.ticked and item.detail == "fast: 1; slow: 0"


def test_metrics_where_higher_is_better_are_refused():
    with pytest.raises(ValueError, match="higher is better"):
        compare(ladder(0).rename(columns={"logloss": "auc"}), "fast", "slow", target="auc")
    with pytest.raises(ValueError, match="itself"):
        compare(ladder(0), "fast", "fast")


def test_result_is_json(steeper):
    data = json.loads(json.dumps(steeper.to_dict()))
    assert data["answer"] == "yes" and len(data["multipliers"]) == 3
    assert (
        data["settings"]["table_hash"]
        == compare(ladder(0, 0.1, shapes=6, seeds=5), "fast", "slow", bootstrap=0).settings["table_hash"]
    )


def test_command_prints_the_answer_and_json(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    ladder(0, difference=0.1, shapes=6, seeds=5).to_csv(path, index=False)
    options = [str(path), "--a", "fast", "--b", "slow", "--bootstrap", "60"]
    shown = CliRunner().invoke(compare_command, [*options, "--json"])
    assert shown.exit_code == 0
    text, _, last = shown.output.rstrip().rpartition("\n")
    data = json.loads(last)
    assert "Does fast scale better than slow along train_flops (logloss)? yes" in text
    assert data["answer"] == "yes" and [d["model"] for d in data["differences"]][:2] == ["exponents", "own"]
    assert data["settings"]["bootstrap"] == 60
    for item in data["checklist"]:
        assert item["ticked"] in (True, False, None)
    with pytest.raises(SystemExit):
        cli.main(["compare", str(path), "--a", "quick", "--b", "slow"])
    assert capsys.readouterr().err == "Error: no run of architecture 'quick' in the table; it has: fast, slow\n"


def pair_data(table):
    is_a = (table["architecture"] == "fast").to_numpy()
    matching = match_clusters(table, is_a, table["shape_id"].to_numpy(), "train_flops")
    return PairData(
        table["train_flops"].to_numpy(), table["logloss"].to_numpy(), is_a, matching.codes, matching.matched
    )


def test_matched_resampling_moves_both_architectures_together():
    table = ladder(0)
    data = pair_data(table)
    weights = resampling_weights(data, 50, seed=1)
    assert weights.shape == (50, len(table)) and np.all(weights.sum(axis=1) == len(table))
    np.testing.assert_array_equal(weights[:, data.is_a], weights[:, ~data.is_a])
    unmatched = pair_data(table[~((table["architecture"] == "fast") & (table["shape_id"] == "fast-7"))])
    assert not unmatched.matched
    weights = resampling_weights(unmatched, 50, seed=1)
    assert np.all(weights[:, unmatched.is_a].sum(axis=1) == 21) and np.all(
        weights[:, ~unmatched.is_a].sum(axis=1) == 24
    )


def test_nested_models_fit_better_and_the_test_sees_what_is_there():
    data = pair_data(ladder(2, difference=0.1))
    fits = [fit_pair(data, model) for model in ("shared", "shift", "exponents", "own")]
    sums = [f.rss for f in fits]
    assert sums == sorted(sums, reverse=True)
    p = [nesting_p_value(small, large, data.clusters) for small, large in zip(fits, fits[1:], strict=False)]
    assert p[1] < 1e-6 and p[2] > 1e-3


def test_of_what_does_not_move_no_exponent_is_told(tmp_path):
    table = ladder(4, noise=1e-3)
    flat = table["architecture"] == "slow"
    table.loc[flat, "logloss"] = 0.43 * np.exp(2e-3 * np.random.default_rng(1).standard_normal(flat.sum()))
    found = compare(table, "fast", "slow", bootstrap=50)
    assert found.evidence == "undecided" and found.answer == "cannot tell"
    assert all(not d.admissible and "slow has no trend" in d.reason for d in found.differences)
    assert {d["alpha_b"] for d in found.to_dict()["differences"]} == {None}
    table.to_csv(tmp_path / "runs.csv", index=False)
    arguments = [str(tmp_path / "runs.csv"), "--a", "fast", "--b", "slow", "--bootstrap", "50"]
    assert "refused" in CliRunner().invoke(compare_command, arguments).output


def test_paired_differences_remove_shared_noise():
    table = ladder(0, noise=0.0, shapes=6, seeds=5)
    shared = np.random.default_rng(5).normal(0, 1e-3, (6, 5))
    private = np.random.default_rng(6).normal(0, 1e-5, len(table))
    size = table["shape_id"].str[-1].astype(int).to_numpy()
    table["logloss"] += shared[size, table["seed"]] + private
    is_a = (table["architecture"] == "fast").to_numpy()
    matching = match_clusters(table, is_a, table["shape_id"].to_numpy(), "train_flops")
    sizes, note = paired_seeds(table, is_a, matching, "logloss")
    assert len(sizes) == 6 and all(s.pairs == 5 for s in sizes) and "data_seed" in note
    assert all(s.sd_difference < 0.1 * min(s.sd_a, s.sd_b) for s in sizes)
    truth = 0.010 * (SHIFT**-ALPHA - 1) * (np.geomspace(10**13.5, 10**16.5, 6) / 1e15) ** -ALPHA
    covered = [s.interval[0] <= t <= s.interval[1] for s, t in zip(sizes, truth, strict=True)]
    assert np.mean(covered) >= 0.7
    none, why = paired_seeds(table.drop(columns="data_seed"), is_a, matching, "logloss")
    assert none == [] and "data_seed" in why


def test_wilson_interval_is_the_closed_form():
    # Newcombe (1998), 81 of 263: .2553 to .3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def crossing_settings(crossing, noise=0.0, seeds=3):
    """Five settings whose curves all meet at x = `crossing`, steeper ones starting higher, and a near copy of
    the first.
    """
    rng = np.random.default_rng(0)
    settings = [(0.05 * crossing ** (alpha - 0.2), alpha) for alpha in (0.2, 0.25, 0.3, 0.35, 0.4)] + [(0.0501, 0.2)]
    rows = []
    for i, (coefficient, alpha) in enumerate(settings):
        for x in np.geomspace(1, 1e3, 7):
            for s in range(seeds):
                loss = 0.4 + coefficient * x**-alpha + noise * rng.standard_normal()
                rows.append(dict(architecture=f"s{i}", train_flops=x, flops_target=x, seed=s, logloss=loss))
    return pd.DataFrame(rows)


def test_a_law_beats_ranking_where_curves_cross_late():
    found = decision_accuracy(crossing_settings(600))
    right = {(a.kind, a.name): (a.right, a.pairs) for a in found.accuracies}
    assert right[("form", "power_offset")] == (15, 15)
    assert right[("scale", "1")] == right[("scale", "316.2")] == (1, 15)
    assert "power_offset, 15/15) beats ranking" in found.verdict and "noise unknown" not in found.verdict


def test_pairs_within_two_paired_sds_are_listed_apart():
    found = decision_accuracy(crossing_settings(100, noise=2e-4))
    assert ("s0", "s5") in found.too_close
    law = next(a for a in found.accuracies if a.name == "power_offset")
    assert law.pairs == 15 - len(found.too_close)
    assert law.interval[0] < law.share <= law.interval[1]
    single = decision_accuracy(crossing_settings(100, seeds=1))
    assert single.too_close == [] and "seed noise unknown" in single.verdict


def test_a_law_that_does_not_beat_ranking_is_said_not_to():
    table = crossing_settings(100)
    parallel = table[table["architecture"].isin(["s0", "s5"])].copy()
    parallel = pd.concat(
        [
            parallel,
            parallel.assign(architecture=parallel["architecture"] + "x", logloss=parallel["logloss"] + 0.01),
        ]
    )
    assert "does not beat" in decision_accuracy(parallel).verdict
    with pytest.raises(ValueError, match="two settings"):
        decision_accuracy(table[table["architecture"] == "s0"])
