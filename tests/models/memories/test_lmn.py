"""LMN, the reconstruction: reads against NumPy, padding, the memory loss and its targets, counts, a million slots."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.tables import Table
from recscale.models.memories.lmn_plan import LMNConfig, plan_lmn
from recscale.models.memories.value_table import Constant, recorded, value_tables
from recscale.scaling.counting.abstract import abstract_model, tree_params

R, C = 4, 3

SMALL = dict(memory_slots=49, memory_topk=4, key_width=6, widths=(12, 8), din_hidden=(6, 4), value_init_std=0.5)


@functools.cache
def _made(schema, flags):
    """Graph, values, and a pass: (state, inputs, training) -> (losses, stats, new state); compiled once per config."""

    def init():
        return nnx.split(build("lmn", schema, {**SMALL, **dict(flags)}, rngs=nnx.Rngs(0)))

    graph = nnx.split(nnx.eval_shape(lambda: nnx.merge(*init())))[0]

    @functools.partial(jax.jit, static_argnums=2)
    def run(state, inputs, training=True):
        model = nnx.merge(graph, state, copy=True)
        out = model(inputs, key=jax.random.key(0) if training else None)
        return out.losses, out.stats, nnx.state(model)

    return graph, jax.jit(lambda: init()[1])(), run


def made(schema, **flags):
    return _made(schema, tuple(flags.items()))


def make(schema, **flags):
    return nnx.merge(*made(schema, **flags)[:2], copy=True)


def drawn(schema, **flags):
    """Graph and values from NumPy, where it does not matter which: compiling an initialisation takes longest."""
    model = abstract_model("lmn", schema, {**SMALL, **flags})
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda leaf: _draw(rng, leaf.shape), state)


def _draw(rng, shape):
    """The only scalar is the reference of a learned target, which starts at 0."""
    return jnp.asarray(0.3 * rng.standard_normal(shape, np.float32) if shape else np.float32(0))


def inputs_of(schema, seed=1):
    """Lengths 0, some and all."""
    inputs = random_inputs(schema, R, C, seed)
    history = inputs.user.histories["clicks"]
    history = history.replace(length=jnp.asarray([0, 7, 2, 5], jnp.int32))
    return inputs.replace(user=inputs.user.replace(histories={"clicks": history}))


def memory_loss(inputs, graph, *state):
    return nnx.merge(graph, *state, copy=True)(inputs, key=jax.random.key(0)).losses["memory"]


def test_what_is_read_is_what_the_equations_say(schema):
    model, inputs = make(schema), inputs_of(schema)
    graph, values = nnx.split(model)
    state = jax.jit(lambda v, u: nnx.merge(graph, v).encode_user(u))(values, inputs.user)
    events = np.asarray(inputs.user.histories["clicks"].events)
    users = np.concatenate([inputs.user.fields[name] for name in ("user", "age", "hour")], axis=-1)
    address, values = model.memory.address, np.asarray(model.memory.values.rows[...])
    assert state.items.shape == (R, 7, 10) and state.actions.shape == (R, 7, 2)  # item and shop; what the user did

    every = np.concatenate([events[..., :10], np.repeat(users[:, None], 7, axis=1)], axis=-1).reshape(1, -1, 22)
    found = jax.jit(lambda x: tuple(address(x)))(jnp.asarray(every))
    weights = np.asarray(jax.nn.softmax(found[0], axis=-1))
    reads = np.einsum("nhk,nhkd->nd", weights, values[np.asarray(found[1])]).reshape(R, 7, 6)
    for r, length in enumerate((0, 7, 2, 5)):
        for s in range(7):
            expected = reads[r, s] if s < length else np.zeros(6)
            np.testing.assert_allclose(state.read.y[r, s], expected, atol=1e-5)
    fields = inputs.candidates.fields
    items = np.concatenate([fields["item"], fields["shop"]], axis=-1)
    u = model._attend(jnp.asarray(items), state)
    for r, length in enumerate((0, 7, 2, 5)):
        y = np.asarray(state.read.y[r, :length])
        for c in range(C):
            scores = y @ np.asarray(items[r, c] @ model.pool.kernel[...]) / np.sqrt(6)
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(u[r, c], weights @ y, atol=1e-5)
    item_only = abstract_model("lmn", schema, {**SMALL, "query_mode": "item_only"})
    assert item_only.memory.width == 10 and model.memory.width == 22


@pytest.mark.parametrize("flags", [{}, dict(read_from="target"), dict(pool="mean", memory_loss_to="values")], ids=str)
def test_padded_events_are_nothing(schema, flags):
    (graph, rest), inputs = drawn(schema, **flags), inputs_of(schema)

    def loss(events, rest):
        history = inputs.user.histories["clicks"].replace(events=events)
        own = inputs.replace(user=inputs.user.replace(histories={"clicks": history}))
        out = nnx.merge(graph, rest, copy=True)(own, key=jax.random.key(0))
        return jnp.sum(jnp.sin(out.logits)) + out.losses["memory"], (out.stats["memory/hits"], out.losses["memory"])

    events = inputs.user.histories["clicks"].events + 1.0
    (value, (hits, raw)), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(events, rest)
    assert jnp.isfinite(value) and float(raw) > 0
    valid = np.arange(7)[None] < np.asarray([0, 7, 2, 5])[:, None]
    touched = np.abs(np.asarray(grad)).max(axis=-1)
    assert np.isfinite(grad).all() and not touched[~valid].any() and (touched[valid] > 0).all()
    assert int(hits.sum()) == 4 * valid.sum()


def test_without_any_event_the_loss_is_zero(schema):
    (graph, params), inputs = drawn(schema), inputs_of(schema)
    empty = inputs.user.histories["clicks"].replace(length=jnp.zeros(R, jnp.int32))
    inputs = inputs.replace(user=inputs.user.replace(histories={"clicks": empty}))
    value, grads = jax.jit(jax.value_and_grad(lambda p: memory_loss(inputs, graph, p)))(params)
    assert float(value) == 0.0
    assert all(np.isfinite(g).all() and not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_the_memory_loss_is_of_requests_and_not_of_candidates(schema):
    (graph, values, run), inputs = made(schema), inputs_of(schema)
    one = inputs.replace(candidates=jax.tree.map(lambda x: x[:, :1], inputs.candidates))
    found = run(values, inputs)[0]["memory"]
    np.testing.assert_allclose(run(values, one)[0]["memory"], found, rtol=1e-6)
    # By hand: Smooth-L1 of the reads against a fixed orthonormal map of what was seen and done.
    model = nnx.merge(graph, values)
    state = jax.jit(lambda v, u: nnx.merge(graph, v).encode_user(u))(values, inputs.user)
    matrix = np.asarray(model.target[...], np.float64)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(6), atol=1e-5)
    users = np.broadcast_to(np.asarray(state.user)[:, None], (R, 7, 12))
    target = np.concatenate([state.items, users, state.actions], axis=-1) @ matrix
    off = np.abs(np.asarray(state.read.y) - target)
    each = np.where(off < 1, 0.5 * off**2, off - 0.5).mean(axis=-1)
    rows = [each[r, :length].mean() if length else 0.0 for r, length in enumerate((0, 7, 2, 5))]
    assert float(found) == pytest.approx(0.1 * np.mean(rows), rel=1e-5)
    assert not jax.eval_shape(lambda i: model(i).losses, inputs)
    graph, values = drawn(schema, memory_weight=0.0)
    losses = jax.eval_shape(lambda v, i: nnx.merge(graph, v)(i, key=jax.random.key(0)).losses, values, inputs)
    assert not losses


def gradients(schema, **flags):
    """Largest gradients of the memory loss: by parameter, and of the events and user fields."""
    inputs = inputs_of(schema)
    graph, params, rest = nnx.split(nnx.merge(*drawn(schema, **flags)), nnx.Any(nnx.Param, Table), ...)

    def loss(params, user):
        return memory_loss(inputs.replace(user=user), graph, params, rest)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(params, inputs.user)
    found = {jax.tree_util.keystr(p): float(jnp.abs(g).max()) for p, g in jax.tree_util.tree_leaves_with_path(grads[0])}
    user = {"events": grads[1].histories["clicks"].events, **grads[1].fields}
    return found, {name: float(jnp.abs(g).max()) for name, g in user.items()}


def reached(found):
    return {
        part for part in ("query", "keys", "values", "target") if any(part in k and v > 0 for k, v in found.items())
    }


@pytest.mark.slow
def test_where_the_memory_loss_reaches(schema):
    everything, user = gradients(schema)
    assert reached(everything) == {"query", "keys", "values"} and user["events"] > 0 and user["age"] > 0
    values, user = gradients(schema, memory_loss_to="values")
    assert reached(values) == {"values"} and not any(user.values())
    values, _ = gradients(schema, memory_loss_to="values", read_from="target")
    assert reached(values) == {"values"}
    learned, _ = gradients(schema, target="learned")
    assert reached(learned) == {"query", "keys", "values", "target"}
    _, user = gradients(schema, memory_loss_to="values", target_gradient=True)
    assert user["events"] > 0 and user["age"] > 0
    _, user = gradients(schema, memory_loss_to="values", target="event", target_gradient=True)
    assert user["events"] > 0 and not user["age"]


@pytest.mark.slow
def test_a_fixed_target_never_moves_and_a_learned_one_is_watched(schema):
    (graph, values, run), inputs = made(schema), inputs_of(schema)
    before = nnx.merge(graph, values)
    _, params, rest = nnx.split(before, nnx.Param, ...)
    assert isinstance(before.target, Constant)
    grads = jax.jit(jax.grad(lambda p: memory_loss(inputs, graph, p, rest)))(params)
    stepped = nnx.merge(graph, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rest)
    np.testing.assert_array_equal(stepped.target[...], before.target[...])
    assert float(jnp.abs(stepped.memory.address.keys[...] - before.memory.address.keys[...]).max()) > 0

    _, values, run = made(schema, target="learned")
    assert float(run(values, inputs, False)[2]["reference"][...]) == 0  # evaluation changes nothing
    few = inputs.user.histories["clicks"].replace(length=jnp.asarray([0, 0, 1, 0], jnp.int32))
    sparse = inputs.replace(user=inputs.user.replace(histories={"clicks": few}))
    early = run(values, sparse)  # one event says nothing of a variance: not the first one, and no collapse later
    assert np.isfinite(early[0]["memory"]) and float(early[2]["reference"][...]) == 0
    losses, stats, state = run(values, inputs)
    assert np.isfinite(losses["memory"]) and np.isfinite(run(state, sparse)[0]["memory"])
    assert float(state["reference"][...]) == pytest.approx(np.exp(float(stats["log_target_variance"])), rel=1e-5)
    state["target"][...] = 0.4 * state["target"][...]
    assert np.isfinite(run(state, inputs)[0]["memory"])  # a sixth of the variance is left
    state["target"][...] = 0.5 * state["target"][...]
    assert np.isnan(run(state, inputs)[0]["memory"])  # a twenty-fifth


def test_a_target_collapses_at_a_tenth_of_its_first_variance_over_eight_events(schema):
    (graph, values), inputs = drawn(schema, target="learned"), inputs_of(schema)

    def train(reference, length):
        history = inputs.user.histories["clicks"].replace(length=length)
        model = nnx.merge(graph, values, copy=True)
        model.reference.set_value(reference)
        out = model(inputs.replace(user=inputs.user.replace(histories={"clicks": history})), key=jax.random.key(0))
        return out.losses["memory"], jnp.exp(out.stats["log_target_variance"]), model.reference[...]

    run = in_float64(train)
    few, eight = (jnp.asarray(lengths, jnp.int32) for lengths in ((0, 7, 0, 0), (0, 7, 1, 0)))
    loss, variance, first = run(jnp.zeros(()), eight)
    assert np.isfinite(loss) and first == pytest.approx(variance) and variance > 0
    assert run(jnp.zeros(()), few)[2] == 0  # too few to judge by
    for share, lengths, collapsed in ((0.101, eight, False), (0.099, eight, True), (0.01, few, False)):
        loss, _, kept = run(jnp.asarray(variance / share, jnp.float32), lengths)
        assert np.isnan(loss) == collapsed and kept == pytest.approx(variance / share)


def test_counts_of_the_docstring(schema):
    plain, read = (count("lmn", schema, {**SMALL, "read_from": name}) for name in ("sequence", "both"))
    W, p, n, K, d = 22, 6, 7, 4, 6
    one = 4 * W * p + 4 * n * p + 2 * K * d
    assert read.forward_flops_candidate - plain.forward_flops_candidate == one + 2 * d * 12
    assert plain.memory_params == 49 * d and plain.memory_slots == 49
    assert plain.active_params == plain.dense_params - plain.memory_params
    # The target product is training's alone, forward only.
    silent = count("lmn", schema, {**SMALL, "memory_weight": 0.0})
    assert read.forward_flops_user == silent.forward_flops_user
    assert read.train_flops_user - silent.train_flops_user == 2 * 7 * (W + 2) * d


def test_a_million_slots(schema):
    config = LMNConfig(memory_slots=2**20, memory_topk=16, key_width=64)
    assert plan_lmn(schema, config).memory.sub_keys == 1024
    counted, model = count("lmn_million", schema), abstract_model("lmn_million", schema)
    assert counted.memory_slots == 2**20 and counted.memory_params == 2**20 * 64
    assert tree_params(model) == counted.dense_params and model.memory.topk == 16
    assert model.memory.address.keys.shape == (1, 2, 1024, 64)


def test_every_read_is_recorded_for_updates_of_touched_rows(schema):
    (graph, values), inputs = drawn(schema, memory_loss_to="values"), inputs_of(schema)

    def ids(values, inputs):
        model = nnx.merge(graph, values)
        (path,) = value_tables(model)
        with recorded(model) as tapes:
            model(inputs, key=jax.random.key(0))
        return [read.ids for read in tapes[path].reads]

    shapes = [found.shape for found in jax.eval_shape(ids, values, inputs)]
    assert sorted(shapes) == sorted([(R * 7, 4), (R * C, 4), (R * 7, 4)])  # events, targets, events for the loss


def test_contradictions_are_named(schema, full_schema):
    for message, flags in (
        ("additive scores", dict(value_op="swilu")),
        ("additive scores", dict(query_norm="batch")),
        ("must be False", dict(values_per_token=True)),
        ("nothing to train", dict(values_frozen=True, memory_loss_to="values")),
        ("expected 0", dict(memory_weight=-1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            LMNConfig(**flags)
    with pytest.raises(ValueError, match="10 wide"):
        plan_lmn(schema, LMNConfig(target="event", value_width=6))
    alone = dataclasses.replace(schema, fields=schema.candidate_fields)
    with pytest.raises(ValueError, match="item_only"):
        plan_lmn(alone, LMNConfig())
    assert plan_lmn(alone, LMNConfig(query_mode="item_only")).flat.user_width == 0
    others = tuple(dataclasses.replace(f, table=None) for f in schema.fields)
    with pytest.raises(ValueError, match="candidate='project'"):
        plan_lmn(dataclasses.replace(schema, fields=others), LMNConfig())
