"""The study of PROMO: a base that stays what it was, what it is given, and the table of the committed runs."""

import jax
import numpy as np
import pandas as pd
import pytest

from recscale.models.domains.promo import BEST, COLD, ITEM, NETWORK, USER, WORST, PromoConfig, promo_schema
from recscale.scaling.acceptance import cold_start
from recscale.scaling.acceptance.cold_start import (
    PROMO,
    ColdStart,
    Frozen,
    Log,
    Rows,
    Study,
    base_schema,
    by_bucket,
    draw_log,
    logits_of,
    prompted,
    summarise,
    train,
    trainer_of,
)
from recscale.scaling.data.feedback_lists import Lists
from recscale.scaling.data.known_truth.config import replace
from recscale.scaling.data.known_truth.world import build_world
from recscale.scaling.training.checkpoints import Checkpoints

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
    batches = list(prompted(frozen, log, SIZES, config, late=False))
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


@pytest.fixture(scope="module")
def prompts(world, log):
    """A study, a trainer of prompts, and the batches it is given and asked."""
    study = Study(base_schema(world.config), SIZES, 0, (log, draw_log(world, 0, SIZES, evaluation=True)), 1e-2)
    config = PromoConfig()
    trainer = trainer_of(PROMO, promo_schema(4, study.items, config), SIZES, 1e-2, 0, {})
    parts = (study.log, study.late)
    return study, trainer, *(list(prompted(study.frozen, x, SIZES, config, late=x is study.late)) for x in parts)


@pytest.mark.slow
def test_the_base_is_byte_identical_after_prompts_were_trained(prompts):
    study, trainer, given, asked = prompts
    before, plain, fresh = jax.device_get(study.state), study.logits("frozen", 0.0), trainer.fresh_state()
    np.testing.assert_allclose(logits_of(trainer, fresh, asked), plain, rtol=1e-5, atol=1e-6)
    after = train(trainer, fresh, given)
    assert np.abs(logits_of(trainer, after, asked) - plain).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(study.state))


@pytest.mark.slow
def test_stopped_prompts_go_on_to_the_same_bits(prompts, tmp_path):
    _, trainer, given, _ = prompts

    def run(state, batches):
        for batch in batches:
            state, _ = trainer.step(state, batch)
        return state

    whole, half = run(trainer.fresh_state(), given), run(trainer.fresh_state(), given[:2])
    first = Checkpoints(tmp_path)
    first.save(2, {"step": 2, "has_trunk": False}, half, None)
    first.close()
    _, restored, _ = Checkpoints(tmp_path).restore(trainer.fresh_state())
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(x) for x in (whole, run(restored, given[2:]))))
    assert np.abs(whole.tables[NETWORK]).max() > 0


@pytest.mark.slow
def test_prompts_learn_a_hundred_rows_by_heart(log):
    sizes, config, rng = (
        ColdStart(requests=50, candidates=2, batches=300),
        PromoConfig(users=2),
        np.random.default_rng(0),
    )
    batches = log.batches.replace(valid=np.ones((1, 50, 2), bool))
    log = Rows(batches, log.user, np.arange(100), rng.integers(0, 2, 100).astype(np.float32))
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
