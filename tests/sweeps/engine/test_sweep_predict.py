"""Predicted memory and time of a job: what is added for another replica, horizon, held-out row, and so on."""

import types

import pytest

from recscale.models.inputs import Field, Schema, Sequence, Task
from recscale.scaling.training import get_config
from recscale.sweeps.engine import predict

# Tables of 100 rows of 4 and 50 rows of 8 numbers. A row has 12 of its own and a history of 6 times 8.
SCHEMA = Schema(
    (Field("user", "user", 4, 100), Field("item", "candidate", 8, 50, table="items")),
    (Sequence("past", 6, (Field("past_item", "user", 8, 50, table="items"),)),),
    (Task("click"),),
)
WIDTH = 12 + 6 * 8
COUNTS = types.SimpleNamespace(dense_params=6_400, forward_flops_per_row=2_000.0)


def config_of(rows=1_000, embedding="rowwise_adagrad", optimizer="adam", requests=16):
    config = get_config("dlrm_mlp")
    config.data.holdout_rows, config.training.requests, config.training.candidates = rows, requests, 2
    config.training.embedding_optimizer, config.training.optimizer = embedding, optimizer
    return config


def peak(config=None, replicas=1, horizons=1, record=0):
    options = dict(replicas=replicas, horizons=horizons, record=record)
    return predict.peak_memory_bytes(config or config_of(), SCHEMA, COUNTS, **options)


@pytest.mark.parametrize(
    ("embedding", "optimizer", "rows", "per_weight"),
    [
        ("rowwise_adagrad", "adam", 100 * (4 + 1) + 50 * (8 + 1), 3),
        ("rowwise_adam", "rmsprop", 100 * (3 * 4 + 1) + 50 * (3 * 8 + 1), 2),
        ("rowwise_sgd", "adam", 100 * 4 + 50 * 8, 3),
        ("rowwise_adam", "adagrad", 100 * (3 * 4 + 1) + 50 * (3 * 8 + 1), 2),
    ],
)
def test_a_state_is_weights_tables_and_what_their_optimisers_keep(embedding, optimizer, rows, per_weight):
    config = config_of(embedding=embedding, optimizer=optimizer)
    state = 4 * (per_weight * COUNTS.dense_params + rows)
    assert peak(config, horizons=3) - peak(config) == state  # the trunk that waits
    kept = predict.KEPT_CHECKPOINTS + 1
    for horizons, copies in ((1, 1), (2, 2), (3, 2)):
        found = predict.checkpoint_bytes(config, SCHEMA, COUNTS, replicas=5, horizons=horizons)
        assert found == kept * copies * 5 * state


def test_memory_is_the_process_its_replicas_the_holdout_and_the_record():
    state, tables = 4 * (3 * 6_400 + 950), 4 * 950
    copies = 4 * 6_400 * 3  # gradient, update and what the checkpoint copies
    # A fan-in of 10, the square root of a 64th of the weights: 100 activations a row in four copies, and the inputs.
    batch = 4 * 16 * 2 * 4 * (100 + WIDTH)
    assert peak(replicas=2) - peak() == state + copies + tables + batch
    assert peak(config_of(requests=32)) - peak() == batch
    assert peak(config_of(rows=3_000)) - peak() == 4 * 2_000 * WIDTH
    assert peak(record=12_345) - peak() == 12_345
    assert peak() == 900_000_000 + state + copies + tables + batch + 4 * 1_000 * WIDTH


def test_time_is_compiling_products_and_rows():
    assert predict.seconds(0.0, 0.0, 1e9) == 10.0
    assert predict.seconds(1e9, 1e6, 1e9) == pytest.approx(10 + 4 + 4)
