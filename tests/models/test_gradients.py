"""The gradient of every training loss is that of its value, by central differences in float64: of every architecture
and of every auxiliary loss."""

import jax
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64
from tiny_models import data_of, model_of

from recscale.models import list_models
from recscale.models.inputs.tables import Table
from recscale.models.layers.losses import training_loss

SPARSE = dict(experts=3, active_ratio=0.5)
LOSSES = [
    ("rankmixer", SPARSE | dict(lam0=0.5)),
    ("rankmixer", SPARSE | dict(dtsi_merge="two_losses")),
    ("rankmixer", SPARSE | dict(router="topk", balance_weight=0.5)),
    ("tokenmixer_large", dict(experts=3, active=2, gate_norm="all", balance_weight=0.5, z_weight=0.5)),
    ("tokenmixer_large", dict(layers=4, aux_weight=0.5, aux_layers=(1, 2))),
    ("tokenmixer_large", dict(layers=4, aux_mode="independent", aux_weight=0.5)),
    ("msn", dict(module="smoe", balance_weight=0.5)),
    ("msn", dict(module="msn_smoe", balance_weight=0.5)),
    ("pkm", dict(query_norm="layer", theta="right_dxd", key_norm="layer", value_op="swilu")),
    ("pkm", dict(value_op="prevalue", score_scale="learned")),
    ("pkm", dict(value_op="expert", read_weights="sigmoid")),
    ("lmn", dict(target="learned", target_gradient=True, memory_weight=0.5)),
    ("mdl", dict(token_state="split")),
    ("dlrm_mlp", dict(batch_norm=True, interaction="dot", interaction_width=4)),
    ("dcnv2", dict(batch_norm=True, rank=3, experts=2, structure="parallel")),
    ("hyformer", dict(encoder="full", query_pools="own")),
    ("longer", dict(query_strategy="learnable", readout="flatten_all")),
    ("ads", dict(scorer="can")),
]


# LEMUR trains its encoder by a sample of the items alone; tests of its own say what that sample teaches.
NAMES = [name for name in list_models() if name != "lemur"]


@pytest.mark.parametrize(("name", "flags"), [*((name, {}) for name in NAMES), *LOSSES], ids=str)
def test_a_loss_falls_as_its_gradient_says(name, flags):
    inputs, labels, mask = data_of(name)
    kinds = nnx.Any(nnx.Param, Table)
    graph = nnx.split(nnx.eval_shape(lambda: model_of(name, flags)), kinds, ...)[0]
    params, rest = in_float64(lambda: nnx.split(model_of(name, flags), kinds, ...)[1:])()

    def loss(params, rest, inputs):
        output = nnx.merge(graph, params, rest, copy=True)(inputs, key=jax.random.key(3))
        return training_loss(output, labels, mask)[0]

    rng, run = np.random.default_rng(4), in_float64(jax.value_and_grad(loss))
    step = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)
    up, down = (run(jax.tree.map(lambda p, d, h=h: p + h * d, params, step), rest, inputs)[0] for h in (1e-6, -1e-6))
    gradient = run(params, rest, inputs)[1]
    slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
    assert slope == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-6) and abs(slope) > 1e-6
