"""Combinators are pure data: their points, their order, and what they refuse."""

import json

import pytest

from recscale import sweeps


def test_axis_product_zip_and_chain_give_the_documented_points():
    rates, seeds = sweeps.axis("training.lr", [1e-3, 3e-3]), sweeps.seeds(2)
    assert sweeps.product(rates, seeds) == [
        {"training.lr": 1e-3, "seed": 0},
        {"training.lr": 1e-3, "seed": 1},
        {"training.lr": 3e-3, "seed": 0},
        {"training.lr": 3e-3, "seed": 1},
    ]
    assert sweeps.zip(rates, seeds) == [{"training.lr": 1e-3, "seed": 0}, {"training.lr": 3e-3, "seed": 1}]
    assert sweeps.chain(rates, seeds) == [*rates, *seeds]
    assert sweeps.product() == [{}]


def test_ladders_set_their_keys():
    assert sweeps.by_dense_params([1e3, 1e4], training__lr=1e-2) == [
        {"size.dense_params": 1e3, "training.lr": 1e-2},
        {"size.dense_params": 1e4, "training.lr": 1e-2},
    ]
    assert sweeps.by_train_flops([1e6]) == [{"size.train_flops": 1e6}]
    assert sweeps.by_flop_budget([1e12]) == [{"size.budget_flops": 1e12}]
    assert sweeps.by_history_length([16, 32]) == [{"data.history_length": 16}, {"data.history_length": 32}]
    assert sweeps.by_memory_slots([64], key="model.slots") == [{"model.slots": 64}]
    assert sweeps.architectures(["rankmixer"]) == [{"architecture": "rankmixer"}]


def test_sweeps_are_plain_json():
    sweep = sweeps.product(sweeps.architectures(["a", "b"]), sweeps.by_dense_params([1e3]), sweeps.seeds(3))
    assert json.loads(json.dumps(sweep)) == sweep and len(sweep) == 6


def test_combinators_do_not_share_points():
    first = sweeps.axis("seed", [0])
    sweeps.product(first)[0]["seed"] = 7
    sweeps.chain(first)[0]["seed"] = 7
    assert first == [{"seed": 0}]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sweeps.axis("seed", []), "axis 'seed' has no values"),
        (lambda: sweeps.axis("seed", [1, 2, 1]), "gives 1 twice"),
        (lambda: sweeps.product(sweeps.seeds(2), sweeps.seeds(3)), "seed is set by two sweeps"),
        (lambda: sweeps.zip(sweeps.seeds(2), sweeps.axis("training.lr", [1.0])), r"one length, got \[2, 1\]"),
        (lambda: sweeps.by_dense_params([1e3], size__dense_params=1e4), "size.dense_params is set by two"),
        (lambda: sweeps.seeds(0), "at least one seed"),
    ],
)
def test_impossible_sweeps_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rate_search_tries_every_shape_equally_often_on_rows_of_its_own():
    shapes = sweeps.noted(sweeps.axis("model.width", [8, 16]), match_id="small")
    points = sweeps.product(shapes, sweeps.axis("training.lr", [4e-3]), sweeps.seeds(2))
    searched = sweeps.rate_search(points, trials=3, factor=2.0, log_seed=7)
    assert len(searched) == 6  # seeds are no shapes
    assert {(p["model.width"], p["training.lr"]) for p in searched} == {
        (width, rate) for width in (8, 16) for rate in (2e-3, 4e-3, 8e-3)
    }
    assert all(p["data.log_seed"] == 7 and p["seed"] == 0 for p in searched)
    assert len({p["note.match_id"] for p in searched}) == 2  # a name a shape, by which its best rate is found again
    assert len(sweeps.rate_search(points[:1], trials=4, factor=3.0)) == 4
    for wrong in ({"trials": 2}, {"trials": 6}, {"factor": 1.0}):
        with pytest.raises(ValueError, match="3 to 5 trials"):
            sweeps.rate_search(points, **wrong)
    with pytest.raises(ValueError, match="starts from a rate"):
        sweeps.rate_search(shapes)


def test_only_columns_of_the_run_table_can_be_noted():
    assert sweeps.noted([{"seed": 0}], lr_trials=3) == [{"seed": 0, "note.lr_trials": 3}]
    with pytest.raises(ValueError, match="no run table has a column for the note 'mood'"):
        sweeps.noted([{"seed": 0}], mood="good")
