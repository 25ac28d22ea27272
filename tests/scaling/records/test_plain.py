"""Plain data: what JSON can hold, nothing else."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from recscale.scaling.records.plain import plain


@dataclasses.dataclass
class Pair:
    first: float
    second: object


def test_arrays_scalars_and_records_become_plain_data():
    values = {
        1: np.float32(0.5),
        "array": np.array([[1, 2]]),
        "jax": jnp.ones(2),
        "flag": np.bool_(True),
        "lost": [float("nan"), np.inf, np.array([np.nan, 1.0])],
        "record": Pair(1.0, (Path("a"), None)),
        "more": {2},
    }
    expected = {
        "1": 0.5,
        "array": [[1, 2]],
        "jax": [1.0, 1.0],
        "flag": True,
        "lost": [None, None, [None, 1.0]],
        "record": {"first": 1.0, "second": ["a", None]},
        "more": [2],
    }
    assert plain(values) == expected
    assert json.loads(json.dumps(plain(values))) == expected
