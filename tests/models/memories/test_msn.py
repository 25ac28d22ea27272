"""MSN: its modules against their equations, special cases, placement, counts, theta, and starter sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx

from recscale.models import build, count
from recscale.models.inputs import reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.memories.msn import MSNConfig, active_hidden, gate_width, make_module
from recscale.scaling.counting.abstract import abstract_model, tree_params

T, B, D, F = 3, 5, 8, 12

SMALL = dict(width=D, hidden=F, memory_slots=25, memory_topk=4, key_width=6, value_init_std=0.5)


def compiled(make):
    """What `make` builds, in one program: that compiles faster than one operation after the other."""
    graph = nnx.split(nnx.eval_shape(make))[0]
    return nnx.merge(graph, jax.jit(lambda: nnx.split(make())[1])())


def module(kind, **flags):
    config = MSNConfig(**{**SMALL, "module": kind, **flags})
    return compiled(lambda: make_module(kind, config, T, rngs=nnx.Rngs(0)))


def model_of(name="msn", **flags):
    config = dict(tokens=4, **SMALL) | flags
    return compiled(lambda: build(name, reference_schema(), config, rngs=nnx.Rngs(0)))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def ffn(network, x):
    """FFN_t(x_t) in NumPy."""
    up, down = network.up, network.down
    h = np.einsum("tbd,tdf->tbf", x, up.kernel[...]) + np.asarray(up.bias[...])[:, None]
    return np.einsum("tbf,tdf->tbd", gelu(h), down.kernel[...]) + np.asarray(down.bias[...])[:, None]


def with_biases(*networks):
    for i, network in enumerate(networks):
        for j, bias in enumerate((network.up.bias, network.down.bias)):
            bias[...] = 0.1 * normal(*bias.shape, seed=10 * i + j)


FORMS = {
    "gate_tanh": lambda z, y: z * np.tanh(y),
    "gate_identity": lambda z, y: z * y,
    "gate_sigmoid": lambda z, y: z / (1 + np.exp(-y)),
    "gate_one_plus_tanh": lambda z, y: z * (1 + np.tanh(y)),
    "concat": lambda z, y: np.concatenate([z, y], axis=-1),
    "replace": lambda z, y: y,
}


@pytest.mark.slow
@pytest.mark.parametrize("combine", FORMS)
def test_a_read_enters_the_network_as_printed(combine):
    own, z = module("msn_ffn", combine=combine), normal(T, B, D)
    with_biases(own.network)
    y = np.asarray(own.memory(z).y, np.float64)
    found, stats = own(z)
    np.testing.assert_allclose(found, ffn(own.network, FORMS[combine](np.asarray(z, np.float64), y)), atol=2e-5)
    assert float(stats["memory/hits_per_slot"]) == pytest.approx(T * B * 4 / 25)
    ratio = np.sqrt(np.mean(np.square(found)) / np.mean(np.square(z)))
    assert float(stats["branch_ratio"]) == pytest.approx(ratio, rel=1e-5)


@pytest.mark.slow
def test_the_controls_are_their_equations():
    gated, z = module("gated_ffn"), normal(T, B, D)
    with_biases(gated.network, gated.gate)
    x = np.asarray(z, np.float64)
    np.testing.assert_allclose(gated(z)[0], ffn(gated.network, x * ffn(gated.gate, x)), atol=2e-5)
    assert gated.memory is None and module("ffn").gate is None

    smoe = module("smoe", experts=4, active_experts=2, hidden=12)
    weights = smoe.network.experts
    weights.bias[...] = 0.1 * normal(*weights.bias.shape)
    scores = np.einsum("tbd,tde->tbe", x, smoe.network.router[...])
    expected = np.zeros_like(x)
    for t, b in np.ndindex(T, B):
        best = np.argsort(-scores[t, b])[:2]
        gates = np.exp(scores[t, b, best] - scores[t, b, best].max())
        for e, g in zip(best, gates / gates.sum(), strict=True):
            h = gelu(np.asarray(weights.up[...])[t, e] @ x[t, b] + np.asarray(weights.bias[...])[t, e])
            expected[t, b] += g * (h @ np.asarray(weights.out[...])[t, e])
    assert weights.up.shape == (T, 4, 6, D)  # half the dense width each, so two of them are the dense network
    np.testing.assert_allclose(smoe(z)[0], expected, atol=2e-5)


def same_network(source, target):
    """Copies a dense network into the only expert of a sparse one."""
    target.network.experts.up[...] = source.network.up.kernel[...].swapaxes(1, 2)[:, None]
    target.network.experts.bias[...] = source.network.up.bias[...][:, None]
    target.network.experts.out[...] = source.network.down.kernel[...].swapaxes(1, 2)[:, None]
    target.network.bias[...] = source.network.down.bias[...]


@pytest.mark.slow
def test_special_cases():
    z, plain = normal(T, B, D), module("ffn")
    with_biases(plain.network)
    for combine in ("gate_one_plus_tanh", "gate_tanh"):
        own = module("msn_ffn", combine=combine)
        own.network = plain.network
        own.memory.values.rows[...] = jnp.zeros_like(own.memory.values.rows[...])
        hidden_from_it = z if combine == "gate_one_plus_tanh" else jnp.zeros_like(z)
        np.testing.assert_array_equal(own(z)[0], plain(hidden_from_it)[0])

    own, sparse = module("msn_ffn"), module("msn_smoe", experts=1, active_experts=1, router="all")
    with_biases(own.network)
    same_network(own, sparse)
    sparse.memory = own.memory
    np.testing.assert_allclose(sparse(z)[0], own(z)[0], rtol=1e-5, atol=1e-6)
    frozen = module("smoe", experts=1, active_experts=1, router="all")
    same_network(plain, frozen)
    np.testing.assert_allclose(frozen(z)[0], plain(z)[0], rtol=1e-5, atol=1e-6)


KEYS = {
    "none": (dict(theta="none"), False),
    "as printed": (dict(theta="left_nxn"), False),
    "right": (dict(), True),
    "right, frozen": (dict(freeze_base_keys=True), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_keys_that_were_not_read_move_with_theta_on_the_right_only(name):
    flags, moves = KEYS[name]
    own = module("msn_ffn", memory_slots=64, memory_topk=2, **flags)
    z = normal(T, 1, D)
    before, ids = own.memory.address.effective_keys(), np.unique(own.memory(z).slots)
    graph, params, rest = nnx.split(own, nnx.Param, ...)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p, rest, copy=True)(z)[0]))))(params)
    # Keys and theta step; the gains of the norm would move every key in any mode.
    for name, grad in grads["memory"]["address"].items():
        if name in ("keys", "theta"):
            variable = getattr(own.memory.address, name)
            variable[...] = variable[...] - 0.3 * grad[...]
    moved = np.abs(own.memory.address.effective_keys() - before).max(axis=-1)[0]
    for axis, read in enumerate((ids // 8, ids % 8)):
        never = np.setdiff1d(np.arange(8), read)
        assert never.size and moved[axis, np.unique(read)].max() > 1e-6
        assert (moved[axis, never] > 1e-8).all() if moves else not moved[axis, never].any()


def test_flags_that_contradict_each_other_are_named():
    for message, flags in (
        ("never moves a key", dict(theta="left_nxn", freeze_base_keys=True)),
        ("distinct layers from 0 to 1", dict(mem_layers=(0, 2))),
        ("distinct layers", dict(mem_layers=(1, 1))),
        ("expected 0 to the 2 layers", dict(memory_count=3)),
        ("value_width=None", dict(value_width=4)),
        ("value_op='bag'", dict(value_op="swilu")),
        ("'msn_smoe' cannot", dict(module="msn_smoe", combine="concat")),
        ("multiple of the 2 experts", dict(module="smoe", hidden=9)),
        ("would get no gradient", dict(module="smoe", active_experts=1)),
        ("gate_hidden is 0", dict(module="gated_ffn", gate_hidden=0)),
        ("has no experts", dict(balance_weight=0.1)),
    ):
        with pytest.raises(ValueError, match=message):
            MSNConfig(**flags)


def test_placement_by_layer():
    assert MSNConfig(layers=4, memory_count=2).memory_layers == (2, 3)
    assert MSNConfig(layers=4, mem_layers=(2, 0)).memory_layers == (0, 2)
    assert MSNConfig(layers=4, module="smoe").memory_layers == ()
    modules = [MSNConfig(layers=3, module="msn_smoe", mem_layers=(1,)).module_of(i) for i in range(3)]
    assert modules == ["smoe", "msn_smoe", "smoe"]
    model = model_of(layers=3, mem_layers=(0, 2))
    stats = jax.jit(lambda i: model(i).stats)(random_inputs(reference_schema(), 2, 2))
    assert {name for name in stats if name.endswith("usage")} == {"layer0/memory/usage", "layer2/memory/usage"}
    assert sum(name.endswith("branch_ratio") for name in stats) == 3
    assert all(np.isfinite(value).all() for value in stats.values())


def test_folding_serves_the_same_logits_without_theta():
    model, inputs = model_of(layers=1, theta_noise=0.3), random_inputs(reference_schema(), 2, 2)
    before, size = jax.jit(lambda i: model(i).logits)(inputs), tree_params(model)
    model.fold()
    np.testing.assert_allclose(jax.jit(lambda i: model(i).logits)(inputs), before, rtol=1e-5, atol=1e-6)
    # Keys, theta and the norm of keys are constants now.
    assert size - tree_params(model) == 2 * 5 * 6 + 2 * 6 * 6 + 4 * 6


def test_controls_have_the_sizes_the_paper_states():
    schema, base = reference_schema(), dict(tokens=4, width=16, hidden=24, layers=1, memory_slots=49, memory_topk=4)

    def active(**flags):
        return count("msn", schema, base | flags).active_params

    dense = active(module="ffn")
    # Two experts of half the width are the dense network, plus a router.
    assert active(module="smoe", experts=4) == dense + 4 * 16 * 4
    # The gate network has as many parameters as query and keys, up to half a unit of its width.
    query_and_keys = 4 * 16 * 2 * 16 + 2 * 7 * 16
    assert abs(active(module="gated_ffn") - dense - query_and_keys) <= 4 * (2 * 16 + 1) / 2
    assert active(theta="none", key_norm=None, query_norm=None) == dense + query_and_keys
    assert gate_width(MSNConfig(gate_hidden=7), 4) == 7

    for flags in (dict(module="smoe"), dict(module="gated_ffn"), dict(theta="none")):
        config = MSNConfig(**base | flags)
        unit = 2 if config.module == "smoe" else 1
        for target in (14_000, 14_150):
            sizes = {hidden: abs(active(**flags | dict(hidden=hidden)) - target) for hidden in range(unit, 120, unit)}
            assert active_hidden(schema, config, target) == min(sizes, key=sizes.get)
    with pytest.raises(ValueError, match="smallest hidden width"):
        active_hidden(schema, MSNConfig(**base), 1_000)


# T, D, L, memories, n, k, p; values a layer, query and keys a layer, read bytes a row in bfloat16.
STARTERS = {
    "msn_tiny": (8, 64, 2, 1, 32, 8, 32, 65_536, 34_816, 8_192),
    "msn_small": (16, 128, 4, 2, 128, 32, 64, 2_097_152, 278_528, 131_072),
    "msn_base": (16, 256, 4, 2, 256, 32, 64, 16_777_216, 557_056, 262_144),
    "msn_paper_like": (16, 768, 4, 2, 256, 32, 128, 50_331_648, 3_211_264, 786_432),
}


@pytest.mark.parametrize("name", STARTERS)
def test_starter_sizes(name):
    tokens, width, layers, memories, n, k, p, values, addressing, read = STARTERS[name]
    schema = reference_schema()
    counted, model = count(name, schema), abstract_model(name, schema)
    assert len(model.blocks) == layers and tree_params(model) == counted.dense_params
    assert counted.memory_params == memories * values == memories * n * n * width
    assert counted.memory_slots == memories * n * n
    owned = [block.ffn.memory for block in model.blocks if block.ffn.memory is not None]
    assert len(owned) == memories
    for memory in owned:
        address = memory.address
        assert address.query.layers[0].kernel.size + address.keys.size == addressing
        assert memory.values.rows.size == values and memory.topk == k
    assert tokens * k * width * 2 == read
    plain = count(name, schema, {"module": "ffn"})
    added = counted.forward_flops_per_row - plain.forward_flops_per_row
    assert added == memories * tokens * (4 * width * p + 4 * n * p + 2 * k * width)


def test_the_printed_theta_is_a_preset():
    printed = abstract_model("msn_as_printed", reference_schema(), dict(tokens=4, **SMALL))
    assert printed.blocks[1].ffn.memory.address.theta.shape == (1, 2, 5, 5)
    default = abstract_model("msn", reference_schema(), dict(tokens=4, **SMALL))
    assert default.blocks[1].ffn.memory.address.theta.shape == (1, 2, 6, 6)
