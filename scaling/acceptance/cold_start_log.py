"""PROMO on an imported log of ratings, as MovieLens-100K: the newest item a user liked, found again among others.

A request is a rating and items the user never rated, drawn anew for every seed; it is positive where the log's first
label is. Two towers (everything of the user but its id, the newest ratings before the request, the item's id) are
trained on the first half of the requests and frozen, PROMO (a reconstruction of arXiv 2412.18082) on the second, as in
`cold_start`. Left out, one of each user: the newest item liked, and what was rated from there on. Its rank among 100
unrated items is what the paper prints; sampled ranks can reverse an order, so that among all unrated items stands
beside it. Prompts are made of ratings strictly before the request, by others. Rates are chosen by the last but one
item liked. Seeds draw parameters and unrated items: an interval says nothing of other users or logs.

    recscale bench cold-start-log DIR
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from recscale.models.inputs import CandidateSide, Schema
from recscale.scaling.data.feedback_lists import Feedback, Lists, feedback_lists, feedback_value
from recscale.scaling.data.stored_log.gather import gather
from recscale.scaling.data.stored_log.packed import PackedLog
from recscale.scaling.data.stored_log.vocabulary import FIRST_ID

from .cold_start import (
    ARMS,
    TUNING_SEED,
    USERS,
    ColdStart,
    Frozen,
    Rows,
    Study,
    cold_items,
    find_rates,
    with_rates,
    without_loose_ends,
)
from .paired import paired_differences, require_pairs, study

METRICS = ("HR@5", "HR@10", "NDCG@5", "NDCG@10")
ITEM, RATING = "item", "rating"
# Events a base reads; unrated items beside the one left out; users that are scored at once.
EVENTS, UNRATED, AT_ONCE = 16, 100, 16
BASE_RATES, RATES = (3e-4, 1e-3, 3e-3, 1e-2), (1e-4, 1e-3, 1e-2, 1e-1)


class Ratings:
    """Ratings of a log in the order of time, those of items that training never showed left out.

    Raises:
        ValueError: the log has no times or users, several candidates a request, no field `item`, or no history of it.
    """

    def __init__(self, folder: str | Path):
        self.log = log = PackedLog(folder)
        reads = [s for s in log.schema.sequences if ITEM in [field.name for field in s.fields]]
        if log.times is None or log.users is None or log.requests is not None or not reads:
            raise ValueError(
                f"{folder} is no log of ratings: it needs users, times, one candidate a request, and a history whose "
                f"items are a field named {ITEM!r} there and on the candidate's side"
            )
        kept = log.column(ITEM) >= FIRST_ID
        self.rows = np.flatnonzero(kept)[np.argsort(log.times[kept], kind="stable")]
        self.user, self.item, self.time = log.users[self.rows], log.column(ITEM)[self.rows], log.times[self.rows]
        self.liked = log.labels[self.rows, 0] > 0
        self.seen = np.zeros((int(self.user.max()) + 1, log.schema.tables()[ITEM][0]), bool)
        self.seen[self.user, self.item] = True
        self.seen[:, :FIRST_ID] = True
        self.value = self._values(reads[0].name)
        fields = [field for field in log.schema.fields if field.side == "user" and field.name != "user"]
        fields += [field for field in log.schema.fields if field.name == ITEM]
        history = dataclasses.replace(reads[0], length=min(EVENTS, reads[0].length), timestamps=False)
        self.schema = Schema(tuple(fields), (history,), log.schema.tasks[:1])

    def _values(self, sequence: str) -> Shaped[np.ndarray, " n"]:
        """What each row's item was rated, from its event in the history; the label where events have no rating."""
        store, keys = self.log.events(sequence), self.log.keys(sequence)[self.rows]
        if RATING not in store.columns:
            return self.liked.astype(float)
        (field,) = (f for s in self.log.schema.sequences if s.name == sequence for f in s.fields if f.name == RATING)
        owner = np.repeat(np.arange(len(store.offsets) - 1), np.diff(store.offsets))
        events = owner * len(self.seen[0]) + store.columns[ITEM]
        order = np.argsort(events, kind="stable")
        place = order[np.searchsorted(events, keys * len(self.seen[0]) + self.item, sorter=order)]
        return self.log.vocabulary(field.table_name)[store.columns[RATING][place] - FIRST_ID].astype(float)

    def left_out(self, newest: int) -> Int[np.ndarray, " users"]:
        """Of each user who liked as many, the row of the `newest`-th item liked, counted from the end."""
        order = pd.DataFrame({"user": self.user, "row": np.arange(len(self.user))})[self.liked]
        return order.groupby("user")["row"].nth(-newest).to_numpy()

    def unrated(self, user: Int[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int[np.ndarray, "n count"]:
        """For each row, items that its user never rated."""
        found = rng.integers(FIRST_ID, self.seen.shape[1], (len(user), count))
        while (again := self.seen[user[:, None], found]).any():
            found[again] = rng.integers(FIRST_ID, self.seen.shape[1], int(again.sum()))
        return found

    def stacked(self, rows: Int[np.ndarray, " n"], items: Int[np.ndarray, "n C"], requests: int) -> Rows:
        """Batches of these rows' requests with these candidates, of which the first is the row's own if it is there."""
        own = self.rows[rows][:, None]
        batch = gather(self.log, self.schema, own, np.ones_like(own, bool))
        label = np.zeros(items.shape, np.float32)
        label[:, 0] = self.liked[rows] & (items[:, 0] == self.item[rows])
        batch = dataclasses.replace(
            batch,
            candidates=CandidateSide({ITEM: items.astype(np.int32)}, {}),
            labels=label[..., None],
            label_mask=np.ones((*items.shape, 1), np.float32),
            valid=np.ones(items.shape, bool),
        )
        batches = jax.tree.map(lambda x: x.reshape(-1, requests, *x.shape[1:]), batch)
        return Rows(batches, np.repeat(self.user[rows], items.shape[1]), items.reshape(-1), label.reshape(-1))


class LogStudy(Study):
    """`Study` on ratings: which were left out, every user's scores of all items, and the ranks of what was left out."""

    passes = 3

    def __init__(self, ratings: Ratings, sizes: ColdStart, seed: int, base_rate: float, newest: int = 1):
        rng = np.random.default_rng([seed, newest])
        self.ratings, self.targets = ratings, ratings.left_out(newest)
        ends = np.full(len(ratings.seen), -1, np.int64)
        ends[ratings.user[self.targets]] = ratings.time[self.targets]
        trained = np.flatnonzero(ratings.time < ends[ratings.user])
        trained = trained[len(trained) % (2 * sizes.requests) :]
        unrated = ratings.unrated(ratings.user[trained], sizes.candidates - 1, rng)
        log = ratings.stacked(trained, np.column_stack([ratings.item[trained], unrated]), sizes.requests)
        padded = np.pad(self.targets, (0, -len(self.targets) % AT_ONCE), mode="edge")
        every = np.arange(FIRST_ID, ratings.seen.shape[1])
        late = ratings.stacked(padded, np.tile(every, (len(padded), 1)), AT_ONCE)
        self.trained, self.asked = trained, padded
        self.beside = ratings.unrated(ratings.user[self.targets], UNRATED, rng)
        super().__init__(ratings.schema, sizes, seed, (log, late), base_rate)

    @functools.cached_property
    def frozen(self) -> Frozen:
        """Lists in the order of time: what is asked for later than a rating may list it, whoever asks."""
        log, late, ratings = self.log, self.late, self.ratings
        (users, late_users), items = self.vectors()
        cold, neighbours = cold_items(items, log, self.sizes)
        time = np.concatenate([
            np.repeat(ratings.time[rows], part.batches.valid.shape[-1])
            for rows, part in ((self.trained, log), (self.asked, late))
        ])  # fmt: skip
        value = np.full(len(time), np.nan)
        value[: len(log.item) : self.sizes.candidates] = ratings.value[self.trained]
        order = np.argsort(time, kind="stable")
        user, item = np.concatenate([log.user, late.user]), np.concatenate([log.item, late.item])
        liked = np.concatenate([log.label, late.label])[order] > 0
        feedback = Feedback(time[order], user[order], item[order], feedback_value(value[order]), liked)
        found, _ = feedback_lists(feedback, USERS, neighbours)
        lists = Lists(*(np.empty_like(array) for array in found))
        for new, old in zip(lists, found, strict=True):
            new[order] = np.where(old >= 0, order[old], -1)
        n = len(log.item)
        return Frozen(users, late_users, items, cold, Lists(*(x[:n] for x in lists)), Lists(*(x[n:] for x in lists)))

    def loss(self, logits: np.ndarray) -> float:
        """What rates are chosen by: the NDCG that is missed among sampled items."""
        return 1.0 - float(self.metrics(logits)["NDCG@10"].mean())

    def metrics(self, logits: np.ndarray) -> dict[str, Float[np.ndarray, " users"]]:
        """HR and NDCG of every item left out, among sampled and ("all ") among all unrated items."""
        scores = logits.reshape(len(self.asked), -1)[: len(self.targets)]
        scores = np.pad(scores, ((0, 0), (FIRST_ID, 0)), constant_values=-np.inf)
        user, place = self.ratings.user[self.targets], np.arange(len(self.targets))
        own = scores[place, self.ratings.item[self.targets]][:, None]
        sampled = (scores[place[:, None], self.beside] >= own).sum(axis=1)
        ahead = ((scores >= own) & ~self.ratings.seen[user]).sum(axis=1)
        return {name + metric: value for name, rank in (("", sampled), ("all ", ahead))
                for metric, value in ranked(rank).items()}  # fmt: skip

    @functools.cached_property
    def groups(self) -> dict[str, Bool[np.ndarray, " users"]]:
        """Whose item left out is which: all, cold, with fewer than 10 positives in the training rows, and the rest."""
        positives = np.bincount(self.log.item, weights=self.log.label, minlength=self.items)
        item = self.ratings.item[self.targets]
        few = positives[item] < 10
        return {"all": np.ones(len(item), bool), "cold": self.frozen.cold[item], "<10": few, "10+": ~few}


def ranked(ahead: Int[np.ndarray, " users"]) -> dict[str, Float[np.ndarray, " users"]]:
    """HR and NDCG of one relevant item by how many stand ahead of it."""
    found = {}
    for k in (5, 10):
        found[f"HR@{k}"] = (ahead < k).astype(float)
        found[f"NDCG@{k}"] = np.where(ahead < k, 1 / np.log2(ahead + 2.0), 0.0)
    return found


def compare_on_log(
    folder: str | Path,
    *,
    seeds: int = 5,
    sizes: ColdStart = ColdStart(),  # noqa: B008
    save: str | Path | None = None,
) -> dict[str, Any]:
    """A row for every group of items left out, metric and arm: its mean over seeds, and what it gains on the frozen
    base with the 95 % interval of paired seeds. save: a parquet file for every seed.

    Raises:
        ValueError: fewer than two seeds, or a log that is none of ratings.
    """
    require_pairs(seeds)
    ratings = Ratings(folder)
    found = find_rates(lambda rate: LogStudy(ratings, sizes, TUNING_SEED, rate, newest=2), BASE_RATES, RATES)
    rates = {arm: rate for arm, (rate, _) in found.items()}
    runs = [row for seed in range(seeds) for row in one_seed(ratings, sizes, seed, rates)]
    about = {"seeds": seeds, "log": ratings.log.identity, **dataclasses.asdict(sizes), "events": EVENTS}
    return study(about, with_rates(runs, found), summarise, save)


def one_seed(ratings: Ratings, sizes: ColdStart, seed: int, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for every group and arm of a seed."""
    own = LogStudy(ratings, sizes, seed, rates["frozen"])
    found = {arm: own.metrics(own.logits(arm, rates[arm])) for arm in ARMS}
    return [
        {"group": group, "seed": seed, "users": int(kept.sum()), "method": arm}
        | {name: float(values[kept].mean()) for name, values in metrics.items()}
        for group, kept in own.groups.items() if kept.any()
        for arm, metrics in found.items()
    ]  # fmt: skip


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `compare_on_log` from those of every seed; an arm whose rate is not bracketed gets no verdict."""
    names = [*METRICS, *("all " + name for name in METRICS)]
    long = runs.melt([name for name in runs if name not in names], names, "metric", "value")
    return without_loose_ends(paired_differences(long, "value", "frozen", ("group", "metric"), higher_is_better=True))
