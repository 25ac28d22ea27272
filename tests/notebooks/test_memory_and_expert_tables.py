"""The notes on hash tables and on experts quote the rows that are committed beside them."""

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.data.known_truth import preset
from recscale.scaling.laws import fit
from recscale.scaling.report.expert_activity import by_token
from recscale.scaling.report.orderings import as_option, judge
from recscale.sweeps.engine.loading import load
from recscale.sweeps.memories import memory_slots_hashed as hashed
from recscale.sweeps.mixers import expert_activity


@pytest.fixture(scope="module")
def note():
    return notes()


def with_ladder(table):
    """The runs of `pkm` and `pkm_random` in the same world, at the best rate of every size; some are of this sweep,
    too. Of `pkm_random` a rate was searched at the sizes compared alone."""
    ladder = pd.read_parquet(RUNS / "memory_slots_ladder.parquet")
    ladder = ladder[ladder["architecture"].isin(["pkm", "pkm_random"])]
    ladder = ladder[
        ladder["memory_slots"].isin(table.loc[table["examples"] == ladder["examples"].iloc[0], "memory_slots"])
    ]
    cell = ["architecture", "memory_slots"]
    loss = ladder.groupby([*cell, "lr_dense"])["logloss"].mean()
    best = ladder.set_index([*cell, "lr_dense"]).index.isin(loss.groupby(cell).idxmin())
    searched = (ladder["architecture"] == "pkm") | ladder["memory_slots"].isin([hashed.SMALL, hashed.LARGE])
    ladder = ladder.assign(arm=ladder["architecture"] + ", Adam", lr_bracketed=searched)[best]
    return pd.concat([table, ladder], ignore_index=True).drop_duplicates("run_id")


def of_log(table, log):
    """The rows of one log, arms named without it."""
    other = [name for name in hashed.LOGS if name and name != log]
    own = table["arm"].str.endswith(log) & ~table["arm"].str.endswith(tuple(other))
    return table[own].assign(arm=table.loc[own, "arm"].str.removesuffix(log))


@pytest.fixture(scope="module")
def slots():
    return with_ladder(pd.read_parquet(RUNS / "memory_slots_hashed.parquet"))


def judged_lines(rows, orderings, log=""):
    """A line for every ordering of which there are runs; five paired seeds make a verdict."""
    for found in judge(rows, as_option(orderings)):
        if found.interval is not None:
            low, high = (1e3 * bound for bound in found.interval)
            verdict = found.outcome if found.pairs >= 5 else f"{found.pairs} seeds, no verdict"
            names = " above ".join(arm.removesuffix(log) for arm in (found.ordering.better, found.ordering.worse))
            yield f"| {names} | {1e3 * found.difference:.2f} [{low:.2f}, {high:.2f}] | {verdict} |"


def slots_table(table):
    sizes = sorted(table["memory_slots"].unique())
    lines = ["| arm | " + " | ".join(f"{n:,}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for arm, rows in table.groupby("arm"):
        means = rows.groupby("memory_slots")["logloss"].mean().reindex(sizes)
        lines.append(f"| {arm} | " + " | ".join("" if np.isnan(x) else f"{x:.4f}"[1:] for x in means) + " |")
    return lines


def verdicts_table(table, log):
    lines = ["| slots | | difference x 1,000 | |", "|---|---|---|---|"]
    for count, orderings in hashed.orderings()[log].items():
        rows = table[table["memory_slots"] == count]
        lines += [f"| {count:,} {line}" for line in judged_lines(rows, orderings, log)]
    return lines


@pytest.mark.parametrize("log", hashed.RATES)
def test_the_note_on_hash_tables_says_what_its_runs_say(note, slots, log):
    assert (slots["status"] == "done").all()
    assert "\n".join(slots_table(of_log(slots, log))) in note
    assert "\n".join(verdicts_table(slots, log)) in note
    if log != hashed.ALIKE:
        assert "\n".join(laws_table(of_log(slots, log))) in note


def laws_table(table):
    """What is granted of power laws with a floor, and over the exact asymptote, for arms of four sizes or more."""
    lines = ["| arm | sizes | floor | exponent | exponent over the asymptote |", "|---|---|---|---|---|"]
    for arm, rows in table.groupby("arm"):
        sizes = rows["memory_slots"].nunique()
        if sizes > 3:
            rows = rows.assign(architecture=arm, excess=rows["logloss"] - rows["asymptote"])
            free = fit(rows, "power_offset", "memory_slots", "logloss", bootstrap=0)
            given = fit(rows, "power", "memory_slots", "excess", bootstrap=0)
            cells = [free.params["E"], free.params["alpha"], given.params["alpha"]]
            lines.append(
                f"| {arm} | {sizes} | " + " | ".join("refused" if x is None else f"{x:.3f}"[1:] for x in cells) + " |"
            )
    return lines


def mean(table, arm, slots, column="logloss"):
    return table.loc[(table["arm"] == arm) & (table["memory_slots"] == slots), column].mean()


def test_what_the_note_on_hash_tables_says_in_words(note, slots):
    text = " ".join(note.split())
    one, eight, pkm = "hash table, K = 1", "hash table, K = 8", "pkm, Adam"

    def gap(worse, better, k, n=2**16):
        return f"{mean(slots, f'{k}, {worse}', n) - mean(slots, f'{k}, {better}', n):.4f}"[1:]

    by_row = [gap("Adam by row", "Adam", k) for k in (one, eight, "pkm")]
    assert f"a row's own updates costs {by_row[0]} (K = 1), {by_row[1]} (K = 8) and {by_row[2]} (`pkm`)" in text
    assert f"at 2^12 slots it gains {gap('Adam', 'Adam by row', one, 2**12)} with one row" in text
    adagrad = [gap("Adam", "Adagrad", k, n) for n in (2**16, 2**12) for k in (one, eight)]
    assert "gains {} and {} on the hash tables, and {} and {} at 2^12 slots".format(*adagrad) in text
    assert min(mean(slots, f"{k}, Adagrad", 2**12) - mean(slots, pkm, 2**12) for k in (one, eight)) > 0.0109
    used = [100 * mean(slots, arm, 2**16, "memory_usage") for arm in (pkm, f"{eight}, Adagrad")]
    assert f"{used[0]:.0f} % by `pkm` and {used[1]:.0f} % by eight hashes" in text
    for k in (one, eight):
        ahead = [mean(slots, pkm, n) - mean(slots, f"{k}, Adagrad", n) for n in (2**8, 2**10, 2**14, 2**16)]
        assert max(ahead[:2]) < -0.03 and (ahead[2] > 0) == (k == eight) and ahead[3] > 0.01
    ahead = [f"{mean(slots, arm, n) - mean(slots, 'MSN, Adam', n):.4f}"[1:]
             for arm, n in ((pkm, 2**16), (pkm, 2**12), (f"{eight}, Adam", 2**16))]  # fmt: skip
    assert "above `pkm` by {} at 2^16 slots and by {} at 2^12".format(*ahead) in text
    assert f"above eight hashed rows by Adam by {ahead[2]} at 2^16" in text
    own = of_log(slots, "")
    best = own.groupby(["memory_slots", "arm"])["logloss"].mean().groupby("memory_slots").idxmin()
    assert {arm for _, arm in best} == {"MSN, Adam"} and len(best) == 5
    below = [n for n in best.index if mean(slots, "MSN, Adam", n) < best_store("", n)]
    assert below == [2**8, 2**10, 2**12] and "as it is at 2^8 and 2^10" in text
    flops = [mean(slots, arm, 2**16, "train_flops_per_row") for arm in (pkm, f"{one}, Adam", "MSN, Adam")]
    assert "`pkm` and MSN train with {:,.0f} FLOPs a row, one hashed row with {:,.0f}".format(*flops) in text
    assert flops[0] == flops[2]
    for n in (2**10, 2**12, 2**14, 2**16):
        assert mean(slots, "pkm_random, Adam", n) > max(mean(slots, f"{eight}, {u}", n) for u in ("Adam", "Adagrad"))
    read = [100 * mean(slots, arm, 2**16, "memory_usage") for arm in ("MSN, Adam", pkm)]
    assert f"{read[0]:.0f} % against {read[1]:.0f} %" in text
    for n in (2**8, 2**10):
        own = [slots.loc[(slots["arm"] == f"{k}, Adagrad") & (slots["memory_slots"] == n)] for k in (one, eight)]
        first, second = (rows.set_index("seed")["logloss"] for rows in own)
        assert abs((first - second).mean()) < (first - second).std()


def test_rates_are_the_best_of_the_search(slots):
    searched = pd.read_parquet(RUNS / "memory_slots_hashed_rates.parquet")
    cell = ["arm", "memory_slots"]
    best = searched.loc[searched.groupby(cell)["logloss"].idxmin()].set_index(cell)
    trials = searched.groupby(cell)["lr_dense"].agg(["min", "max"])
    for log, cells in hashed.RATES.items():
        for (method, update), rates in cells.items():
            for count, rate in rates.items():
                at = hashed.arm(method, update, log), count
                own = slots[(slots["arm"] == at[0]) & (slots["memory_slots"] == count)]
                if own.empty:
                    continue  # planned, not run
                if at in best.index:
                    assert rate == best.loc[at, "lr_dense"], at
                    inside = trials.loc[at, "min"] < rate < trials.loc[at, "max"]
                    assert inside or not own["lr_bracketed"].any(), at
                else:
                    assert not own["lr_bracketed"].any() or at[0] == "pkm, Adam", at


def world_of(log):
    overrides = load("memory_slots_ladder").config().data.overrides.to_dict()
    changes = {key.removeprefix("data.overrides."): value for key, value in hashed.LOGS[log].items() if "data" in key}
    return preset("memory", **overrides | changes)


def counted_table(slots, rows, log="", seed=0):
    """Logloss of a table that counts the labels of the pairs that a uniform hash sends to each slot, beta prior 1."""
    config = world_of(log)
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


def best_store(log, slots):
    """Logloss of a store of so many pairs, the most frequent ones, that knows their signs and nothing else."""
    config = world_of(log)
    p, missed = 1 / (1 + np.exp(-(config.c_m**0.5))), config.missed_mass(slots / (4 * config.clusters))
    known = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    return float(known + (np.log(2) - known) * missed)


def test_where_all_pairs_are_alike(note, slots):
    text, alike = " ".join(note.split()), of_log(slots, hashed.ALIKE)
    store = [best_store(hashed.ALIKE, n) for n in (2**12, 2**14)]
    assert f"A perfect store ends at {store[0]:.4f} and {store[1]:.4f}".replace("0.", ".") in text
    told = [counted_table(n, 1e6, hashed.ALIKE) for n in (2**12, 2**14)]
    assert f"one that counts clicks behind a uniform hash at {told[0]:.4f} and {told[1]:.4f}".replace("0.", ".") in text
    one, eight = "hash table, K = 1", "hash table, K = 8"
    gains = [mean(alike, f"{k}, Adam", 2**14) - mean(alike, f"{k}, Adam by row", 2**14) for k in (one, "pkm")]
    assert "gains {:.4f} and {:.4f}".format(*gains).replace("0.", ".") in text
    scarce = mean(alike, f"{one}, Adagrad", 2**12) - mean(alike, "pkm, Adam", 2**12)
    frequent = mean(slots, f"{eight}, Adagrad", 2**12) - mean(slots, "pkm, Adam", 2**12)
    assert f"ahead of the best hash by {scarce:.4f}, where it is by {frequent:.4f}".replace("0.", ".") in text
    assert mean(alike, "pkm, Adam", 2**12) < store[0]
    assert f"{mean(alike, 'MSN, Adam', 2**14) - store[1]:.4f}"[1:] + " above all pairs known" in text
    used = [100 * mean(alike, f"{k}, Adagrad", 2**14, "memory_usage") for k in (one, eight)]
    assert f"{used[0]:.0f} % of the slots, eight hashes {used[1]:.0f} %" in text
    tried = pd.read_parquet(RUNS / "memory_slots_hashed_rates.parquet")
    for log, words in ((hashed.FEW, "after 2.5e5 rows"), (hashed.MANY, "after 2e6")):
        ends = of_log(tried, log).set_index("arm")["logloss"]
        ends = f"{ends['pkm, Adam']:.3f} against {ends[f'{one}, Adam']:.3f}".replace("0.", ".")
        assert f"{words} `pkm` is at {ends}" in text


def test_with_four_times_the_rows(note, slots):
    text, more = " ".join(note.split()), of_log(slots, hashed.LONGER)
    one, eight, pkm = "hash table, K = 1, Adagrad", "hash table, K = 8, Adagrad", "pkm, Adam"
    gains = [mean(slots, arm, 2**16) - mean(more, arm, 2**16) for arm in (pkm, one, eight)]
    assert "`pkm` gains {:.4f}, one hashed row {:.4f} and eight {:.4f}".format(*gains).replace("0.", ".") in text
    lag = [mean(rows, pkm, 2**16) - mean(rows, arm, 2**16) for rows in (more, slots) for arm in (one, eight)]
    lags = "ends {:.4f} behind one and {:.4f} behind eight, where it was {:.4f} and {:.4f} behind"
    assert lags.format(*lag).replace("0.", ".") in text
    slopes = []
    for rows in (more, slots):
        excess = [mean(rows, pkm, n) - best_store("", np.inf) for n in (2**12, 2**14, 2**16)]
        slopes += list(-np.diff(np.log(excess)) / np.log(4))
    assert "is {:.3f} and {:.3f}, with 2e6 rows {:.3f} and {:.3f}".format(*slopes).replace("0.", ".") in text
    assert abs(mean(more, pkm, 2**14) - mean(more, eight, 2**14)) < 0.002
    msn = mean(more, "MSN, Adam", 2**16)
    ends = mean(more, eight, 2**16) - msn, msn - best_store("", 2**16)
    assert "{:.4f} ahead of eight hashed rows, {:.4f} behind a perfect store".format(*ends).replace("0.", ".") in text
    used = [100 * mean(rows, pkm, 2**16, "memory_usage") for rows in (slots, more)]
    assert "from {:.0f} % to {:.0f} %".format(*used) in text
    assert mean(more, one, 2**16) == pytest.approx(counted_table(2**16, 8e6), abs=5e-4)
    tried = of_log(pd.read_parquet(RUNS / "memory_slots_hashed_rates.parquet"), hashed.LONGER)
    losses = tried[tried["arm"] == pkm].set_index("lr_dense")["logloss"].sort_index()
    behind = (losses - losses.min()).iloc[losses.argmin() - 1 :: 2].iloc[:2]
    assert "by {:.4f} from the next below and {:.4f} from that above".format(*behind).replace("0.", ".") in text


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
