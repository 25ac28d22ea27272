"""Padding counts nowhere: garbage in rows that are not valid moves no loss, no statistic, no variable, no gradient and
no real logit, in training and in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models import build, list_models
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.tables import Table
from recscale.models.layers.losses import training_loss

R, C = 6, 3

# Sparse experts, at sizes of their own: flags beyond the architecture's small configuration.
_RANKMIXER = dict(tokens=4, width=8, hidden=32, layers=2, experts=4)
_LARGE = dict(tokens=5, width=10, hidden=32, layers=2, experts=4, active=3)
_MSN = dict(tokens=4, width=8, layers=2)
SPARSE = {
    "rankmixer relu": ("rankmixer", _RANKMIXER),
    "rankmixer topk": ("rankmixer", _RANKMIXER | dict(router="topk", active_ratio=0.5, balance_weight=0.1)),
    **{
        f"rankmixer {merge}": ("rankmixer", _RANKMIXER | dict(dtsi_merge=merge))
        for merge in ("two_losses", "mean_gates", "train_only", "infer_only")
    },
    **{
        f"rankmixer relu {path}": ("rankmixer", _RANKMIXER | dict(expert_path=path, active_ratio=0.5))
        for path in ("masked", "capacity", "ragged")
    },
    **{
        f"rankmixer topk {path}": (
            "rankmixer",
            _RANKMIXER | dict(router="topk", active_ratio=0.5, expert_path=path, balance_weight=0.1),
        )
        for path in ("masked", "capacity", "ragged")
    },
    "rankmixer serve_cap": ("rankmixer", _RANKMIXER | dict(serve_cap=2)),
    "tokenmixer_large": ("tokenmixer_large", _LARGE | dict(balance_weight=0.1, z_weight=0.1)),
    "tokenmixer_large global": ("tokenmixer_large", _LARGE | dict(expert_scope="global", balance_weight=0.1)),
    "msn smoe": ("msn", _MSN | dict(module="smoe", balance_weight=0.1)),
    "msn msn_smoe": ("msn", _MSN | dict(module="msn_smoe", balance_weight=0.1)),
    "pkm batch norm": ("pkm", dict(query_norm="batch")),
}
QUICK = ("rankmixer relu", "rankmixer topk")


def garbage(inputs, valid):
    """The inputs with everything of padded rows, and of requests that have no other, replaced."""
    rng = np.random.default_rng(7)
    requests = jnp.asarray(valid.any(axis=1))

    def junk(x, real):
        if jnp.issubdtype(x.dtype, jnp.integer):
            other = jnp.asarray(rng.integers(0, 5, x.shape), x.dtype)
        else:
            other = jnp.asarray(30 * rng.standard_normal(x.shape), x.dtype)
        return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - real.ndim)), x, other)

    user = jax.tree.map(lambda x: junk(x, requests), inputs.user)
    fields = {name: junk(x, jnp.asarray(valid)) for name, x in inputs.candidates.fields.items()}
    return inputs.replace(user=user, candidates=inputs.candidates.replace(fields=fields))


def outcome(name, schema, config):
    """Compiled: (inputs, labels) -> everything a training step and an evaluation give."""
    make = lambda: build(name, schema, config, rngs=nnx.Rngs(0))  # noqa: E731
    graph = nnx.split(nnx.eval_shape(make))[0]
    trained = nnx.Any(nnx.Param, Table)
    params, rest = jax.jit(lambda: nnx.split(make(), trained, ...)[1:])()

    def loss(params, inputs, labels):
        model = nnx.merge(graph, params, rest, copy=True)
        output = model(inputs, key=jax.random.key(3))
        mask = jnp.ones_like(labels) * inputs.candidates.valid[..., None]
        total, tasks = training_loss(output, labels, mask)
        after = nnx.split(model, trained, ...)[2]
        return total, {"logits": output.logits, "of": (tasks, output.losses, output.stats, after)}

    def everything(inputs, labels):
        (total, trained), grads = jax.value_and_grad(loss, has_aux=True)(params, inputs, labels)
        served = nnx.merge(graph, params, rest, copy=True)(inputs)
        logits = {"training": trained["logits"], "evaluation": served.logits}
        return logits, {"loss": total, "training": trained["of"], "gradients": grads, "evaluation": served.stats}

    return jax.jit(everything)


def check(name, schema, config):
    valid = np.ones((R, C), bool)
    valid[1, 2] = valid[3, 0] = valid[5] = False
    inputs = random_inputs(schema, R, C, seed=1)
    inputs = inputs.replace(candidates=inputs.candidates.replace(valid=jnp.asarray(valid)))
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 2, (R, C, 2)), jnp.float32)
    step = outcome(name, schema, config)
    changed = jnp.where(valid[..., None], labels, 1 - labels)
    (logits, rest), (other_logits, other) = step(inputs, labels), step(garbage(inputs, valid), changed)
    for when, found in logits.items():
        assert np.abs(np.asarray(found - other_logits[when]))[~valid].max() > 0  # the garbage is read
        np.testing.assert_allclose(other_logits[when][valid], found[valid], rtol=1e-6, atol=1e-6, err_msg=when)
    paths = jax.tree_util.tree_leaves_with_path(rest)
    for (path, value), changed in zip(paths, jax.tree.leaves(other), strict=True):
        size = max(float(np.abs(np.asarray(value, np.float64)).max(initial=0)), 1e-6)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(changed, value, rtol=1e-6, atol=1e-6 * size, err_msg=where)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*list_models(), "din+rankmixer"])
def test_of_every_architecture(name, schema, small_config):
    check(name, schema, small_config(name, schema))


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in SPARSE])
def test_of_sparse_experts_whatever_routes_them(case, full_schema):
    name, config = SPARSE[case]
    check(name, full_schema(dense=True), config)
