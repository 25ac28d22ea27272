"""Rows that are drawn once and kept: the same batches as drawn one by one, whatever their size."""

import jax
import numpy as np
import pytest

from recscale.scaling.data import Recordable
from recscale.scaling.data.known_truth import recorded
from recscale.scaling.data.known_truth.source import KnownTruthSource

WORLD = {"quanta": 24, "code_bits": 3}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(recorded, "_PIECE", 64)
    recorded._kept.clear()


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("soft", [True, False])
def test_replayed_batches_are_those_drawn(candidates, soft):
    source = KnownTruthSource("dense", requests=24, candidates=candidates, overrides={**WORLD, "soft_labels": soft})
    assert isinstance(source, Recordable)
    record = source.record(7)
    assert record is not None and sum(x.nbytes for x in jax.tree.leaves(record)) == source.recorded_bytes(7)
    replay = jax.jit(source.replay)
    for index in (0, 6):
        drawn, replayed = source.batch(np.int32(index)), replay(record, np.int32(index))
        assert jax.tree.structure(drawn) == jax.tree.structure(replayed)
        np.testing.assert_allclose(replayed.labels, drawn.labels, atol=1e-6 if soft else 0)
        for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(replayed), strict=True):
            if one.shape != drawn.labels.shape:
                np.testing.assert_array_equal(one, other)


def test_one_log_serves_every_batch_size_and_grows():
    small, large = (KnownTruthSource("dense", requests=r, overrides=WORLD) for r in (16, 32))
    first = small.record(4)
    assert large.record(2) is first
    longer = large.record(5)
    assert len(longer.labels) == 192 and small.record(4) is longer
    np.testing.assert_array_equal(longer.labels[:64], first.labels)
    other = KnownTruthSource("dense", requests=16, overrides=WORLD, log_seed=1).record(4)
    assert not np.array_equal(other.labels, first.labels)


def test_what_is_drawn_in_the_step(monkeypatch):
    assert KnownTruthSource("smoke", requests=16).record(4) is None
    assert KnownTruthSource("dense", requests=16, overrides={**WORLD, "codes": "learned"}).recorded_bytes(4) == 0
    monkeypatch.setattr(recorded, "MOST_BYTES", 100)
    assert KnownTruthSource("dense", requests=16, overrides=WORLD).record(4) is None
