"""Notes of LONGER's start and of the tournament quote the runs that are committed beside them, every figure of them."""

from pathlib import Path

import pandas as pd
import pytest

from recscale.scaling.records.number_text import value_text
from recscale.scaling.report.orderings import Ordering, as_option, judge
from recscale.sweeps.sequences import longer_start, tournament

RUNS = Path(__file__).parents[2] / "notebooks" / "runs"
# A tenth of the rows of these runs, and of the length ladder's million.
TENTHS = (12_000, 100_000)


@pytest.fixture(scope="module")
def text():
    return (RUNS / "README.md").read_text(encoding="utf-8")


def starts(rows):
    """Rows to the start of every seed, in thousands; a dash where it never came."""
    values = rows.sort_values("seed")["examples_to_start"]
    return ", ".join("–" if pd.isna(value) else f"{value / 1e3:.0f}" for value in values)


def loss(rows):
    return f"{rows['logloss'].mean():.4f} ({rows['logloss'].std():.4f})".replace("0.", ".")


def saved(runs, better, worse):
    """What an arm saves on another, x 1,000, with its interval and what is concluded of it."""
    (found,) = judge(runs, as_option([Ordering("", better, worse, None, "", "")]))
    if found.difference is None:
        return found, "not judged"
    low, high = (1e3 * end for end in found.interval)
    return found, value_text(1e3 * found.difference, (low, high))


def at_best_rate(rows):
    """The runs of one arm at the rate with the lowest mean loss."""
    return rows[rows["lr_dense"] == rows.groupby("lr_dense")["logloss"].mean().idxmin()]


def start_table():
    runs = pd.read_parquet(RUNS / "longer_start.parquet")
    assert (runs["status"] == "done").all() and (runs["examples"] - runs["batch_rows"] < longer_start.EXAMPLES).all()
    rates = sorted(runs["lr_dense"].unique())
    headings = ["events", "arm", f"by 1e5 at {', '.join(f'{rate:g}' for rate in rates)}", "best rate"]
    headings += ["start of five seeds", "logloss", "saved x 1,000"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for length, arms in runs.groupby("history_length"):
        named = {name: arms[arms["arm"] == name] for name in longer_start.ARMS if (arms["arm"] == name).any()}
        best = pd.concat([at_best_rate(rows) for rows in named.values()])
        for name, rows in named.items():
            assert (rows.groupby("lr_dense")["seed"].nunique() == 5).all() and rows["lr_dense"].nunique() == len(rates)
            early = rows["examples_to_start"] <= TENTHS[1]
            own = best[best["arm"] == name]
            rate = f"{own['lr_dense'].iloc[0]:g}" + ("" if own["lr_bracketed"].all() else ", at the edge")
            gain = "" if name == "LONGER" or "LONGER" not in named else saved(best, name, "LONGER")[1]
            counts = ", ".join(str(count) for count in early.groupby(rows["lr_dense"]).sum())
            lines.append(f"| {length} | {name} | {counts} | {rate} | {starts(own)} | {loss(own)} | {gain} |")
    return lines


def test_the_note_of_longers_start_quotes_its_runs(text):
    table = start_table()
    assert "\n".join(table) in text
    gains = {row.split(" | ")[1]: row.split(" | ")[-1].rstrip(" |") for row in table if row.startswith("| 128")}
    assert f"by {gains['newest row, 8 queries']} x 1,000, every rate inside" in text
    assert "edge" not in "".join(table) and gains["no InnerTrans"].split("[")[1].startswith("-")


def test_what_the_note_of_longers_start_claims():
    runs = pd.read_parquet(RUNS / "longer_start.parquet").set_index(["arm", "history_length", "lr_dense", "seed"])
    start = runs["examples_to_start"].astype(float).sort_index()
    recommended = start["newest row, 8 queries"]
    assert len(recommended) == 30 and recommended.max() <= TENTHS[1]
    assert (recommended[512, 1.5e-3] - recommended[128, 1.5e-3]).max() < 13_000
    early = (start <= TENTHS[1]).groupby(["arm", "history_length", "lr_dense"]).sum()
    assert early["no InnerTrans", 128, 1.5e-3] == 5 and early["LONGER", 128].max() == 3
    assert not (start <= TENTHS[0]).any() and TENTHS[0] // runs["batch_rows"].unique().item() + 1 == 47


NAMES = {"din+rankmixer": "DIN", "longer+rankmixer": "LONGER"}


def tournament_runs(length):
    """Every architecture at its best rate."""
    runs = pd.read_parquet(RUNS / "tournament.parquet")
    assert (runs["status"] == "done").all() and (runs.groupby(["arm", "lr_dense"])["seed"].nunique() == 5).all()
    runs = runs[runs["history_length"] == length]
    assert set(runs["arm"]) == set(NAMES)
    return pd.concat([at_best_rate(rows) for _, rows in runs.groupby("arm")])


def tournament_table(length):
    headings = ["", "best rate", "training FLOPs a row, 1e5", "start of five seeds", "logloss"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name, rows in tournament_runs(length).groupby("arm"):
        rate = f"{rows['lr_dense'].iloc[0]:g}" + ("" if rows["lr_bracketed"].all() else ", at the edge")
        flops = (rows["train_flops"] / rows["examples_seen"]).iloc[0] / 1e5
        lines.append(f"| {NAMES[name]} | {rate} | {flops:.1f} | {starts(rows)} | {loss(rows)} |")
    return lines


def test_the_note_of_the_tournament_quotes_its_runs(text):
    (length,) = tournament.STAGES["equal FLOPs"]
    assert "\n".join(tournament_table(length)) in text
    best, latest = tournament_runs(length), {"din+rankmixer": 19_000, "longer+rankmixer": 59_000}
    assert not best.groupby("arm")["lr_bracketed"].all()["din+rankmixer"]
    assert (best.groupby("arm")["examples_to_start"].max() <= pd.Series(latest)).all()
