"""PROMO on an imported log of ratings: what is left out, lists without a leak, ranks against a double loop."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from recscale.models.inputs import Field, Schema, Sequence, Task
from recscale.scaling.acceptance.cold_start import ARMS, ColdStart
from recscale.scaling.acceptance.cold_start_log import METRICS, LogStudy, Ratings, compare_on_log, ranked, summarise
from recscale.scaling.data.stored_log.card import ReadReport
from recscale.scaling.data.stored_log.histories import history_ends
from recscale.scaling.data.stored_log.packed import EventStore, LogArrays, write_packed

USERS, ITEMS, EACH = 20, 150, 20
SIZES = ColdStart(requests=8, candidates=3, batches=20, width=4, neighbours=2)


def made_up(event_item="item"):
    """Ratings of 1 to 5, liked from 4 on; two fall on every tick; item 1 was never shown in training."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(USERS), EACH)
    item = np.concatenate([rng.choice(np.arange(1, ITEMS), EACH, replace=False) for _ in range(USERS)]).astype(np.int32)
    time, stars = rng.permutation(USERS * EACH) // 2, rng.integers(1, 6, USERS * EACH)
    place, offsets, values = np.lexsort((time, user)), np.arange(USERS + 1) * EACH, np.asarray([4, 3, 5, 2, 1])
    code = (np.argsort(values)[stars - 1] + 2).astype(np.int32)
    event = Field(event_item, "user", 3, ITEMS, table="item"), Field("rating", "user", 3, 7)
    fields = Field("user", "user", 3, USERS + 2), Field("age", "user", 3, 5), Field("item", "candidate", 3, ITEMS)
    return LogArrays(
        name="ratings",
        schema=Schema(fields, (Sequence("history", 6, event, timestamps=True),), (Task("like"),)),
        splits={"train": (0, 300), "valid": (300, 350), "test": (350, 400)},
        rows={"user": (user + 2).astype(np.int32), "age": (user % 3 + 2).astype(np.int32), "item": item},
        labels=(stars >= 4).astype(np.uint8)[:, None],
        label_mask=np.ones((len(user), 1), np.uint8),
        users=user,
        times=time,
        events={"history": EventStore(offsets, time[place], {event_item: item[place], "rating": code[place]})},
        ends={"history": history_ends(offsets, time[place], user, time)},
        vocabularies={"item": np.arange(2, ITEMS), "rating": values},
        report=ReadReport(rows_read=len(user)),
        facts={},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_packed(made_up(), tmp_path_factory.mktemp("ratings") / "log").folder


@pytest.fixture(scope="module")
def ratings(folder):
    return Ratings(folder)


class Untrained(LogStudy):
    """With vectors drawn at random: nothing is trained."""

    def vectors(self):
        draw, width = np.random.default_rng(0), self.sizes.width
        users = [draw.standard_normal((part.batches.valid[..., 0].size, width)) for part in (self.log, self.late)]
        return users, draw.standard_normal((self.items, width))


@pytest.fixture(scope="module")
def study(ratings):
    return Untrained(ratings, SIZES, 0, 1e-2)


def test_ratings_are_those_of_the_rows_and_liked_from_four_on(ratings):
    assert ((ratings.value >= 4) == ratings.liked).all() and set(ratings.value) == {1, 2, 3, 4, 5}
    assert (np.diff(ratings.time) >= 0).all() and (ratings.item > 1).all()
    assert len(ratings.user) == (ratings.log.column("item") > 1).sum() < USERS * EACH
    assert [field.name for field in ratings.schema.user_fields] == ["age"]


def test_what_is_left_out_is_newer_than_all_that_is_trained_on(ratings, study):
    for row in study.targets:
        same = ratings.user == ratings.user[row]
        assert ratings.liked[row] and not (ratings.liked & same)[row + 1 :].any()
        assert (ratings.time[study.trained[same[study.trained]]] < ratings.time[row]).all()
    assert len(study.targets) == len(set(ratings.user))
    own = study.log.item.reshape(-1, 3)
    np.testing.assert_array_equal(own[:, 0], ratings.item[study.trained])
    assert not ratings.seen[ratings.user[study.trained][:, None], own[:, 1:]].any()
    np.testing.assert_array_equal(study.log.label.reshape(-1, 3)[:, 0] > 0, ratings.liked[study.trained])
    assert not study.log.label.reshape(-1, 3)[:, 1:].any()


def check_lists(study):
    """Every listed row is a rating, earlier than the request it is listed for, and another user's; how many are."""
    ratings, frozen, many = study.ratings, study.frozen, study.sizes.candidates
    every = study.late.batches.valid.shape[-1]
    asked = np.repeat(ratings.time[study.trained], many), np.repeat(ratings.time[study.asked], every)
    value = np.repeat(ratings.value[study.trained], many)
    listed = 0
    for lists, asking, when in (
        (frozen.lists, study.log.user, asked[0]),
        (frozen.late_lists, study.late.user, asked[1]),
    ):
        for array, positive in ((lists.best, True), (lists.worst, False)):
            row, place = np.nonzero(array >= 0)
            there = array[row, place]
            assert (asked[0][there] < when[row]).all() and (study.log.user[there] != asking[row]).all()
            assert (there % many == 0).all(), "a sampled item is nobody's feedback"
            assert ((value[there] >= 4) == positive).all()
            listed += len(there)
    return listed


def test_no_list_holds_what_came_later_or_who_asks(study):
    assert check_lists(study) > 1000 and (study.frozen.late_lists.best >= 0).mean() > 0.1


def test_ranks_against_a_double_loop(ratings, study):
    scores = np.random.default_rng(1).integers(0, 40, (len(study.asked), ITEMS - 2)).astype(float)
    found = study.metrics(scores.reshape(-1))
    for k, row in enumerate(study.targets):
        user, item = ratings.user[row], ratings.item[row]
        others = [i for i in range(2, ITEMS) if not ratings.seen[user, i]]
        for name, rivals in (("", study.beside[k]), ("all ", others)):
            ahead = sum(scores[k, i - 2] >= scores[k, item - 2] for i in rivals)
            assert found[f"{name}HR@10"][k] == (ahead < 10)
            assert found[f"{name}NDCG@5"][k] == pytest.approx(1 / np.log2(ahead + 2) if ahead < 5 else 0)
    assert ranked(np.asarray([0]))["NDCG@5"] == 1


def test_a_metric_gains_where_it_rises():
    base = {"group": "all", "users": 5, "rate": 1e-3, "bracketed": True}
    base |= {name: 0.5 for name in (*METRICS, *("all " + name for name in METRICS))}
    runs = [base | {"method": arm, "seed": seed} | ({"HR@5": 0.6 + 0.01 * seed} if arm == "promo" else {})
            for arm in ("frozen", "promo") for seed in range(3)]  # fmt: skip
    found = summarise(pd.DataFrame(runs)).set_index(["metric", "method"])
    row = found.loc[("HR@5", "promo")]
    assert row["saved"] == pytest.approx(0.11) and row["value"] == pytest.approx(0.61) and row["verdict"] == "confirmed"
    assert found.loc[("all HR@5", "promo"), "verdict"] == "not resolved"


def test_another_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no log of ratings: it needs users, times, one candidate a request"):
        Ratings(write_packed(made_up("film"), tmp_path / "log").folder)


@pytest.mark.slow
def test_the_table_has_every_arm_and_group(folder, tmp_path):
    found = compare_on_log(folder, seeds=2, sizes=SIZES, save=tmp_path / "runs.parquet")
    rows = pd.DataFrame(found["rows"])
    assert set(rows["method"]) == set(ARMS) and {"all", "cold"} <= set(rows["group"]) and len(set(rows["metric"])) == 8
    assert rows["value"].between(0, 1).all() and (rows.loc[rows["method"] == "frozen", "saved"] == 0).all()
    runs = pd.read_parquet(tmp_path / "runs.parquet")
    assert dataclasses.asdict(SIZES).items() <= found.items() and set(runs["seed"]) == {0, 1}


@pytest.mark.slow
def test_the_real_set_has_its_ratings_and_no_list_of_it_leaks(ml100k):
    ratings = Ratings(ml100k.folder)
    assert len(ratings.seen) == 943 and ((ratings.value >= 4) == ratings.liked).all()
    assert 940 <= len(ratings.left_out(1)) <= 943
    assert check_lists(Untrained(ratings, ColdStart(), 0, 1e-2)) > 10**6
