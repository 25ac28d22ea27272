"""int8 weights on a trained model: what ranking loses."""

import jax
import numpy as np
import pytest
from flax import nnx

from recscale.models import build
from recscale.models.inputs.tables import embed, table_lookup
from recscale.models.layers.quantisation import quantize
from recscale.scaling.data import make_source
from recscale.scaling.data.metrics import auc
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer


@pytest.mark.slow
def test_auc_of_a_trained_model_stays():
    """RankMixer after 400 steps on the log whose signal is in given code signs: AUC changes by less than 1e-3."""
    source = make_source({"name": "known_truth", "preset": "dense"}, requests=512)
    config = get_config("rankmixer")
    config.model.update(tokens=8, width=32, hidden=64, layers=1)
    trainer = make_trainer(config, source, [(0, 3e-3)], warmup=20)
    state = trainer.fresh_state()
    for _ in range(400):
        state, metrics = trainer.step(state)
    abstract = nnx.eval_shape(lambda: build("rankmixer", source.schema, config.model, rngs=nnx.Rngs(0)))
    graph, *_ = nnx.split(abstract, nnx.Param, ...)
    model = nnx.merge(graph, *(jax.tree.map(lambda x: x[0], part) for part in (state.params, state.other)))
    lookup = table_lookup({name: table[0] for name, table in state.tables.items()})
    batches = [jax.jit(source.batch)(10_000 + i) for i in range(16)]  # never trained on
    run = jax.jit(lambda m, b: m(embed(source.schema, b, lookup)).logits)
    labels = np.concatenate([np.asarray(b.labels).ravel() for b in batches])

    def auc_of(m):
        return auc(np.concatenate([np.asarray(run(m, b)).ravel() for b in batches]), labels)

    trained, served = auc_of(model), auc_of(quantize(model))
    assert trained > 0.6
    assert abs(trained - served) < 1e-3
