"""The notes on hash tables and on experts quote the rows that are committed beside them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.data.known_truth import preset
from recscale.scaling.report.expert_activity import by_token
from recscale.scaling.report.orderings import as_option, judge
from recscale.sweeps.engine.loading import load
from recscale.sweeps.memories import memory_slots_hashed as hashed
from recscale.sweeps.mixers import expert_activity

RUNS = Path(__file__).parents[2] / "notebooks" / "runs"


@pytest.fixture(scope="module")
def note():
    return (RUNS / "README.md").read_text(encoding="utf-8")


def with_ladder(table):
    """The runs of `pkm` in the same world, at the best rate of every size: some of them are runs of this sweep, too."""
    ladder = pd.read_parquet(RUNS / "memory_slots_ladder.parquet")
    ladder = ladder[(ladder["architecture"] == "pkm") & ladder["memory_slots"].isin(table["memory_slots"])]
    loss = ladder.groupby(["memory_slots", "lr_dense"])["logloss"].mean()
    best = ladder.set_index(["memory_slots", "lr_dense"]).index.isin(loss.groupby("memory_slots").idxmin())
    ladder = ladder[best].assign(arm="pkm, Adam", lr_bracketed=True)
    return pd.concat([table, ladder], ignore_index=True).drop_duplicates("run_id")


@pytest.fixture(scope="module")
def slots():
    return with_ladder(pd.read_parquet(RUNS / "memory_slots_hashed.parquet"))


def judged_lines(rows, orderings):
    """A line for every ordering of which there are runs; five paired seeds make a verdict."""
    for found in judge(rows, as_option(orderings)):
        if found.interval is not None:
            low, high = (1e3 * bound for bound in found.interval)
            verdict = found.outcome if found.pairs >= 5 else f"{found.pairs} seeds, no verdict"
            names = f"{found.ordering.better} above {found.ordering.worse}"
            yield f"| {names} | {1e3 * found.difference:.2f} [{low:.2f}, {high:.2f}] | {verdict} |"


def slots_table(table):
    sizes = sorted(table["memory_slots"].unique())
    lines = ["| arm | " + " | ".join(f"{n:,}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for arm, rows in table.groupby("arm"):
        means = rows.groupby("memory_slots")["logloss"].mean().reindex(sizes)
        lines.append(f"| {arm} | " + " | ".join("" if np.isnan(x) else f"{x:.4f}"[1:] for x in means) + " |")
    return lines


def verdicts_table(table):
    lines = ["| slots | | difference x 1,000 | |", "|---|---|---|---|"]
    for count, orderings in hashed.orderings().items():
        lines += [f"| {count:,} {line}" for line in judged_lines(table[table["memory_slots"] == count], orderings)]
    return lines


def test_the_note_on_hash_tables_says_what_its_runs_say(note, slots):
    assert (slots["status"] == "done").all()
    assert "\n".join(slots_table(slots)) in note
    assert "\n".join(verdicts_table(slots)) in note


def mean(table, arm, slots, column="logloss"):
    return table.loc[(table["arm"] == arm) & (table["memory_slots"] == slots), column].mean()


def test_what_the_note_on_hash_tables_says_in_words(note, slots):
    text = " ".join(note.split())
    one, eight, pkm = "hash table, K = 1", "hash table, K = 8", "pkm, Adam"

    def gap(worse, better, k, n=2**16):
        return f"{mean(slots, f'{k}, {worse}', n) - mean(slots, f'{k}, {better}', n):.4f}"[1:]

    by_row = [gap("Adam by row", "Adam", k) for k in (one, eight, "pkm")]
    assert f"a row's own updates costs {by_row[0]} (K = 1), {by_row[1]} (K = 8) and {by_row[2]} (`pkm`)" in text
    adagrad = [gap("Adam", "Adagrad", k, n) for n in (2**16, 2**12) for k in (one, eight)]
    assert "gains {} and {} on the hash tables, and {} and {} at 2^12 slots".format(*adagrad) in text
    assert min(mean(slots, f"{k}, Adagrad", 2**12) - mean(slots, pkm, 2**12) for k in (one, eight)) > 0.0109
    used = [100 * mean(slots, arm, 2**16, "memory_usage") for arm in (pkm, f"{eight}, Adagrad")]
    assert f"{used[0]:.0f} % by `pkm` and {used[1]:.0f} % by eight hashes" in text
    for k in (one, eight):
        ahead = [mean(slots, pkm, n) - mean(slots, f"{k}, Adagrad", n) for n in (2**8, 2**10, 2**14, 2**16)]
        assert max(ahead[:2]) < -0.03 and (ahead[2] > 0) == (k == eight) and ahead[3] > 0.01
    msn = mean(slots, "MSN, Adam", 2**16)
    above = [f"{mean(slots, arm, 2**16) - msn:.4f}"[1:] for arm in (pkm, f"{eight}, Adam")]
    assert f"above `pkm` by {above[0]} and above eight hashed rows by Adam by {above[1]}" in text
    assert slots[slots["memory_slots"] == 2**16].groupby("arm")["logloss"].mean().idxmin() == "MSN, Adam"
    read = [100 * mean(slots, arm, 2**16, "memory_usage") for arm in ("MSN, Adam", pkm)]
    assert f"{read[0]:.0f} % against {read[1]:.0f} %" in text
    for n in (2**8, 2**10):
        own = [slots.loc[(slots["arm"] == f"{k}, Adagrad") & (slots["memory_slots"] == n)] for k in (one, eight)]
        first, second = (rows.set_index("seed")["logloss"] for rows in own)
        assert abs((first - second).mean()) < (first - second).std()


def test_rates_are_the_best_of_the_search(slots):
    searched = pd.read_parquet(RUNS / "memory_slots_hashed_rates.parquet")
    best = searched.loc[searched.groupby(["arm", "memory_slots"])["logloss"].idxmin()].set_index(
        ["arm", "memory_slots"]
    )
    trials = searched.groupby(["arm", "memory_slots"])["lr_dense"].agg(["min", "max"])
    for (method, update), rates in hashed.RATES.items():
        for count, rate in rates.items():
            cell = hashed.arm(method, update), count
            if cell in best.index:
                assert rate == best.loc[cell, "lr_dense"], cell
                inside = trials.loc[cell, "min"] < rate < trials.loc[cell, "max"]
                assert inside or count not in (hashed.SMALL, hashed.LARGE), cell


def counted_table(slots, rows, seed=0):
    """Logloss of a table that counts the labels of the pairs that a uniform hash sends to each slot, beta prior 1."""
    config = preset("memory", **load("memory_slots_ladder").config().data.overrides.to_dict())
    rng, ranks = np.random.default_rng(seed), np.arange(config.pair_items + 1)
    share = np.append(-np.diff(config.missed_mass(ranks)).repeat(4 * config.clusters) / (4 * config.clusters), 0)
    share[-1] = config.fresh_share()
    signs = rng.choice([-1, 1], (config.pair_items * config.clusters, 1)) * np.asarray([1, -1, -1, 1])
    p = np.append(1 / (1 + np.exp(-(config.c_m**0.5) * signs.reshape(-1))), 0.5)
    place, shown = rng.integers(0, slots, len(p)), rng.poisson(rows * share)
    clicks = rng.binomial(shown, p)
    told = (np.bincount(place, clicks, slots) + 1) / (np.bincount(place, shown, slots) + 2)
    q = told[place]
    return float(-(share * (p * np.log(q) + (1 - p) * np.log1p(-q))).sum())


def test_a_table_that_learns_does_what_one_that_counts_does(slots):
    own = slots[(slots["arm"] == "hash table, K = 1, Adagrad") & (slots["memory_slots"] == 2**16)]
    assert own["logloss"].mean() == pytest.approx(counted_table(2**16, 2e6), abs=1.5e-3)
    assert mean(slots, "hash table, K = 1, Adagrad", 2**8) < counted_table(2**8, 2e6)


def experts_table(table):
    lines = ["| arm | seeds | logloss | open experts a token | balance | dead |", "|---|---|---|---|---|---|"]
    tokens = by_token(table)
    for arm, rows in table.groupby("arm"):
        own = tokens[tokens["arm"] == arm]
        loss = rows.groupby("seed")["logloss"].first()
        cells = [f"{own[name].mean():.2f} ({own[name].min():.2f} to {own[name].max():.2f})" for name in _SPREADS]
        dead = f"{100 * own['dead'].mean():.0f} %"
        lines.append(f"| {arm} | {len(loss)} | {loss.mean():.4f} | {' | '.join(cells)} | {dead} |")
    return lines


_SPREADS = ("activity", "balance")


def test_the_note_on_experts_says_what_its_shares_say(note):
    table = pd.read_parquet(RUNS / "expert_activity.parquet")
    assert "\n".join(experts_table(table)) in note
    assert set(table["arm"]) == set(expert_activity.ARMS) and table["lr_bracketed"].all()
    assert "\n".join(judged_lines(table.drop_duplicates("run_id"), expert_activity.orderings())) in note
    own = by_token(table).groupby("arm")
    spread, least, dead = own["activity"].agg(np.ptp), own["balance"].min(), own["dead"].mean()
    relu, even = ["RankMixer, two routers", "RankMixer, one router"], [arm for arm in least.index if "loss" in arm]
    plain = ["RankMixer, top-k", "TokenMixer-Large"]
    assert (spread[relu] > 1).all() and (spread[even + plain] < 1e-3).all()
    assert (own["activity"].mean()[relu] - 1).abs().max() < 0.2
    assert (least[even] > 0.95).all() and (least[plain] < 0.6).all()
    assert (dead[relu] > dead[plain].max()).all() and (dead[even] == 0).all()
