"""A data set that this package lacks, named by its address (trained on, and by entry point: tests/test_madeup.py)."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from recscale.scaling.data import Source, make_source

MADEUP = Path(__file__).parents[2] / "madeup"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder on the import path with somebody's package."""
    shutil.copytree(MADEUP / "recscale_madeup", tmp_path / "recscale_madeup")
    (tmp_path / "unfinished_set.py").write_text("def unfinished(asked):\n    return object()\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_set_named_by_its_address(elsewhere):
    config = {"name": "recscale_madeup.dataset:Coins", "overrides": {"gap": 0.8}, "log_seed": 5, "holdout_rows": 1024}
    source = make_source(config, requests=64, candidates=2)
    assert isinstance(source, Source) and source.facts() == {"name": "coins", "seed": 5, "gap": 0.8, "rejected": {}}
    stream = source.iterate(7)
    np.testing.assert_array_equal(next(stream).labels, source.batch(7).labels)
    held = list(source.holdout())
    assert len(held) == 8
    even = np.stack([batch.candidates.ids["item"] % 2 == 0 for batch in held])[..., None]
    assert source.evaluate(np.where(even, 1.0, -1.0))["auc"] > 0.85


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            "recscale_madeup.dataset:Dice",
            ValueError,
            "data set 'recscale_madeup.dataset:Dice': .* has no attribute 'Dice'",
        ),
        ("coins_for_nobody:Coins", ValueError, "there is no module 'coins_for_nobody'"),
        ("unfinished_set:unfinished", ValueError, "an object of type object, no Source: it lacks schema, req"),
        ("recscale_madeup.dataset", KeyError, "unknown data set 'recscale_madeup.dataset'"),
    ],
)
def test_a_wrong_address_is_explained(elsewhere, name, error, text):
    with pytest.raises(error, match=text):
        make_source({"name": name}, requests=8)
