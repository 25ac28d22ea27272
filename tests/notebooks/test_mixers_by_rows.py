"""The study over sizes and rows: rates, forecast and note say what the committed tables hold."""

import json
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from committed_runs import RUNS, notes

from recscale.scaling.laws import fit
from recscale.scaling.laws.forecasting.forecast_command import forecast
from recscale.scaling.laws.isoflop.allocation import per_unit_of, splits
from recscale.scaling.laws.judgement.specification import FORMS
from recscale.scaling.records.number_text import amount
from recscale.sweeps import quickstart
from recscale.sweeps.mixers import mixers_by_rows, mixers_by_rows_check, mixers_by_rows_most, mixers_by_rows_rates

ROOT = Path(__file__).parents[2]
WORDS = {"rankmixer": "RankMixer", "dlrm_mlp": "DLRM-MLP"}
FORECASTS = json.loads((RUNS / "forecast.json").read_text(encoding="utf-8"))


def vertices(name, rows):
    """(architecture, dense parameters) -> the rate at the vertex of a parabola through the logarithms of three."""
    runs = pd.read_parquet(RUNS / f"{name}.parquet")
    runs = runs[(runs["examples"] / rows).between(0.99, 1.01)]
    found = {}
    for shape, rows in runs.groupby(["architecture", "dense_params"]):
        rates, excess = np.log(rows["lr_dense"]), np.log(rows["logloss"] - rows["asymptote"])
        bend, slope, _ = np.polyfit(rates, excess, 2)
        assert len(rows) == quickstart.TRIALS and bend > 0
        found[shape] = float(np.exp(-slope / bend / 2))
    return found


def test_rates_fall_with_rows_as_two_searches_say():
    least, searched = mixers_by_rows_rates.get_config().training.examples, mixers_by_rows.SEARCHED_ROWS
    few, many = vertices("mixers_by_rows_rates", least), vertices("quickstart_rates", searched)
    fewer = searched / least
    for name, exponent in mixers_by_rows.RATE_EXPONENT.items():
        found = [np.log(few[shape] / many[shape]) / np.log(fewer) for shape in many if shape[0] == name]
        assert len(found) == len(quickstart.LADDER) and np.mean(found) == pytest.approx(exponent, abs=0.05)
        (large,) = [rate for (architecture, size), rate in few.items() if architecture == name and size > 4e5]
        assert float(f"{large:.2g}") == mixers_by_rows_check.RATES[name]


def test_rates_with_most_rows_are_the_best_of_those_tried():
    table = pd.read_parquet(RUNS / "mixers_by_rows_rates.parquet")
    table = table[table["examples"] == mixers_by_rows_most.ROWS]
    assert table["lr_bracketed"].all()
    best = table.loc[table.groupby(["architecture", "dense_params"])["logloss"].idxmin()]
    excess, above = table["logloss"] - table["asymptote"], []
    for name, rates in mixers_by_rows_most.RATES.items():
        own = best[best["architecture"] == name].sort_values("dense_params")
        assert list(own["lr_dense"]) == list(rates.values())
        for size, params in zip(rates, own["dense_params"], strict=True):
            shape = (table["architecture"] == name) & (table["dense_params"] == params)
            rule = mixers_by_rows.with_rows(
                [one for one in quickstart.shapes(size) if one["architecture"] == name],
                mixers_by_rows_most.ROWS,
                mixers_by_rows.SEARCHED_ROWS,
                "",
            )[0]["training.lr"]
            above.append(float(excess[shape & (table["lr_dense"] == rule)].iloc[0] / excess[shape].min()) - 1)
    assert f"{max(above):.2f}" == "0.13"


def test_what_the_note_says_of_the_most_rows():
    runs = over_asymptote().query("architecture == 'rankmixer' and examples > 2e6")
    means = runs.groupby(["match_id", "examples"])["excess"].mean().unstack()
    less = 1 - means[mixers_by_rows_most.ROWS] / means.drop(columns=mixers_by_rows_most.ROWS).iloc[:, 0]
    assert [f"{less[size]:.2f}" for size in ("2.7e3", "1.15e5")] == ["0.04", "0.64"]
    assert f"{1e3 * means[mixers_by_rows_most.ROWS]['1.15e5']:.3f}" == "0.110"


def test_the_table_holds_the_runs_of_the_quickstart_too():
    runs = pd.read_parquet(RUNS / "mixers_by_rows.parquet")
    own = runs[runs["sweep"] == "mixers_by_rows"]
    assert len(own) == len(mixers_by_rows.get_sweep()) and (runs["status"] == "done").all()
    assert not own["lr_bracketed"].any() and runs["run_id"].is_unique
    for name in ("quickstart", "quickstart_more_rows"):
        other = pd.read_parquet(RUNS / f"{name}.parquet").set_index("run_id")["logloss"]
        pd.testing.assert_series_equal(runs.set_index("run_id")["logloss"][other.index], other)
    most = pd.read_parquet(RUNS / "mixers_by_rows_most.parquet")
    assert len(most) == len(mixers_by_rows_most.get_sweep()) and (most["status"] == "done").all()


def numbers(row):
    """Prediction, interval and widened interval, as the page has them: excess times 1,000, or loss."""
    scale, digits = (1e3, 3) if "--over" in row["command"] else (1, 5)

    def text(name):
        return f"{scale * row[name]:.{digits}f}"

    wide = "" if row["wide_low"] is None else f"[{text('wide_low')}, {text('wide_high')}]"
    cells = [WORDS[row["architecture"]], row["by"], text("predicted"), f"[{text('low')}, {text('high')}]", wide]
    return "| " + " | ".join(cells) + " |"


def test_the_page_of_the_forecast_has_its_numbers_and_commands():
    page = (RUNS / "forecast.md").read_text(encoding="utf-8")
    for row in FORECASTS:
        assert numbers(row) in page and row["command"] in page


@pytest.mark.slow
@pytest.mark.parametrize("row", FORECASTS, ids=lambda row: f"{row['architecture']}, {row['by']}")
def test_the_command_makes_the_forecast(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(forecast, [*shlex.split(row["command"])[2:], "--json"])
    assert done.exit_code == 0, done.output
    (point,) = json.loads(done.output.splitlines()[-1])["points"]
    for name in ("predicted", "low", "high", "wide_low", "wide_high"):
        assert row[name] == (None if point[name] is None else pytest.approx(point[name], rel=0.03))


@pytest.mark.slow
def test_the_page_says_what_the_gates_grant():
    """Of the excess all joint forms; of the loss, with the asymptote given, only the MLP's."""
    runs = pd.read_parquet(RUNS / "mixers_by_rows.parquet")
    axes = {"N": "dense_params", "D": "examples"}
    for name, granted in {"rankmixer": False, "dlrm_mlp": True}.items():
        own = runs[runs["architecture"] == name].assign(excess=lambda rows: rows["logloss"] - rows["asymptote"])
        for form in FORMS[2]:
            law = fit(own, form, axes, "excess", bootstrap=300, fixed={"E": 0.0}, profile=False)
            assert {gate.id for gate in law.refusals} == {"tuning"}, (name, form)
        law = fit(own, "kappa", axes, bootstrap=200, fixed={"E": "@asymptote"})
        assert law.granted == granted


def excess_lines():
    """Mean excess over the asymptote times 1,000 of every size and number of rows, RankMixer / MLP."""
    runs = over_asymptote()
    excess = 1e3 * runs["excess"]
    means = excess.groupby([runs["match_id"], runs["examples"].round(-3), runs["architecture"]]).mean()
    rows = sorted(means.index.unique(1))
    lines = ["| rows | " + " | ".join(amount(each) for each in rows) + " |", "|---" * (1 + len(rows)) + "|"]
    for size in quickstart.LADDER:
        cells = [" / ".join(f"{means[size, each, name]:.2f}" for name in WORDS) for each in rows]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return lines


def checked():
    """The runs of the check: a line a seed, a column an architecture, of one of their figures."""
    runs = pd.read_parquet(RUNS / "mixers_by_rows_check.parquet")
    assert len(runs) == len(mixers_by_rows_check.get_sweep()) and (runs["status"] == "done").all()
    return runs.pivot(index="seed", columns="architecture")


def outcome_lines():
    """What the mean over the check's seeds says of every forecast, and any seed that says otherwise."""
    losses, excess = checked()["logloss"], checked()["logloss"] - checked()["asymptote"]
    lines = ["| | by | mean | each seed | in 95 % | in the widened |", "|---|---|---|---|---|---|"]
    for row in FORECASTS:
        over = "--over" in row["command"]
        each = (excess if over else losses)[row["architecture"]]
        mean, *rest = (f"{1e3 * loss:.3f}" if over else f"{loss:.5f}" for loss in (each.mean(), *each))
        ends = [(row["low"], row["high"]), (row["wide_low"], row["wide_high"])]
        told = []
        for low, high in ends:
            inside = (
                [] if low is None else ["inside" if low <= loss <= high else "outside" for loss in (each.mean(), *each)]
            )
            other = "".join(f", seed {seed} {one}" for seed, one in enumerate(inside[1:]) if one != inside[0])
            told.append("".join(inside[:1]) + other)
        lines.append(
            f"| {WORDS[row['architecture']]} | {row['by']} | {mean} | {', '.join(rest)} | " + " | ".join(told) + " |"
        )
    return lines


def test_the_page_says_what_came_of_the_forecast():
    assert "\n".join(outcome_lines()) in (RUNS / "forecast.md").read_text(encoding="utf-8")


def over_asymptote():
    """The runs of both tables: those the forecast was made from, and those with 8e6 rows."""
    tables = [pd.read_parquet(RUNS / f"mixers_by_rows{which}.parquet") for which in ("", "_most")]
    runs = pd.concat(tables, ignore_index=True)
    return runs.assign(excess=runs["logloss"] - runs["asymptote"])


def told(law, name):
    """A parameter with its interval, or that it is refused."""
    value, interval = ((law.params or {}) | law.derived).get(name), law.intervals.get(name)
    return "refused" if value is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def exponent_lines(along, at, headings):
    """Exponents of the excess along one axis at every value of the other."""
    lines = ["| | " + " | ".join(headings.values()) + " |", "|---" * (1 + len(headings)) + "|"]
    for name, words in WORDS.items():
        runs = over_asymptote()
        cells = [runs[(runs["architecture"] == name) & (runs[at] == key)] for key in headings]
        laws = [fit(rows, "power", {"x": along}, "excess", bootstrap=200) for rows in cells]
        lines.append(f"| {words} | " + " | ".join(told(law, "alpha") for law in laws) + " |")
    return lines


def law_lines():
    runs = over_asymptote()
    rows = {each: amount(round(each, -3)) for each in sorted(runs["examples"].unique())}
    sizes = {each: each for each in quickstart.LADDER}
    lines = [exponent_lines("dense_params", "examples", rows), exponent_lines("examples", "match_id", sizes)]
    joint = ["| | alpha | beta | kappa | a | best split of 1e12 FLOP |", "|---|---|---|---|---|---|"]
    without = runs[runs["sweep"] != "mixers_by_rows_most"]
    for (name, words), (told_as, table) in product(WORDS.items(), (("", without), (", with 8M", runs))):
        axes = {"N": "dense_params", "D": "examples"}
        law = fit(table[table["architecture"] == name], "kappa", axes, "excess", bootstrap=300, fixed={"E": 0.0})
        cells, split = [told(law, parameter) for parameter in ("alpha", "beta", "kappa", "a")], "refused"
        if "refused" not in cells:
            (best,) = splits(law, [1e12], per_unit_of(law)[0])
            split = f"{amount(best['N'])} parameters, {amount(best['D'])} rows"
        joint.append(f"| {words}{told_as} | " + " | ".join([*cells, split]) + " |")
    return ["\n".join(each) for each in (*lines, joint)]


@pytest.mark.slow
def test_the_note_quotes_the_laws_of_the_table():
    note = notes()
    for lines in law_lines():
        assert lines in note


def test_the_note_quotes_the_runs():
    assert "\n".join(excess_lines()) in notes()


def test_the_orderings_that_the_note_names():
    """Of the means over seeds, by size: whether RankMixer is below the MLP by more than 1 %, level, or above."""
    runs = over_asymptote()
    means = runs.groupby([runs["examples"].round(-3), "architecture", "dense_params"])["excess"].mean()
    for rows in means.index.unique(0):
        share = means[rows, "rankmixer"].to_numpy() / means[rows, "dlrm_mlp"].to_numpy()
        if rows > 1e6:
            assert (share < 0.95).all()
        elif rows > 2e5:
            assert (share[:5] < 0.95).all() and (share[5:] > 0.99).all()
        else:
            assert share[0] > 1.3 and (share[1:] < 0.83).all()
    (fewest, fewer) = runs.query("architecture == 'rankmixer' and match_id == '2.7e3' and examples < 2e5").groupby(
        "examples"
    )["lr_dense"]
    assert (fewest[1].unique(), fewer[1].unique()) == (0.097, 0.075)


def test_what_the_page_says_of_its_outcome():
    check, losses = pd.read_parquet(RUNS / "mixers_by_rows_check.parquet"), checked()
    left = (losses["logloss"] - losses["asymptote"]).mean()
    by = {(row["architecture"], row["by"]): row for row in FORECASTS}
    assert left["dlrm_mlp"] == pytest.approx(by["dlrm_mlp", "joint"]["predicted"], rel=0.02)
    widths = [(by[name, "joint, E free"]["high"] - by[name, "joint, E free"]["low"]) / left[name] for name in WORDS]
    assert [round(width, -1 if width > 99 else 0) for width in widths] == [120, 9]
    assert (check["entropy_floor"] - check["asymptote"]).round(6).unique() == 0.00008
