"""TokenMixer-Large: its equations, its depth aids, and its sparse experts against the dense network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx

from recscale.models import build, count, freeze_config, list_presets
from recscale.models.inputs import Field, Schema, reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.dispatch import by_capacity, by_sorting, collect, dispatch, spread
from recscale.models.layers.mixing import mix_token_major, revert_token_major
from recscale.models.layers.per_token import PerTokenSwiGLU
from recscale.models.layers.per_token_moe import TopKMoE, capacity_of, choose_path, top_k_gates
from recscale.models.mixers.tokenmixer_block import MixedBlockOptions, TokenMixerLargeBlock
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

T, D, F, E, K, B = 3, 8, 24, 8, 4, 20


def token_schema(tokens=T, width=D):
    """Every field is a token, looked up in a table."""
    return Schema(tuple(Field(f"t{i}", "candidate", width, 10) for i in range(tokens)))


def run(model, inputs, key=None):
    """The output in one compiled program."""
    graph, state = nnx.split(model)
    return jax.jit(lambda s, i: nnx.merge(graph, s)(i, key=key))(state, inputs)


def tiny(**flags):
    return dict(tokenizer="identity", global_token=False, width=D, hidden=F, layers=2) | flags


def block(down=1.0, **flags):
    """`down`: the initial scale of the last matrices."""
    mixed_hidden, options = flags.pop("mixed_hidden", None), MixedBlockOptions(down_init_scale=down, **flags)
    return TokenMixerLargeBlock(T, D, F, mixed_hidden=mixed_hidden, options=options, rngs=nnx.Rngs(0))


def moe(**flags):
    flags = dict(experts=E, active=K, init="xavier_normal", path="masked") | flags
    return TopKMoE(T, D, F, rngs=nnx.Rngs(0), **flags)


def dense_of(layer):
    """The dense network whose hidden width is all experts of a layer side by side, the shared one first."""
    dense = PerTokenSwiGLU(T, D, F, rngs=nnx.Rngs(1))
    for name in ("up", "gate", "out"):
        routed = getattr(layer.experts, name)[...].transpose(0, 3, 1, 2).reshape(T, D, -1)
        shared = getattr(layer.shared, name).kernel[...]
        getattr(dense, name).kernel[...] = jnp.concatenate([shared, routed], axis=-1)
    return dense


def with_zero_router(layer):
    layer.router[...] = jnp.zeros_like(layer.router[...])
    return layer


def rms(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def swiglu(layer, x):
    """NumPy, token by token."""
    y = np.empty_like(x)
    for t in range(x.shape[0]):
        gate, up, out = (np.asarray(getattr(layer, name).kernel[...][t], np.float64) for name in ("gate", "up", "out"))
        g = x[t] @ gate
        y[t] = (g / (1 + np.exp(-g)) * (x[t] @ up)) @ out.T
    return y


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["A", "B", "C"])
def test_block_equals_a_numpy_transcription_with_other_heads_than_tokens(style):
    model = block(residual_style=style, heads=4, mixed_hidden=10)
    x = normal(T, B, D)

    def mixed(v):
        return np.asarray(mix_token_major(jnp.asarray(v), 4), np.float64)

    def back(v):
        return np.asarray(revert_token_major(jnp.asarray(v), T), np.float64)

    f1, f2 = (lambda v: swiglu(model.mixed_ffn, v)), (lambda v: swiglu(model.ffn, v))
    x64, m = np.asarray(x, np.float64), mixed(x)
    if style == "A":
        u = x64 + back(f1(mixed(rms(x64))))
        expected = u + f2(rms(u))
    elif style == "B":
        expected = x64 + f2(rms(back(m + f1(rms(m)))))
    else:
        expected = rms(f2(back(rms(f1(m) + m))) + x64)
    np.testing.assert_allclose(model(x)[0], expected, rtol=2e-5, atol=2e-5)


def test_with_norms_off_styles_a_and_b_agree_before_the_second_half():
    """Revert is linear and reverts mix, so V of B is U of A but for the place of the norm."""
    a, b = block(residual_style="A"), block(residual_style="B")
    nnx.update(b.mixed_ffn, nnx.state(a.mixed_ffn))
    for model in (a, b):
        model.mixed_norm = model.ffn_norm = lambda v: v
        model.ffn = lambda v: jnp.zeros_like(v)  # what is left of A is U; of B it is X
    u = a(normal(T, B, D))[0]
    m = b.mix(normal(T, B, D))
    v = b.revert(m + b.mixed_ffn(m), normal(T, B, D))
    np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5)


def test_small_last_matrices_make_a_block_nearly_the_identity():
    x = normal(T, 64, D)
    np.testing.assert_array_equal(block(down=0.0)(x)[0], x)
    moved = block(down=0.01)(x)[0] - x
    assert 0 < float(jnp.linalg.norm(moved) / jnp.linalg.norm(x)) < 0.02


def test_initial_scales_by_standard_deviation_and_by_variance():
    def stds(**flags):
        config = tiny(width=64, hidden=64, layers=1) | flags
        half = build("tokenmixer_large", token_schema(4, 64), config, rngs=nnx.Rngs(0)).blocks[0].ffn
        return np.asarray([float(getattr(half, name).kernel[...].std()) for name in ("up", "gate", "out")])

    xavier = 1 / np.sqrt(64)
    np.testing.assert_allclose(stds() / xavier, [1, 1, 0.01], rtol=0.03)
    np.testing.assert_allclose(stds(down_init_mode="variance") / xavier, [1, 1, 0.1], rtol=0.03)
    np.testing.assert_allclose(stds(up_init_scale=0.01, down_init_scale=1.0) / xavier, [0.01, 0.01, 1], rtol=0.03)


# -- depth aids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, layers, added", [(2, 6, {2: 0, 4: 2}), (3, 7, {3: 0, 6: 3}), (0, 4, {}), (2, 2, {})])
def test_inter_layer_residual_adds_where_it_should_and_never_at_the_end(every, layers, added):
    model = build("tokenmixer_large", token_schema(), tiny(layers=layers, inter_residual_every=every), rngs=nnx.Rngs(0))
    x = normal(T, B, D)
    trunk, stream = model.run_blocks(x), [x]
    for i, part in enumerate(model.blocks, start=1):
        y = part(stream[-1])[0]
        stream.append(y + stream[added[i]] if i in added else y)
    for found, expected in zip(trunk.stream, stream, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_auxiliary_heads_change_training_alone():
    inputs, key = random_inputs(token_schema(), 4, 2), jax.random.key(0)
    config, plain = tiny(layers=3, aux_layers=(1, 2), aux_weight=0.2), tiny(layers=3, aux_weight=0.0)
    on, off = (build("tokenmixer_large", token_schema(), c, rngs=nnx.Rngs(0)) for c in (config, plain))
    trained, served, without = run(on, inputs, key), run(on, inputs), run(off, inputs)
    np.testing.assert_array_equal(served.logits, without.logits)
    np.testing.assert_array_equal(trained.logits, without.logits)
    assert not served.loss_logits and not run(off, inputs, key).loss_logits
    found = trained.loss_logits
    weights = {name: float(weight) for name, (weight, _) in found.items()}
    assert weights == pytest.approx({"main": 1.0, "auxiliary_1": 0.1, "auxiliary_2": 0.1})

    @jax.jit
    def of_block_2(model):
        state = model.encode_user(inputs.user)
        x = model.tokenizer.join(state, model.tokenizer.candidate_tokens(state, inputs.candidates))
        return model.auxiliary.heads[1](model.run_blocks(x).stream[2]).reshape(4, 2, 1)

    np.testing.assert_allclose(found["auxiliary_2"][1], of_block_2(on) + found["main"][1], rtol=1e-5, atol=1e-6)
    counted = count("tokenmixer_large", token_schema(), config)
    assert counted.training_only_params == 2 * (D + D + 1)
    assert counted.dense_params == count("tokenmixer_large", token_schema(), plain).dense_params


@pytest.mark.parametrize(
    "flags, moved", [({}, True), (dict(aux_mode="independent"), False), (dict(aux_stop_gradient=True), False)]
)
def test_which_auxiliary_losses_reach_the_main_head(flags, moved):
    model = build("tokenmixer_large", token_schema(), tiny(**flags), rngs=nnx.Rngs(0))
    inputs = random_inputs(token_schema(), 4, 1)
    graph, params = nnx.split(model)

    def auxiliary(params):
        output = nnx.merge(graph, params)(inputs, key=jax.random.key(0))
        return output.loss_logits["auxiliary_1"][1].sum()

    grads = jax.jit(jax.grad(auxiliary))(params)
    assert (float(jnp.abs(grads["towers"]["biases"][0][...]).max()) > 0) == moved
    assert float(jnp.abs(grads["blocks"][0]["ffn"]["out"]["kernel"][...]).max()) > 0


# -- sparse experts ----------------------------------------------------------------------------------------------------


def test_experts_with_unit_gates_are_the_dense_network():
    layer, x = moe(), normal(T, B, D)
    found = layer.experts.masked(x, jnp.ones((T, B, E - 1))) + layer.shared(x)
    np.testing.assert_allclose(found, dense_of(layer)(x), rtol=1e-5, atol=1e-5)


def test_all_experts_active_with_a_zero_router_are_the_dense_network():
    """Gates are 1/(E-1) each, alpha = E-1 makes them 1."""
    layer, x = with_zero_router(moe(active=E, gate_scale=E - 1.0)), normal(T, B, D)
    np.testing.assert_allclose(layer(x)[0], dense_of(layer)(x), rtol=1e-5, atol=1e-5)


def router_gradient(layer):
    graph, params = nnx.split(layer)
    x = normal(T, B, D)
    return jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(x)[0]).sum()))(params)["router"][...]


def test_a_single_renormalised_gate_is_refused_because_its_router_cannot_learn():
    with pytest.raises(ValueError, match="constant 1: its router would get no gradient"):
        moe(active=2)
    with pytest.raises(ValueError, match="constant 1"):
        freeze_config("tokenmixer_large", tiny(experts=4, active=2))
    forced = moe(active=3)
    forced.selected = 1
    assert (np.asarray(router_gradient(forced)) == 0).all()
    assert (np.abs(router_gradient(moe(active=2, gate_norm="all"))).max(axis=(1, 2)) > 0).all()


def test_router_learns_from_two_routed_experts_on():
    for path in ("masked", "capacity", "ragged"):
        gradient = np.abs(router_gradient(moe(active=3, path=path, capacity_factor=4.0)))
        assert (gradient.max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize("gate_norm", ["selected", "all"])
@pytest.mark.parametrize("path", ["capacity", "ragged"])
def test_sparse_paths_equal_the_masked_one_and_lose_nothing(path, gate_norm):
    """Values and every gradient."""
    masked = moe(gate_norm=gate_norm)
    sparse = moe(gate_norm=gate_norm, path=path, capacity_factor=(E - 1) / (K - 1))
    x, g = normal(T, B, D), normal(T, B, D, seed=1)

    def run(layer):
        graph, params = nnx.split(layer)

        def loss(params, x):
            y, routing = nnx.merge(graph, params)(x, training=True)
            return (y * g).sum(), (y, routing)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    (_, (y, routing)), grads = run(sparse)
    (_, (expected, reference)), expected_grads = run(masked)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert float(routing.dropped) == 0.0
    np.testing.assert_array_equal(routing.load, reference.load)
    np.testing.assert_array_equal(routing.load.sum(axis=1), B * (K - 1))


@pytest.mark.slow
def test_what_overflows_a_capacity_is_dropped_and_counted():
    """Every row of a zero router goes to the same experts: beyond the capacity rows keep the shared expert alone."""
    layer, x = with_zero_router(moe(path="capacity", capacity_factor=1.0)), normal(T, 64, D)
    y, routing = layer(x, training=True)
    capacity = capacity_of(64, (K - 1) / (E - 1), 1.0)
    assert capacity == 32 and float(routing.dropped) == pytest.approx(1 - capacity / 64)
    np.testing.assert_allclose(y[:, capacity:], layer.shared(x)[:, capacity:], rtol=1e-5, atol=1e-6)
    masked = with_zero_router(moe())(x)[0]
    np.testing.assert_allclose(y[:, :capacity], masked[:, :capacity], rtol=1e-5, atol=1e-5)


def test_rows_travel_to_their_places_and_back():
    """With one selection and gates 1, sending out and collecting is the identity; id E is nowhere."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, E + 1, (T, B, 1)), jnp.int32)
    x = normal(T, B, D)
    here = np.asarray(ids) < E
    for assignment in (by_sorting(ids, E)[0], by_capacity(ids, E, B)[0]):
        np.testing.assert_array_equal(collect(dispatch(x, assignment), assignment), np.where(here, x, 0))
        gates = spread(jnp.ones(ids.shape), assignment)
        assert float(gates.sum()) == here.sum()
    np.testing.assert_array_equal(by_sorting(ids, E)[1].reshape(T, E), (ids == jnp.arange(E)[None, None]).sum(axis=1))


def test_selected_gates_sum_to_one_and_keep_the_best():
    logits = normal(T, B, E)
    ids, gates = top_k_gates(logits, 3)
    np.testing.assert_allclose(gates.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(ids, jax.lax.top_k(logits, 3)[1])
    _, kept = top_k_gates(logits, 3, "all")
    np.testing.assert_allclose(kept, jax.lax.top_k(jax.nn.softmax(logits), 3)[0], rtol=1e-6)


def test_automatic_paths():
    assert (choose_path("auto", True), choose_path("auto", False)) == ("capacity", "masked")  # on CPUs
    assert choose_path("ragged", True) == "ragged"
    with pytest.raises(ValueError, match="expert_path is 'dense'"):
        choose_path("dense", True)


def test_the_model_reports_loads_and_weighs_its_router_losses():
    config = tiny(experts=E, active=K, balance_weight=0.5, z_weight=0.25, expert_path="capacity", capacity_factor=3.0)
    model = build("tokenmixer_large", token_schema(), config, rngs=nnx.Rngs(0))
    output = run(model, random_inputs(token_schema(), 5, 4), jax.random.key(0))
    assert output.stats["expert_load"].shape == (2, T, E - 1) and output.stats["expert_load_mixed"].shape[0] == 2
    np.testing.assert_array_equal(output.stats["expert_load"].sum(-1), 20 * (K - 1))
    assert float(output.losses["router_balance"]) == pytest.approx(0.5 * float(output.stats["router_balance"]))
    assert float(output.losses["router_z"]) == pytest.approx(0.25 * float(output.stats["router_z"]))
    assert float(output.stats["router_balance"]) >= 1.0 - 1e-6  # its least value is that of equal loads


# -- counts and flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_closed_form_of_the_paper_for_any_heads(heads):
    config = dict(tokenizer="cut", tokens=4, width=8, hidden=12, mixed_hidden=20, layers=3, heads=heads)
    counted = count("tokenmixer_large", reference_schema(), config)
    tokens, width, blocks = 4, 8, 3 * (3 * 4 * 8 * (12 + 20) + 2 * 8)
    assert counted.tokenizer_params == 2 * 512 * width + tokens * width
    assert counted.dense_params == counted.tokenizer_params + blocks + width + width + 1
    assert counted.forward_flops_per_row == 2 * 2 * 512 * width + 3 * 6 * tokens * width * 32 + 2 * width


FLAGS = [
    dict(residual_style="B"),
    dict(residual_style="C", inter_residual_every=0, heads=4),
    dict(mixer="none"),
    dict(ffn="shared_swiglu"),
    dict(ffn="per_token_ffn"),
    dict(residual=False),
    dict(sandwich_norm=True, norm_per_token=True),
    dict(final_norm=False, tower=(6,), aux_layers=(1, 2), layers=3),
    dict(aux_mode="independent"),
    dict(aux_stop_gradient=True),
    dict(down_init_mode="variance", init="lecun_normal", up_init_scale=0.5, norm_eps=1e-3),
    dict(dropout=0.2),
    dict(experts=E, active=K, expert_path="masked"),
    dict(experts=E, expert_path="ragged", z_weight=0.1),
    dict(experts=4, active=2, gate_norm="all", expert_path="ragged", gate_scale=1.0),
    dict(experts=4, active=2, shared_expert=False, expert_path="ragged"),
    dict(experts=4, active=3, expert_scope="global", expert_path="ragged"),
    dict(experts=4, active=3, expert_scope="global", expert_path="masked"),
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag_counts_and_runs(flags):
    schema, config = token_schema(), tiny(mixed_hidden=16) | flags
    counted = count("tokenmixer_large", schema, config)
    assert tree_params(abstract_model("tokenmixer_large", schema, config)) == counted.dense_params
    function, arguments = forward_program("tokenmixer_large", schema, config, 2, 1)
    assert count_flops(function, *arguments) == 2 * counted.forward_flops_per_row
    function, arguments = train_program("tokenmixer_large", schema, config, 2, 1)
    assert count_flops(function, *arguments) == 2 * counted.train_flops_per_row
    if "experts" in flags and flags["expert_path"] == "ragged":
        dense = count("tokenmixer_large", schema, tiny(mixed_hidden=16))
        assert counted.active_params < dense.dense_params + 2 * 2 * T * D * (T * E)
        assert counted.forward_flops_per_row < dense.forward_flops_per_row + 2 * 4 * T * D * (T * E)
    if "experts" not in flags:
        out = jax.jit(lambda i: build("tokenmixer_large", schema, config, rngs=nnx.Rngs(0))(i).logits)
        assert jnp.isfinite(out(random_inputs(schema, 3, 2))).all()


def test_active_parameters_are_a_share_of_the_experts():
    dense, sparse = (
        count("tokenmixer_large", token_schema(), tiny(**f)) for f in ({}, dict(experts=E, active=2, gate_norm="all"))
    )
    weights, routers = 2 * 2 * 3 * T * D * F, 2 * 2 * T * D * (E - 1)
    assert sparse.dense_params == dense.dense_params + routers
    assert sparse.active_params == sparse.dense_params - weights * 6 // 8
    assert dense.forward_flops_per_row - sparse.forward_flops_per_row == 2 * weights * 6 // 8 - 2 * routers


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(hidden=0), "hidden is 0"),
        (dict(heads=3), "does not divide into 3 heads"),
        (dict(residual_style="C"), "set it to 0"),
        (dict(residual_style="B", sandwich_norm=True), "sandwich_norm belongs"),
        (dict(aux_layers=(2,)), r"aux_layers is \(2,\), expected blocks from 1 to 1, each once"),
        (dict(layers=4, aux_layers=(1, 1)), "each once"),
        (dict(inter_residual_every=-2), "inter_residual_every is -2"),
        (dict(mixed_hidden=0), "mixed_hidden is 0, expected at least 1"),
        (dict(heads=0), "heads is 0"),
        (dict(tower=(4, 0)), "expected at least 1 everywhere"),
        (dict(experts=0), "experts is 0"),
        (dict(experts=8, active=0), "active is 0"),
        (dict(experts=8, capacity_factor=0.0), "capacity_factor is 0.0"),
        (dict(active=3), "without experts"),
        (dict(experts=5), "does not divide into 5 experts"),
        (dict(experts=8, active=9), "active is 9 of 8"),
        (dict(experts=8, ffn="shared_swiglu"), "per-token SwiGLUs"),
        (dict(expert_path="sparse"), "expected 'auto'"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(flags, message):
    with pytest.raises(ValueError, match=message):
        build("tokenmixer_large", token_schema(), tiny(**flags), rngs=nnx.Rngs(0))


PRINTED = {"10k": 9.8e3, "100k": 99e3, "1m": 935e3, "10m": 9.6e6, "100m": 101e6, "500m": 501e6, "1b": 1.008e9}
PRINTED |= {"2b": 2.3e9, "4b": 4.6e9, "7b": 7.6e9, "15b": 15e9}


@pytest.mark.parametrize("size", PRINTED)
def test_starter_sizes_are_what_they_say(size):
    name = f"tokenmixer_large_{size}"
    assert name in list_presets()
    assert count(name, reference_schema()).dense_params == pytest.approx(PRINTED[size], rel=0.025)


def test_config_is_plain_data():
    config = freeze_config("tokenmixer_large", tiny(experts=E))
    assert config.active_experts == 4 and hash(config) == hash(dataclasses.replace(config))
