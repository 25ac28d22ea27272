"""Conditions on rows: what `--where` says yes to, and what it cannot reach."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.tables.conditions import rows_where

TABLE = pd.DataFrame(
    {
        "dense_params": [1e3, 1e4, 1e5, np.nan],
        "examples": [10, 20, 30, 40],
        "decayed": [True, False, True, None],
        "dataset": ["NA", "b", None, "c"],
        "model.combine": ["sum", "cat", "sum", "cat"],
        "learning rate": [0.1, 0.2, 0.3, 0.4],
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("dense_params > 1e3", [1, 2]),
        ("1e3 < dense_params <= 1e4", [1]),
        ("decayed", [0, 2]),
        ("not decayed", [1]),
        ("decayed == True and examples >= 20", [2]),
        ("~decayed | (examples == 40)", [1, 3]),
        ("decayed and dataset == 'NA' or examples == 20", [0, 1]),
        ("dataset in ['NA', 'c']", [0, 3]),
        ("dataset not in ('NA',) and examples < 35", [1, 2]),
        ("examples in {10, 20}", [0, 1]),
        ("model.combine == 'sum'", [0, 2]),
        ("`model.combine` == 'sum' and `learning rate` > .2", [2]),
        ("examples * 100 / dense_params - 1 >= 0", [0]),
        ("-examples > -15", [0]),
    ],
)
def test_rows_that_meet_a_condition(where, rows):
    assert list(np.flatnonzero(rows_where(TABLE, where))) == rows


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("@pd.io.common.os.system('true')", "invalid syntax"),
        ("pd.io.common.os.system('true') == 0", "is not part of a condition"),
        ("dense_params.to_csv('/tmp/out') == 0", "is not part of a condition"),
        ("dense_params.__class__ == 0", "no column 'dense_params.__class__'"),
        ("().__class__.__bases__ == 0", "no column '().__class__.__bases__'"),
        ("__import__('os') == 0", "is not part of a condition"),
        ("[x for x in dataset] == 0", "is not part of a condition"),
        ("(lambda: 0)() == 0", "is not part of a condition"),
        ("examples[0] == 10", "is not part of a condition"),
        ("(x := 1) == examples", "is not part of a condition"),
        ("f'{examples}' == dataset", "is not part of a condition"),
        ("examples ** 9 > 1", "is not part of a condition"),
        ("examples = 3", "invalid syntax"),
        ("exampels > 3", "did you mean 'examples'"),
        ("learning rate > .1", "invalid syntax"),
        ("learning > .1", "stands in back-ticks"),
        ("`learning_rate` > .1", "did you mean 'learning rate'"),
        ("examples == '10'", "column 'examples' holds numbers and is compared with a text"),
        ("dataset == 3", "column 'dataset' holds texts and is compared with a number"),
        ("dataset in [1, 'b']", "column 'dataset' holds texts and is compared with a number"),
        ("dataset in 'NAb'", "is `in` a list"),
        ("dataset is None", "is not part of a condition"),
        ("examples and decayed", "'examples' is not a condition"),
        ("examples", "is not a condition on the rows"),
        ("1 < 2", "needs a column on one side"),
        ("(" * 500 + "decayed" + ")" * 500, "cannot be evaluated"),
    ],
)
def test_everything_else_is_refused_with_its_name(where, words):
    with pytest.raises(ValueError, match="where=") as told:
        rows_where(TABLE, where)
    assert words in str(told.value)
