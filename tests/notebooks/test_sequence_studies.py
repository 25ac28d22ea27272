"""Notes of LONGER's start and of the tournament quote the runs that are committed beside them, every figure of them."""

import itertools
import json
import math

import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.data.known_truth import preset
from recscale.scaling.records.number_text import value_text
from recscale.scaling.report.orderings import Ordering, as_option, judge
from recscale.sweeps.sequences import length_ladder, longer_start, tournament, tournament_categories

# A tenth of the rows of these runs, and of the length ladder's million.
TENTHS = (12_000, 100_000)


@pytest.fixture(scope="module")
def text():
    return notes()


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


def start_runs():
    """Of LONGER's start, all arms: those of the second table were run later, and share stream and seeds."""
    tables = [pd.read_parquet(RUNS / f"{name}.parquet") for name in ("longer_start", "longer_start_others")]
    return pd.concat(tables, ignore_index=True)


def start_table():
    runs = start_runs()
    assert {length: set(arms["arm"]) for length, arms in runs.groupby("history_length")} == {
        length: set(names) for length, names in longer_start.AT.items()
    }
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


def test_what_the_note_of_longers_start_claims(text):
    runs = start_runs().set_index(["arm", "history_length", "lr_dense", "seed"])
    start = runs["examples_to_start"].astype(float).sort_index()
    recommended = start["newest row, 8 queries"]
    assert len(recommended) == 30 and recommended.max() <= TENTHS[1]
    assert (recommended[512, 1.5e-3] - recommended[128, 1.5e-3]).max() < 13_000
    early = (start <= TENTHS[1]).groupby(["arm", "history_length", "lr_dense"]).sum()
    assert early["no InnerTrans", 128, 1.5e-3] == 5 and early["LONGER", 128].max() == 3
    at_best = runs.reset_index().query("lr_dense == 1.5e-3 and history_length == 128")
    text = " ".join(text.split())
    (_, alone), (found, beside), (_, queries), (small, _), (norm, normed) = (
        saved(at_best, *pair)
        for pair in (
            ("newest row", "LONGER"),
            ("newest row, 8 queries", "newest row"),
            ("8 queries", "LONGER"),
            ("small InnerTrans", "LONGER"),
            ("norm on attention", "LONGER"),
        )
    )
    assert f"alone it saves {alone} on LONGER" in text and f"Eight queries alone save {queries}," in text
    assert f"eight queries beside it add {beside}, inside noise" in text
    assert found.outcome == small.outcome == norm.outcome == "inside noise"
    assert f"A norm on what attention adds saves {normed}, inside noise" in text
    assert start["norm on attention", 128, 1.5e-3].isna().sum() == 1
    heads = [saved(at_best, name, "LONGER") for name in ("one inner head", "heads of width 8")]
    assert all(found.outcome == "inside noise" for found, _ in heads)
    assert f"in place of four, {heads[0][1]}, and heads of width 8 in place of 32, {heads[1][1]}: one and two" in text
    never = start.isna().groupby(["arm", "history_length", "lr_dense"]).sum()
    assert never["one inner head", 128, 1.5e-3] == 1 and never["heads of width 8", 128, 1.5e-3] == 2
    assert (early["newest row", 128] == 5).all() and (early["small InnerTrans", 128] == 2).all()
    assert start["8 queries", 128, 1.5e-3].isna().sum() == 1
    assert not (start <= TENTHS[0]).any() and TENTHS[0] // runs["batch_rows"].unique().item() + 1 == 47


# As the papers write them.
WORDS = {"longer": "LONGER", "sasrec": "SASRec", "din": "DIN", "hyformer": "HyFormer", "mixformer": "MixFormer"}
WORDS |= {"stca": "STCA", "hstu": "HSTU", "target_attention": "target attention"}


def tournament_runs(table="tournament"):
    """The runs of every length, each named in words; every one finished, at one rate, five seeds."""
    runs = pd.read_parquet(RUNS / f"{table}.parquet")
    assert (runs["status"] == "done").all()
    own = runs.groupby(["history_length", "arm"])
    assert (own["seed"].nunique() == 5).all() and (own["lr_dense"].nunique() == 1).all() and (own.size() == 5).all()
    runs["arm"] = runs["arm"].str.split(",").str[0].str.removesuffix("+rankmixer").map(WORDS)
    return dict(list(runs.groupby("history_length")))


def tournament_table(runs, *, shares=False):
    """Best first: each beside LONGER, and beside the next below it; where they differ, with the shares of encoders."""
    headings = ["", *(["encoder"] if shares else []), "best rate", "training FLOPs a row, 1e5"]
    headings += ["below the base rate after", "logloss"]
    headings += ["saves on LONGER", "saves on the next"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    order = runs.groupby("arm")["logloss"].mean().sort_values().index
    for name, below in zip(order, [*order[1:], None], strict=True):
        rows = runs[runs["arm"] == name]
        rate = f"{rows['lr_dense'].iloc[0]:g}" + ("" if rows["lr_bracketed"].all() else ", at the edge")
        flops = (rows["train_flops"] / rows["examples_seen"]).iloc[0] / 1e5
        gains = ["" if name == other or other is None else verdict(runs, name, other) for other in ("LONGER", below)]
        share = (rows["encoder_params"] / rows["dense_params"]).iloc[0]
        encoder = [] if not shares else [""] if pd.isna(share) else [f"{share:.2f}"]
        lines.append("| " + " | ".join([name, *encoder, rate, f"{flops:.1f}", starts(rows), loss(rows), *gains]) + " |")
    return lines


def verdict(runs, better, worse):
    found, text = saved(runs, better, worse)
    return f"**{text}**" if found.outcome in ("held", "failed") else text


def own_rows(runs, name):
    return runs[runs["arm"] == name]


def median_start(rows):
    """Of an arm's five seeds, infinite where the third never starts."""
    return rows["examples_to_start"].astype(float).fillna(math.inf).median()


def start_of_five(runs, name):
    """Median [first, last] of the seeds, in thousands of rows; a dash where a run never started."""
    values = sorted(own_rows(runs, name)["examples_to_start"].astype(float).fillna(math.inf) / 1e3)
    first, middle, last = ("–" if math.isinf(value) else f"{value:.0f}" for value in (values[0], values[2], values[4]))
    return f"{middle} [{first}, {last}]"


def rate_and_flops(runs, name):
    rows = own_rows(runs, name)
    rate = f"{rows['lr_dense'].iloc[0]:g}" + ("" if rows["lr_bracketed"].all() else ", at the edge")
    return f"{rate}; {(rows['train_flops'] / rows['examples_seen']).iloc[0] / 1e5:.1f}"


# What a table of the note has in its cells, by its first heading.
CELLS = {
    "logloss": lambda runs, name: loss(own_rows(runs, name)),
    "saves on LONGER": lambda runs, name: "" if name == "LONGER" else verdict(runs, name, "LONGER"),
    "start": start_of_five,
    "best rate; FLOPs a row": rate_and_flops,
}


def tournament_matrix(lengths, what):
    """Architectures by lengths, the best mean loss over the lengths of all eight first."""
    every = [runs for runs in lengths.values() if runs["arm"].nunique() == len(WORDS)]
    order = pd.concat(every).groupby("arm")["logloss"].mean().sort_values().index
    lines = [f"| {what}, at | " + " | ".join(map(str, lengths)) + " |", "|---" * (1 + len(lengths)) + "|"]
    for name in order if what != "saves on LONGER" else order.drop("LONGER"):
        cells = [CELLS[what](runs, name) if name in set(runs["arm"]) else "not run" for runs in lengths.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def test_the_note_of_the_tournament_quotes_its_runs(text):
    lengths = tournament_runs()
    assert {length: len(set(runs["arm"])) for length, runs in lengths.items()} == {
        length: len(set(names) & set(tournament.NAMES)) for length, names in tournament.STAGES["equal FLOPs"].items()
    }
    assert all(runs["lr_bracketed"].all() for runs in lengths.values())
    for what in CELLS:
        assert "\n".join(tournament_matrix(lengths, what)) in text


def outcomes(runs, better, others=None):
    """Those of the others that are above, below and inside noise of one."""
    names = set(others or runs["arm"]) - {better}
    found = {name: saved(runs, name, better)[0].outcome for name in names}
    return [{name for name in names if found[name] == outcome} for outcome in ("held", "failed", "inside noise")]


EVERY = set(WORDS.values())
LATE = {"HSTU", "STCA", "MixFormer", "HyFormer"}
# Length -> those above LONGER, and those below.
BESIDE_LONGER = {
    16: (EVERY - {"LONGER", "HyFormer"}, set()),
    32: (EVERY - {"LONGER"}, set()),
    64: ({"DIN", "HSTU", "SASRec", "target attention", "STCA"}, set()),
    128: ({"DIN"}, {"HyFormer"}),
    256: ({"DIN"}, LATE),
    512: (set(), set()),
}
# Length -> those inside noise of DIN; all others are below it.
BESIDE_DIN = {
    16: {"SASRec", "HSTU"},
    32: {"SASRec", "HSTU"},
    64: {"target attention"},
    128: set(),
    256: set(),
    512: {"LONGER", "SASRec", "target attention"},
}


def in_words(values):
    *first, last = values
    return f"{', '.join(first)} and {last}"


def test_what_the_note_of_the_tournament_claims(text):
    lengths = tournament_runs()
    text = " ".join(text.split())
    assert {length: tuple(outcomes(runs, "LONGER")[:2]) for length, runs in lengths.items()} == BESIDE_LONGER
    for length, runs in lengths.items():
        alike = BESIDE_DIN[length]
        assert outcomes(runs, "DIN") == [set(), set(runs["arm"]) - {"DIN"} - alike, alike]
    assert f"above HSTU by {saved(lengths[256], 'LONGER', 'HSTU')[1]} with" in text
    assert all(runs.groupby("arm")["logloss"].mean().idxmin() == "DIN" for runs in lengths.values())
    *gains, last = (saved(runs, "DIN", "target attention")[1] for runs in lengths.values())
    own = own_rows(lengths[512], "DIN")["logloss"]
    ends = f"{own.min():.4f} and {own.max():.4f}".replace("0.", ".")
    assert f"On target attention it saves {in_words(gains)} from 16 to 256" in text
    assert f"At 512 nothing is shown: {last}, its own seeds lie between {ends}." in text
    cost = {length: runs.groupby("arm")["train_flops"].first() for length, runs in lengths.items()}
    assert cost[256]["LONGER"] < cost[256]["HSTU"] / 2
    apart = {length: f"{flops.max() / flops.min():.1f}" for length, flops in cost.items()}
    assert f"at 16 up to {apart[16]} times each other, at 256 up to {apart[256]}, at 512 up to {apart[512]}." in text
    rates = pd.DataFrame({length: runs.groupby("arm")["lr_dense"].first() for length, runs in lengths.items()}).T
    assert {*(rates["DIN"] / rates["LONGER"])} == {4, 8}


def test_what_the_note_says_of_starts_and_losses_over_the_lengths(text):
    lengths = tournament_runs()
    text = " ".join(text.split())
    start = pd.DataFrame({length: {name: median_start(own_rows(runs, name)) for name in EVERY}
                          for length, runs in lengths.items()})  # fmt: skip
    for shorter, longer in itertools.pairwise((32, 64, 128, 256)):
        later = (start[longer] > start[shorter]) | (start[longer] == math.inf)
        assert later.drop("LONGER").all()
    own = [f"{start.loc['LONGER', length] / 1e3:.0f},000" for length in (64, 128, 256, 512)]
    longest = {name: f"{value / 1e3:.0f},000" for name, value in start[512].dropna().items()}
    said = f"At 512 DIN's is {longest['DIN']} and target attention's {longest['target attention']}, two seeds"
    assert said in text and f"SASRec's stays at {longest['SASRec']}, but" in text
    assert own_rows(lengths[512], "target attention")["examples_to_start"].isna().sum() == 2
    assert start[512]["SASRec"] == start[256]["SASRec"]
    ends = own_rows(lengths[512], "SASRec")["logloss"].agg(["min", "max"])
    assert f"seeds end at {ends['min']:.4f} to {ends['max']:.4f}.".replace("0.", ".") in text
    assert f"LONGER's goes from {own[0]} rows at 64 events to {in_words(own[1:])}" in text
    late = lengths[256][lengths[256]["arm"].isin(LATE)]["examples_to_start"]
    assert len(late) == 20 and late.count() == 2 and late.min() > 1e5
    loss = pd.DataFrame({length: runs.groupby("arm")["logloss"].mean() for length, runs in lengths.items()})
    best = {length: set(rows.index) for length, rows in loss.groupby(loss.idxmin(axis=1))}
    assert best == {32: LATE, 64: {"target attention", "SASRec"}, 128: {"DIN", "LONGER"}}
    spread = f"{loss.loc['LONGER'].max() - loss.loc['LONGER'].min():.4f}".lstrip("0")
    assert f"LONGER's stays within {spread} over all lengths" in text
    at_64 = lengths[64].groupby("arm")["examples_to_start"].agg(["min", "median", "max"])
    assert at_64["max"]["DIN"] < 18_500 and at_64["max"]["target attention"] < 28_500
    assert at_64["min"]["HyFormer"] > 64_000
    assert (at_64["median"][["HSTU", "STCA", "MixFormer"]] > at_64["median"]["LONGER"]).all()


def test_the_tournaments_rates_are_the_best_of_those_searched():
    search, runs = (pd.read_parquet(RUNS / f"tournament{end}.parquet") for end in ("_rates", ""))
    assert (search["status"] == "done").all() and set(search["seed"]) == {0}
    assert not set(search["data_seed"]) & set(runs["data_seed"])
    started = search.groupby(["history_length", "architecture"])["examples_to_start"].count()
    late = ("hstu+rankmixer", "mixformer", "hyformer", "stca+rankmixer")
    never = {(256, name) for name in late} | {(512, "target_attention+rankmixer")}
    assert set(started.index[started == 0]) == never
    tried = search[search["history_length"] == 256].groupby("architecture").size()
    assert tried["stca+rankmixer"] == 7 and (tried[["hstu+rankmixer", "hyformer", "mixformer"]] == 5).all()
    for (name, length), rows in search.groupby(["architecture", "history_length"]):
        own = runs[(runs["architecture"] == name) & (runs["history_length"] == length)]
        best = rows["lr_dense"][rows["logloss"].idxmin()]
        assert (own["lr_dense"] == best).all() and rows["lr_dense"].min() < best < rows["lr_dense"].max()
        assert (own["lr_trials"] == len(rows)).all() and own["lr_bracketed"].all()
        assert (own["lr_first_trials"] == (5 if (name, length) == ("stca+rankmixer", 256) else 3)).all()


def with_published():
    """The runs at the length of `tournament.PUBLISHED`, those two arms among them."""
    own = pd.read_parquet(RUNS / "tournament_published.parquet")
    assert (own["status"] == "done").all() and own["lr_bracketed"].all() and set(own["arm"]) == {*tournament.PUBLISHED}
    assert (own.groupby("arm")["seed"].nunique() == 5).all() and len(own) == 10
    (length,) = set(own["history_length"])
    assert set(tournament.PUBLISHED) < set(tournament.STAGES["equal FLOPs"][length])
    return pd.concat([tournament_runs()[length], own], ignore_index=True)


def published_table():
    runs = with_published()
    return tournament_table(runs[runs["arm"].isin(["LONGER", *tournament.PUBLISHED])])


def test_the_note_of_longer_as_published_quotes_its_runs(text):
    runs, (four, eight) = with_published(), tournament.PUBLISHED
    assert "\n".join(published_table()) in text
    text = " ".join(text.split())
    assert outcomes(runs, eight, EVERY) == [EVERY, set(), set()]
    assert outcomes(runs, four, EVERY) == [EVERY - {"HyFormer"}, set(), {"HyFormer"}]
    assert own_rows(runs, eight)["examples_to_start"].isna().sum() == 1
    gains = {name: [saved(runs, name, other)[1] for other in (four, eight)] for name in ("DIN", "SASRec")}
    assert f"DIN saves {in_words(gains['DIN'])} on them, SASRec {in_words(gains['SASRec'])}." in text
    assert f"it saves {saved(runs, 'LONGER', four)[1]} on the published one" in text
    search = pd.read_parquet(RUNS / "tournament_published_rates.parquet")
    assert (search["status"] == "done").all() and not set(search["data_seed"]) & set(runs["data_seed"])
    for arm, merge in zip((four, eight), (4, 8), strict=True):
        rows, own = search[search["model.encoder.merge"] == merge], own_rows(runs, arm)
        best = rows["lr_dense"][rows["logloss"].idxmin()]
        assert (own["lr_dense"] == best).all() and rows["lr_dense"].min() < best < rows["lr_dense"].max()
        assert (own["lr_trials"] == len(rows)).all()


def test_the_note_of_equal_total_size_quotes_its_runs(text):
    lengths = tournament_runs("tournament_total")
    assert {length: runs["arm"].nunique() for length, runs in lengths.items()} == {
        length: len(names) for length, names in tournament.STAGES["equal total"].items()
    }
    for runs in lengths.values():
        assert runs["lr_bracketed"].all() and "\n".join(tournament_table(runs, shares=True)) in text
    off = max((runs["dense_params"] / tournament.SIZE - 1).abs().max() for runs in lengths.values())
    assert f"within {100 * off:.1f} % of 4e4" in text
    length = tournament.FIRST
    text, runs = " ".join(text.split()), lengths[length]
    last = outcomes(runs, "LONGER")
    assert last == [set(WORDS.values()) - {"LONGER"}, set(), set()]
    assert runs.loc[runs["arm"] == "LONGER", "examples_to_start"].isna().sum() == 1
    cost = runs.groupby("arm")["train_flops"].first()
    first = ("HyFormer", "HSTU", "SASRec")
    assert cost["LONGER"] < cost[[*first]].min() / 2 and cost.idxmax() == "DIN"
    gains = [saved(runs, name, "DIN") for name in first]
    assert all(found.outcome == "held" for found, _ in gains)
    assert f"above DIN by {gains[0][1]}, {gains[1][1]} and {gains[2][1]}, and not told apart" in text
    alike = {*first, "target attention"}
    assert all(alike - {name} == outcomes(runs, name, alike)[2] for name in alike)
    equal = tournament_runs()[length]
    assert equal.groupby("arm")["logloss"].mean().idxmax() == "HyFormer"
    sizes = equal.groupby("arm")["dense_params"].first()
    assert f"with {sizes['HyFormer']:,} parameters" in text and f"there with {sizes['DIN']:,}," in text
    means = [rows.groupby("arm")["logloss"].mean()["DIN"] for rows in (runs, equal)]
    assert f"({means[0]:.4f} for {means[1]:.4f})".replace("0.", ".") in text
    backbones = [(rows["dense_params"] - rows["encoder_params"])[rows["arm"] == "DIN"].max() for rows in (runs, equal)]
    assert backbones[0] < backbones[1]
    search = pd.read_parquet(RUNS / "tournament_total_rates.parquet").query(
        "architecture == 'din+rankmixer' and history_length == @length"
    )
    best = search.groupby("match_id")["logloss"].min()
    deviation = runs.loc[runs["arm"] == "DIN", "logloss"].std()
    said = f"within {best.max() - best.min():.4f} of each other, its seeds deviate by {deviation:.4f}"
    assert said.replace("0.", ".") in text


def test_the_note_of_equal_total_size_at_16_events_says_what_its_runs_say(text):
    runs, text = tournament_runs("tournament_total")[16], " ".join(text.split())
    first = {"HSTU", "HyFormer"}
    assert outcomes(runs, "LONGER") == [set(runs["arm"]) - {"LONGER"}, set(), set()]
    assert own_rows(runs, "LONGER")["examples_to_start"].isna().sum() == 1
    for name in first:
        assert outcomes(runs, name) == [set(), {"DIN", "SASRec", "LONGER"}, first - {name}]
    gains = in_words(saved(runs, "HSTU", name)[1] for name in ("DIN", "SASRec"))
    assert f"above DIN and SASRec here**, HSTU by {gains}, and not told apart" in text
    assert runs.groupby("arm")["train_flops"].first().idxmax() == "DIN"


def test_the_rates_and_shares_of_equal_total_size_are_the_best_of_those_searched():
    search, runs = (pd.read_parquet(RUNS / f"tournament_total{end}.parquet") for end in ("_rates", ""))
    assert (search["status"] == "done").all() and not set(search["data_seed"]) & set(runs["data_seed"])
    for (name, length), rows in search.groupby(["architecture", "history_length"]):
        best = rows.loc[rows["logloss"].idxmin()]
        own = runs[(runs["architecture"] == name) & (runs["history_length"] == length)]
        assert (own["lr_dense"] == best["lr_dense"]).all() and (own["dense_params"] == best["dense_params"]).all()
        tried = rows.loc[rows["match_id"] == best["match_id"], "lr_dense"]
        assert (own["lr_bracketed"] == (tried.min() < best["lr_dense"] < tried.max())).all()
        assert (own["lr_trials"] == len(tried)).all()
        assert "+" not in name or own["arm"].iloc[0].endswith(f", {tournament.SHARE[name]:g}")
        assert length == tournament.FIRST or rows["match_id"].nunique() == 1


def test_the_note_of_the_world_with_categories_quotes_its_runs(text):
    ((length, runs),) = tournament_runs("tournament_categories").items()
    world = preset("long", **length_ladder.WORLD | tournament_categories.WORLD)
    assert length == tournament_categories.LENGTH and runs["lr_bracketed"].all()
    assert len(runs) == 5 * len(tournament_categories.NAMES)
    assert "\n".join(tournament_table(runs)) in text
    text = " ".join(text.split())
    order = runs.groupby("arm")["recovered_L"].mean().sort_values(ascending=False)
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in order.items())
    assert f"Recovered: {shares}." in text
    held, failed, open_ = outcomes(runs, "LONGER")
    assert len(held) == 4 and not failed and not open_
    assert f"HSTU by {saved(runs, 'HSTU', 'LONGER')[1]}." in text
    assert all(round(1e3 * saved(runs, name, "LONGER")[0].difference, -1) == 70 for name in ("DIN", "target attention"))
    assert saved(runs, "DIN", "target attention")[0].outcome == "inside noise"
    # What all 64 events say of L, and what their sum says that leaves out which of them count.
    visible = (world.c_l - world.missing_history(length)) / (world.c_l - world.missing_history(world.history_max))
    blind = visible / world.match_groups
    assert f"{100 * visible:.0f} % is all that 64 events say" in text and f"comes to {100 * blind:.0f} %." in text
    own = runs.groupby("arm")["recovered_L"].agg(["min", "max"])
    assert (own["max"][["SASRec", "HSTU", "LONGER"]] < blind).all()
    assert (own["min"][["DIN", "target attention"]] > blind).all()
    start = runs.groupby("arm")["examples_to_start"]
    assert f"the last after {start.max()['LONGER'] / 1e3:.0f},000 of 240,000 rows" in text
    single = tournament_runs()[length].groupby("arm")["examples_to_start"].median()
    medians = [rows["DIN"] / 1e3 for rows in (start.median(), single)]
    assert f"after {medians[0]:.0f},000 rows where it came after {medians[1]:.0f},000" in text


def test_the_rates_of_the_world_with_categories_are_the_best_of_those_searched(text):
    search, runs = (pd.read_parquet(RUNS / f"tournament_categories{end}.parquet") for end in ("_rates", ""))
    categories = search["preset_changes"].map(json.loads).map(lambda changes: changes["match_groups"])
    worlds = (tournament_categories.LOOK, tournament_categories.CATEGORIES)
    look, search = (search[categories == groups] for groups in worlds)
    assert not set(search["data_seed"]) & set(runs["data_seed"]) and (search["status"] == "done").all()
    for name, rows in search.groupby("architecture"):
        own, best = runs[runs["architecture"] == name], rows["lr_dense"][rows["logloss"].idxmin()]
        assert (own["lr_dense"] == best).all() and rows["lr_dense"].min() < best < rows["lr_dense"].max()
        assert (own["lr_trials"] == len(rows)).all()
    assert set(look["architecture"]) == set(tournament_categories.NAMES[:3]) and len(look) == 9
    start = look["examples_to_start"].dropna()
    assert set(look.loc[start.index, "architecture"]) == {"din+rankmixer"} and len(start) == 2
    assert f"after {start.unique().item() / 1e3:.0f},000 rows at two of three" in " ".join(text.split())
