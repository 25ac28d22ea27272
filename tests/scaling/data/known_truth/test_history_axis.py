"""The history axis on both data sets: a shorter history is the newest part of a longer one, down to the model."""

import jax
import numpy as np
import pytest
from flax import nnx

from recscale.models import build, count
from recscale.models.inputs.tables import EmbeddingTables, embed, table_lookup
from recscale.scaling.data import make_source
from recscale.sweeps import by_history_length

CONFIG = dict(encoder=dict(event_width=4, merge=2, inner_heads=2, head_dim=4), backbone=dict(widths=(8,)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["known_truth", "stored"])
def test_by_history_length(name, write_recbole, load_movielens, tmp_path):
    data = {"name": name, "preset": "smoke", "holdout_rows": 8}
    if name != "known_truth":
        data = {"name": name, "root": str(load_movielens(write_recbole(tmp_path / "set")).folder)}
    batches, costs = [], []
    for point in by_history_length([3, 8]):
        source = make_source(data | {"history_length": point["data.history_length"]}, requests=4)
        (sequence,) = source.schema.sequences
        assert sequence.length == point["data.history_length"]
        batch = jax.tree.map(np.asarray, jax.jit(source.batch)(0) if source.on_device else source.batch(0))
        batches.append(batch.user.histories[sequence.name])
        costs.append(count("longer", source.schema, CONFIG).forward_flops_user)
        tables = EmbeddingTables(source.schema, rngs=nnx.Rngs(0))
        lookup = table_lookup({key: table[...] for key, table in tables.tables.items()})
        model = build("longer", source.schema, CONFIG, rngs=nnx.Rngs(0))
        assert np.isfinite(jax.jit(model.__call__)(embed(source.schema, batch, lookup)).logits).all()
    short, long = batches
    assert costs[0] < costs[1]
    np.testing.assert_array_equal(short.length, np.minimum(long.length, 3))
    for key, ids in short.ids.items():
        np.testing.assert_array_equal(ids, long.ids[key][:, :3])
