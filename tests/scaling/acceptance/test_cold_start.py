"""The study of PROMO: a base that stays what it was, what it is given, and the table of the committed runs."""

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

from recscale.models.domains.promo import BEST, COLD, ITEM, USER, WORST, PromoConfig, promo_schema
from recscale.scaling.acceptance import cold_start
from recscale.scaling.acceptance.cold_start import (
    PROMO,
    TWO_TOWER,
    ColdStart,
    Frozen,
    Log,
    base_schema,
    by_bucket,
    draw_log,
    freeze,
    logits_of,
    prompted,
    summarise,
    train,
    trainer_of,
)
from recscale.scaling.data.feedback_lists import Lists
from recscale.scaling.data.known_truth.config import replace
from recscale.scaling.data.known_truth.world import build_world

SIZES = ColdStart(requests=16, candidates=2, batches=3, holdout=2, width=4)


@pytest.fixture(scope="module")
def world():
    return build_world(replace(cold_start.WORLD, blocks=2, history_max=4))


@pytest.fixture(scope="module")
def log(world):
    return draw_log(world, 0, SIZES)


def test_prompts_get_the_vectors_of_listed_users(log):
    rng, config = np.random.default_rng(0), PromoConfig(users=2)
    rows = len(log.item)
    lists = Lists(*(rng.integers(-1, rows, (rows, 2)) for _ in range(2)))
    users, items = rng.standard_normal((rows // 2, 4)), rng.standard_normal((64, 4))
    frozen = Frozen(users, users, items, np.arange(64) >= 13, lists, lists)
    batches = prompted(frozen, log, SIZES, config, late=False)
    row = 37
    k, r, c = np.unravel_index(row, (3, 16, 2))
    dense = batches[k].candidates.dense
    for name, array in ((BEST, lists.best), (WORST, lists.worst)):
        expected = [users[place // 2] if place >= 0 else np.zeros(4) for place in array[row]]
        np.testing.assert_allclose(dense[name][r, c], np.concatenate(expected), rtol=1e-6)
    np.testing.assert_array_equal(batches[k].user.dense[USER][r], users[row // 2])
    np.testing.assert_array_equal(dense[ITEM][r, c], items[log.item[row]])
    assert dense[COLD][r, c, 0] == (log.item[row] >= 13) and batches[k].labels[r, c, 0] == log.label[row]


def test_training_and_evaluation_are_of_different_requests(world, log):
    late = draw_log(world, 0, SIZES, evaluation=True)
    assert len(late.item) == 2 * 16 * 2 and (late.item[:32] != log.item[:32]).any()
    assert isinstance(log, Log) and len(list(log.each())) == 3
    np.testing.assert_allclose(log.p + log.q, 1)


def test_rows_are_told_apart_by_the_positives_of_their_items():
    found = {arm: np.array([1.0, 2.0, 3.0, 4.0]) for arm in (*cold_start.ARMS, "bayes")}
    found["bayes"] = found["bayes"] - 0.5
    rows = by_bucket(found | {"positives": np.array([0, 2, 9, 10])}, 3)
    means = {row["positives"]: row["excess"] for row in rows if row["method"] == "promo"}
    assert means == {"0": 1.0, "1-2": 2.0, "3-9": 3.0, "<10": 2.0, "10+": 4.0}
    assert {row["bound"] for row in rows} == {0.5} and {row["seed"] for row in rows} == {3}


def test_an_arm_at_an_outermost_rate_gets_no_verdict():
    means = {"frozen": 1.0, "longer": 0.5, "promo": 0.5}
    runs = [
        {"positives": "0", "method": arm, "seed": seed, "excess": mean + 0.01 * seed * (arm != "frozen")}
        | {"bracketed": arm != "promo"}
        for arm, mean in means.items() for seed in range(3)
    ]  # fmt: skip
    verdicts = summarise(pd.DataFrame(runs)).set_index("method")["verdict"]
    assert verdicts.to_dict() == {"frozen": "", "longer": "confirmed", "promo": "trend: best at an outermost rate"}


@pytest.mark.slow
def test_the_base_is_byte_identical_after_prompts_were_trained(world, log):
    late = draw_log(world, 0, SIZES, evaluation=True)
    base = trainer_of(TWO_TOWER, base_schema(world.config), SIZES, 1e-2, 0, {"width": 4})
    state = train(base, base.fresh_state(), list(log.each()))
    before = jax.device_get((state.params, state.tables))
    frozen = freeze(base, state, log, late, SIZES, 2)
    config = PromoConfig(users=2)
    promo = trainer_of(PROMO, promo_schema(4, 64, config), SIZES, 1e-2, 0, {"users": 2})
    given, asked = (prompted(frozen, x, SIZES, config, late=x is late) for x in (log, late))
    plain = logits_of(base, state, list(late.each()))
    fresh = promo.fresh_state()
    np.testing.assert_allclose(logits_of(promo, fresh, asked), plain, rtol=1e-5, atol=1e-6)
    after = train(promo, fresh, given)
    assert np.abs(logits_of(promo, after, asked) - plain).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.tables)))


@pytest.mark.slow
def test_prompts_learn_a_hundred_rows_by_heart(log):
    sizes, config, rng = (
        ColdStart(requests=50, candidates=2, batches=300),
        PromoConfig(users=2),
        np.random.default_rng(0),
    )
    log = dataclasses.replace(log, item=np.arange(100), label=rng.integers(0, 2, 100).astype(np.float32))
    vectors = np.concatenate([rng.standard_normal((150, 7)), np.ones((150, 1))], axis=1)
    lists = Lists(*(rng.integers(0, 100, (100, 2)) for _ in range(2)))
    frozen = Frozen(vectors[:50], vectors[:50], vectors[50:], np.ones(100, bool), lists, lists)
    (batch,) = prompted(frozen, log, sizes, config, late=False)
    trainer = trainer_of(PROMO, promo_schema(8, 100, config), sizes, 1e-2, 0, {"users": 2})
    state, losses = trainer.fresh_state(), []
    for _ in range(300):
        state, metrics = trainer.step(state, batch)
        losses.append(metrics["logloss"][0, 0])
    losses = jax.device_get(losses)
    assert min(losses) < 0.1 * losses[0]
