"""The known-truth log as a source of a training run: batches, holdout, metrics, stored truth."""

import json

import jax
import numpy as np
import pytest

from recscale.scaling.data.known_truth import build_world, make_batch, preset
from recscale.scaling.data.known_truth.card import card
from recscale.scaling.data.known_truth.evaluate import evaluate
from recscale.scaling.data.known_truth.expectations import logit
from recscale.scaling.data.known_truth.source import KnownTruthSource
from recscale.scaling.data.source import Source

SMALL = dict(quanta=64, history_max=8, blocks=4, clusters=4, pair_items=32)
FINITE = ("logloss", "excess_logloss", "ne", "auc", "gauc", "calibration", "base_rate", "entropy_floor", "asymptote")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("truth")


@pytest.fixture(scope="module")
def source(folder):
    return KnownTruthSource(
        "smoke",
        requests=64,
        candidates=2,
        log_seed=4,
        holdout_rows=1000,
        history_length=5,
        overrides=SMALL,
        cache_dir=folder,
    )


@pytest.fixture(scope="module")
def constants():
    return card(build_world(preset("smoke", **SMALL)))


def test_it_is_a_source(source):
    assert isinstance(source, Source)
    assert source.on_device
    assert source.total_rows is None
    assert source.schema.sequences[0].length == 5


def test_batches_are_those_of_the_log_cut_to_the_given_history(source):
    whole = jax.device_get(jax.jit(lambda k: make_batch(source.world, 4, k, 64, 2))(np.int32(9)))
    stream = source.iterate(8)
    next(stream)
    cut = jax.device_get(next(stream))
    np.testing.assert_array_equal(cut.labels, whole.labels)
    history, full = cut.user.histories["clicks"], whole.user.histories["clicks"]
    np.testing.assert_array_equal(history.ids["item"], full.ids["item"][:, :5])
    np.testing.assert_array_equal(history.length, np.minimum(full.length, 5))


def test_holdout_is_one_set_of_rows_whatever_the_batch(source, folder):
    batches = [jax.device_get(batch) for batch in source.holdout()]
    assert len(batches) == source.holdout_batches == 8
    valid = np.stack([batch.valid for batch in batches])
    assert valid.sum() == 1000
    assert valid.ravel()[:1000].all()
    np.testing.assert_array_equal(source.truth.valid, valid)
    np.testing.assert_array_equal(source.truth.labels, np.stack([batch.labels for batch in batches]))
    other = KnownTruthSource("smoke", requests=100, candidates=2, log_seed=4, holdout_rows=1000, overrides=SMALL)
    rows = [s.truth.rows.p[s.truth.valid] for s in (source, other)]
    np.testing.assert_array_equal(rows[0], rows[1])


def test_metrics_of_the_bayes_logit_and_of_a_constant(source, constants):
    stored = source.truth
    best = source.evaluate(logit(stored.rows.p, stored.rows.q))
    assert abs(best["excess_logloss"]) < 1e-12
    assert best["logloss"] == pytest.approx(constants["entropy_floor"])
    assert all(np.isfinite(best[name]) for name in FINITE)
    assert best["rows"] == 1000
    constant = source.evaluate(np.full(stored.rows.z.shape, -1.4))
    assert constant["auc"] == constant["gauc"] == pytest.approx(0.5, abs=1e-12)
    assert constant["excess_logloss"] > 0.04
    assert constant["recovery"].keys() == best["recovery"].keys()
    assert min(best["recovery"][name] for name in ("L", "M", "B")) > 0.9
    assert max(constant["recovery"].values()) < 1e-12
    json.dumps(constant)


def test_metrics_do_not_read_what_is_not_valid(source):
    logits = logit(source.truth.rows.p, source.truth.rows.q) + 0.3
    spoiled = np.where(source.truth.valid[..., None], logits, 77.0)
    assert source.evaluate(spoiled) == source.evaluate(logits)


def test_truth_is_stored_and_read_back(source, folder):
    before = source.truth
    names = [path.name for path in folder.iterdir()]
    assert sum("holdout" in name for name in names) == 1
    assert not any(name.endswith(".tmp") for name in names)
    again = KnownTruthSource(
        source.config, requests=64, candidates=2, log_seed=4, holdout_rows=1000, history_length=5, cache_dir=folder
    )
    again._compute_holdout = None  # reading must be enough
    jax.tree.map(np.testing.assert_array_equal, again.truth.rows, before.rows)
    np.testing.assert_array_equal(again.truth.groups, before.groups)
    assert again.truth.weighting == before.weighting == "expected positive-negative pairs of the request"


def test_facts_are_plain_and_complete(source):
    facts = source.facts()
    json.dumps(facts, allow_nan=False)
    assert facts["card"]["entropy_floor"] > facts["card"]["asymptote"]
    assert facts["log_seed"] == 4
    assert preset("smoke", **SMALL) == type(source.config)(**facts["config"])


def test_single_candidates_are_grouped_by_user_or_user_code():
    learned = KnownTruthSource("smoke", requests=256, holdout_rows=256, overrides=SMALL)
    assert learned.truth.weighting.endswith("of the user")
    assert len(np.unique(learned.truth.groups)) > 20
    given = KnownTruthSource("dense", requests=256, holdout_rows=256, overrides=dict(quanta=32, code_bits=3))
    assert given.truth.weighting.endswith("of the user code")
    assert len(np.unique(given.truth.groups)) == 8


def test_two_labels_are_evaluated_apart():
    config = preset("smoke", tasks=2, cascade=True, **SMALL)
    world = build_world(config)
    constants = card(world, rows=2**14)
    batch = jax.device_get(jax.jit(lambda k: make_batch(world, 0, k, 4096, evaluation=True))(np.uint32(0)))
    logits = np.zeros((1, 4096, 1, 2))
    metrics = evaluate(world, [batch], logits, constants)
    assert metrics["logloss_convert"] == pytest.approx(
        constants["convert"]["entropy_floor"] + metrics["excess_logloss_convert"]
    )
    seen = np.asarray(batch.labels)[:, 0, 0] == 1
    assert metrics["observed_logloss_convert"] == pytest.approx(np.log(2))
    gap = metrics["observed_excess_convert"] - metrics["excess_logloss_convert"]
    assert abs(gap) < 3 * metrics["observed_excess_se_convert"]
    assert 400 < seen.sum() < 2000
    assert "M" not in metrics["recovery_convert"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(requests=0), "must be positive"),
        (dict(requests=8, history_length=300), "1 to 32 events"),
        (dict(requests=8, config="tiny"), "unknown preset"),
        (dict(requests=8, overrides={"quantum": 3}), "unknown fields quantum; did you mean 'quanta'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        KnownTruthSource(**{"config": "smoke", **arguments})
