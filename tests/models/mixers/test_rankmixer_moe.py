"""RankMixer's sparse experts: dense training, sparse inference, and the controller between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models import build, count, freeze_config
from recscale.models.inputs import Field, Schema, reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers import per_token_moe
from recscale.models.layers.losses import training_loss
from recscale.models.layers.per_token_moe import PerTokenExperts
from recscale.models.layers.relu_moe import Gating, ReLUMoE
from recscale.scaling.bench.fixed_batch import FixedBatch
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops
from recscale.scaling.training import get_config
from recscale.scaling.training.checkpoints import Checkpoints
from recscale.scaling.training.intervals import Piece, fetch, summarise
from recscale.scaling.training.step import make_trainer

T, D, F, E, B = 4, 8, 16, 4, 24
MERGES = ("rows", "two_losses", "mean_gates", "train_only", "infer_only")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def token_schema():
    return Schema(tuple(Field(f"t{i}", "candidate", D) for i in range(T)))


def values(**flags):
    return dict(tokenizer="identity", width=D, hidden=F, layers=2, experts=E) | flags


def model_of(**flags):
    return build("rankmixer", token_schema(), values(**flags), rngs=nnx.Rngs(0))


def layer_of(half_open=True, **flags):
    """A sparse network with random biases; half_open gives routers that close about half of the experts."""
    layer = ReLUMoE(T, D, F, experts=E, rngs=nnx.Rngs(0), **flags)
    layer.experts.bias[...] = normal(T, E, F // E, seed=3)
    layer.bias[...] = normal(T, D, seed=4)
    for seed, router in enumerate((layer.infer_router, layer.train_router)):
        if half_open and router is not None:
            router.kernel[...] = normal(T, D, E, seed=seed, scale=0.5)
            router.bias[...] = jnp.zeros((T, E))
    return layer


def run(model, inputs, key=None):
    """The output in one compiled program, which leaves the model as it was."""
    graph, state = nnx.split(model)
    return jax.jit(lambda s, i: nnx.merge(graph, s)(i, key=key))(state, inputs)


def close_some(model):
    """Routers of every block that close about half of their experts."""
    for i, block in enumerate(model.blocks):
        for j, router in enumerate((block.ffn.infer_router, block.ffn.train_router)):
            if router is not None:
                router.kernel[...] = normal(T, D, E, seed=10 * i + j, scale=0.5)
                router.bias[...] = jnp.zeros((T, E))
    return model


def test_open_routers_are_the_dense_model():
    """Router kernels 0 and biases 1: every gate is 1."""
    sparse = model_of(dtsi_merge="rows", expert_path="masked", layers=1)
    dense = build("rankmixer", token_schema(), values(experts=None, layers=1), rngs=nnx.Rngs(0))
    for block, plain in zip(sparse.blocks, dense.blocks, strict=True):
        for router in (block.ffn.infer_router, block.ffn.train_router):
            router.kernel[...] = jnp.zeros((T, D, E))
        block.ffn.experts.bias[...] = normal(T, E, F // E)
        block.ffn.bias[...] = normal(T, D)
        for layer, kernel in ((plain.ffn.up, block.ffn.experts.up), (plain.ffn.down, block.ffn.experts.out)):
            layer.kernel[...] = kernel[...].transpose(0, 3, 1, 2).reshape(T, D, F)
        plain.ffn.up.bias[...] = block.ffn.experts.bias[...].reshape(T, F)
        plain.ffn.down.bias[...] = block.ffn.bias[...]
    dense.towers = sparse.towers
    inputs = random_inputs(token_schema(), 6, 2)
    expected = run(dense, inputs).logits
    for key in (None, jax.random.key(0)):
        np.testing.assert_allclose(run(sparse, inputs, key).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", MERGES)
def test_which_routers_the_task_gradient_reaches(merge, random_labels):
    model = close_some(model_of(dtsi_merge=merge))
    inputs, labels = random_inputs(token_schema(), 8, 2), random_labels((8, 2, 1))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def task(params):
        output = nnx.merge(graph, params, rest, copy=True)(inputs, key=jax.random.key(0)).replace(losses={})
        return training_loss(output, labels, jnp.ones((8, 2, 1)))[0]

    grads = jax.jit(jax.grad(task))(params)

    def reached(router):
        return [float(jnp.abs(grads["blocks"][i]["ffn"][router]["kernel"][...]).max()) > 0 for i in range(2)]

    assert reached("infer_router") == [merge != "train_only"] * 2
    if merge != "infer_only":
        assert reached("train_router") == [True] * 2


def test_train_router_never_touches_what_is_served():
    model, inputs = close_some(model_of()), random_inputs(token_schema(), 6, 2)
    served, trained = run(model, inputs), model_of()
    nnx.update(trained, nnx.state(model))
    for block in trained.blocks:
        block.ffn.train_router.bias[...] = normal(T, E, seed=5, scale=3.0)
    np.testing.assert_array_equal(run(trained, inputs).logits, served.logits)
    assert not served.losses and not served.loss_logits
    before = run(model, inputs, jax.random.key(0)).logits
    even, odd = before[0::2], before[1::2]
    moved = run(trained, inputs, jax.random.key(0)).logits
    assert (np.asarray(moved[0::2]) != np.asarray(even)).all()  # requests of even index run on the train router
    np.testing.assert_array_equal(moved[1::2], odd)
    np.testing.assert_allclose(odd, served.logits[1::2], rtol=1e-5, atol=1e-6)


def test_two_losses_score_both_paths():
    inputs, key = random_inputs(token_schema(), 4, 2), jax.random.key(0)
    model = close_some(model_of(dtsi_merge="two_losses"))
    found = run(model, inputs, key)
    assert [float(weight) for weight, _ in found.loss_logits.values()] == [0.5, 0.5]
    np.testing.assert_array_equal(found.loss_logits["infer"][1], found.logits)
    alone = model_of(dtsi_merge="train_only")
    nnx.update(alone, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(found.loss_logits["train"][1], run(alone, inputs, key).logits, rtol=1e-5, atol=1e-6)


def test_mean_gates_are_the_mean_of_two_outputs():
    layer, x = layer_of(), normal(T, B, D)
    both = [layer(x, training=True, gating=Gating(name))[0] for name in ("infer", "train")]
    found = layer(x, training=True, gating=Gating("mean"))[0]
    np.testing.assert_allclose(found, (both[0] + both[1]) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["ragged", "capacity"])
def test_sparse_execution_equals_masked_with_its_gradients(path):
    """A closed expert adds nothing and has no gradient, so leaving it out is exact in training as well."""
    x, g = normal(T, B, D), normal(T, B, D, seed=1)

    def run(path):
        graph, params = nnx.split(layer_of(path=path, capacity_factor=1.0))

        def loss(params, x):
            y, routing = nnx.merge(graph, params)(x, training=True)
            return (y * g).sum(), (y, routing)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    (_, (y, routing)), grads = run(path)
    (_, (expected, reference)), expected_grads = run("masked")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert float(routing.cut) == 0.0 and 0.2 < float(routing.active.mean()) < 0.8
    np.testing.assert_array_equal(routing.active, reference.active)


def test_accelerators_serve_open_experts_alone(monkeypatch):
    """Trained under a mask, served from sorted rows, with or without a cap: cost follows the open experts."""
    x, layer = normal(T, B, D), layer_of()
    expected = layer(x)[0]
    paths = []
    for name in ("masked", "ragged"):
        own = getattr(PerTokenExperts, name)
        monkeypatch.setattr(PerTokenExperts, name, lambda *a, n=name, f=own: paths.append(n) or f(*a))
    monkeypatch.setattr(per_token_moe, "current_platform", lambda: "gpu")
    np.testing.assert_allclose(layer(x)[0], expected, rtol=1e-5, atol=1e-5)
    layer(x, training=True)
    assert paths == ["ragged", "masked"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["masked", "ragged", "capacity"])
def test_a_serving_cap_keeps_the_largest_gates_and_says_what_it_cut(path):
    x, layer = normal(T, B, D), layer_of(path=path, serve_cap=1, capacity_factor=1.0)
    y, routing = layer(x)
    gates = np.asarray(jax.nn.relu(layer.infer_router(x)))
    kept = np.where(gates == gates.max(-1, keepdims=True), gates, 0)
    expected = layer.experts.masked(x, jnp.asarray(kept)) + layer.bias[...][:, None]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert float(routing.cut) == pytest.approx(1 - (kept > 0).sum() / (gates > 0).sum(), abs=1e-6)
    np.testing.assert_allclose(layer(x, training=True)[0], layer_of()(x)[0], rtol=1e-5, atol=1e-5)  # serving alone


@pytest.mark.parametrize("path", ["masked", pytest.param("capacity", marks=pytest.mark.slow)])
def test_nothing_open_means_nothing_cut(path):
    layer = layer_of(path=path, serve_cap=1, half_open=False)
    layer.infer_router.bias[...] = jnp.full((T, E), -9.0)
    graph, params = nnx.split(layer)
    y, routing = jax.jit(lambda p: nnx.merge(graph, p)(normal(T, 3, D)))(params)
    assert float(routing.cut) == 0.0
    np.testing.assert_array_equal(y, jnp.broadcast_to(layer.bias[...][:, None], y.shape))


def test_one_request_cannot_be_shared_by_two_routers():
    """The infer router would get no row, and its share of open experts would be 0/0."""
    model, inputs = model_of(), random_inputs(token_schema(), 1, 4)
    with pytest.raises(ValueError, match="this batch has 1; give it two or more, or use 'two_losses'"):
        jax.eval_shape(lambda i: model(i, key=jax.random.key(0)).logits, inputs)
    for merge in MERGES[1:]:
        other = model_of(dtsi_merge=merge)
        jax.eval_shape(lambda i, m=other: nnx.clone(m)(i, key=jax.random.key(0)).logits, inputs)
    jax.eval_shape(lambda i: model(i).logits, inputs)  # serving has one router


def test_penalty_does_not_depend_on_the_number_of_rows():
    model, inputs = close_some(model_of()), random_inputs(token_schema(), 6, 1)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs)
    once, double = (run(model, i).stats for i in (inputs, twice))
    assert float(once["gate_mean"]) == pytest.approx(float(double["gate_mean"]), rel=1e-6)
    by_hand = []
    x = model.tokenizer.join(
        model.encode_user(inputs.user),
        model.tokenizer.candidate_tokens(model.encode_user(inputs.user), inputs.candidates),
    )
    for block in model.blocks:
        s = block._sub_layer(block._mix, block.mixing_norm, x)
        by_hand.append(np.asarray(jax.nn.relu(block.ffn.infer_router(s))))
        x = block(x)
    assert float(once["gate_mean"]) == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert float(once["active_ratio"]) == pytest.approx((np.asarray(by_hand) > 0).mean(), abs=1e-6)


def test_controller_follows_the_budget_and_clamps():
    inputs, key = random_inputs(token_schema(), 6, 1), jax.random.key(0)
    model = model_of(active_ratio=0.5, lam0=2e-8, lam_rate=2.0, layers=1)  # a fresh model opens everything
    graph, state = nnx.split(model)

    @jax.jit
    def once(state):
        model = nnx.merge(graph, state, copy=True)
        return model(inputs, key=key), nnx.state(model)

    def steps(count):
        nonlocal state
        for _ in range(count):
            output, state = once(state)
        return output, float(state["experts"]["lam"][...])

    output, lam = steps(1)
    assert float(output.losses["gate_penalty"]) == pytest.approx(2e-8 * float(output.stats["gate_mean"]))
    assert lam == pytest.approx(4e-8)
    assert steps(40)[1] == pytest.approx(1e3)
    router = state["blocks"][0]["ffn"]["infer_router"]
    router["bias"][...] = jnp.full((T, E), -9.0)
    assert steps(1)[1] == pytest.approx(5e2)
    assert steps(60)[1] == pytest.approx(1e-8)


def test_experts_that_stay_closed_are_reported_dead():
    inputs, key = random_inputs(token_schema(), 6, 1), jax.random.key(0)
    model = model_of(dead_window=3)
    model.blocks[1].ffn.infer_router.bias[...] = jnp.ones((T, E)).at[2, 1].set(-9.0)
    dead = [int(model(inputs, key=key).stats["dead_experts"]) for _ in range(4)]
    assert dead == [0, 0, 1, 1]
    model.blocks[1].ffn.infer_router.bias[...] = jnp.ones((T, E))
    assert int(model(inputs, key=key).stats["dead_experts"]) == 0


@pytest.fixture(scope="module")
def trainer():
    config = get_config("rankmixer")
    config.model.update(values(active_ratio=0.5, lam0=1e-6))
    config.training.update({"optimizer": "adam", "schedule": "constant"})
    return make_trainer(config, FixedBatch(token_schema(), 16), [(0, 1e-3), (1, 1e-3)], warmup=0)


def flat(state):
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


def test_lam_is_training_state_of_every_replica(trainer, tmp_path):
    """The step returns it, a checkpoint restores it bit for bit, evaluation and logging leave it alone."""
    batch, state, metrics = trainer.source.batch(0), trainer.fresh_state(), []
    for _ in range(3):
        state, found = trainer.step(state, batch)
        metrics.append(found)
    lam = next(v for k, v in flat(state.other).items() if "lam" in k)
    assert lam.shape == (2,) and lam == pytest.approx(1e-6 * 1.2**3)
    before = flat(state)
    trainer.holdout_logits(state)
    logged = summarise(fetch([Piece(metrics, len(metrics))]))
    assert logged["model_lam"].shape == (2,) and logged["model_lam"][0] == pytest.approx(1e-6 * np.mean([1, 1.2, 1.44]))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {"has_trunk": False}, state, None)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoints.restore(like)[1]
    for key, value in flat(restored).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    one, two = (trainer.step(s, batch)[0] for s in (restored, state))
    for a, b in zip(flat(one).values(), flat(two).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_training_reaches_the_budget():
    """With a strong penalty the share of open experts falls from 1 to the target."""
    config = get_config("rankmixer")
    config.model.update(values(active_ratio=0.5, lam0=1e-2, lam_rate=1.05, layers=1))
    config.training.update({"optimizer": "adam", "schedule": "constant"})
    trainer = make_trainer(config, FixedBatch(token_schema(), 64), [(0, 1e-2)], warmup=0)
    state, batch, shares = trainer.fresh_state(), trainer.source.batch(0), []
    for _ in range(300):
        state, metrics = trainer.step(state, batch)
        shares.append(float(metrics["stats"]["active_ratio"][0]))
    assert shares[0] == 1.0 and 0.3 < np.mean(shares[-50:]) < 0.7


# -- counts and flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_closed_forms_of_the_paper(share):
    config, schema = dict(tokens=T, width=D, hidden=F, layers=2), reference_schema()
    dense, sparse = (count("rankmixer", schema, config | more) for more in ({}, dict(experts=E, active_ratio=share)))
    router = 2 * T * E * (D + 1)
    assert sparse.dense_params == dense.dense_params + 2 * router
    assert sparse.active_params == sparse.dense_params - router - 2 * (1 - share) * T * (2 * D * F + F)
    experts = 2 * T * 4 * D * F
    assert sparse.train_flops_per_row == dense.train_flops_per_row + 3 * 2 * T * 4 * D * E
    served = dense.forward_flops_per_row - experts + 2 * T * 2 * D * E + share * experts
    assert sparse.forward_flops_per_row == served


FLAGS = [dict(dtsi_merge=merge, expert_path="masked") for merge in MERGES]
FLAGS += [
    dict(router="topk", active_ratio=0.5, expert_path="ragged"),
    dict(router="topk", active_ratio=0.25, expert_path="ragged", balance_weight=0.01, gate_scale=1.0),
    dict(router="topk", active_ratio=0.5, gate_norm="selected", expert_path="masked"),
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag_counts_and_runs(flags):
    schema, config = token_schema(), values(**flags)
    counted = count("rankmixer", schema, config)
    assert tree_params(abstract_model("rankmixer", schema, config)) == counted.dense_params
    function, arguments = forward_program("rankmixer", schema, config, 2, 1)
    assert count_flops(function, *arguments) == 2 * counted.forward_flops_per_row
    function, arguments = train_program("rankmixer", schema, config, 2, 1)
    assert count_flops(function, *arguments) == 2 * counted.train_flops_per_row
    losses = jax.eval_shape(lambda i: model_of(**flags)(i, key=jax.random.key(0)), random_inputs(schema, 4, 2)).losses
    assert ("router_balance" in losses) == ("balance_weight" in flags) and ("gate_penalty" in losses) != (
        "router" in flags
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(experts=3), "hidden is 16, expected a multiple of the 3 experts"),
        (dict(active_ratio=0.0), "active_ratio is 0.0"),
        (dict(experts=0), "experts is 0"),
        (dict(capacity_factor=-1.0), "capacity_factor is -1.0"),
        (dict(serve_cap=9), "serve_cap is 9"),
        (dict(lam_rate=1.0), "lam_rate is 1.0"),
        (dict(mixer="all_share"), "this mixer or ffn has none"),
        (dict(ffn="shared"), "this mixer or ffn has none"),
        (dict(router="topk", gate_norm="selected"), "constant 1"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(flags, message):
    with pytest.raises(ValueError, match=message):
        freeze_config("rankmixer", values(**flags))


def test_a_layer_with_a_wrong_path_is_not_made():
    with pytest.raises(ValueError, match="expert_path is 'sorted', expected one of auto"):
        layer_of(path="sorted")
