"""The memory layer against dense references: gradients, theta, sharing, value operators, usage, probes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx

from recscale.models.memories.addressing import Found
from recscale.models.memories.axis_norm import make_axis_norm
from recscale.models.memories.options import MemoryOptions
from recscale.models.memories.product_key_memory import ProductKeyMemory
from recscale.models.memories.usage import UsageAccumulator, read_stats
from recscale.models.memories.value_table import ValueTable, probe_shapes, recorded, row_grads, value_tables
from recscale.pallas_kernels.sparse_gather import sort_hits, sum_hits

T, B, D = 3, 5, 8


@functools.cache
def drawn(options):
    def make():
        return ProductKeyMemory(T, D, options, rngs=nnx.Rngs(0))

    graph = nnx.split(nnx.eval_shape(make))[0]
    return graph, jax.jit(lambda: nnx.split(make())[1])()


def layer(**options):
    """A small memory, drawn in one program per configuration."""
    options = dict(memory_slots=25, memory_topk=4, key_width=6) | options
    return nnx.merge(*drawn(MemoryOptions(**options)), copy=True)


@functools.cache
def program(graph, static):
    @jax.jit
    def call(state, x, kwargs):
        own = nnx.merge(graph, state, copy=True)
        out = own(x, **dict(static), **kwargs)
        return out, nnx.split(own)[1]

    return call


def run(memory, x, **kwargs):
    """memory(x) in one program, made once for layers alike; state that a training call changes is kept."""
    graph, state = nnx.split(memory)
    static = tuple((name, kwargs.pop(name)) for name in ("train", "gate_fn") if name in kwargs)
    out, changed = program(graph, static)(state, x, kwargs)
    nnx.update(memory, changed)
    return out


def dense_read(memory, x):
    """Every one of the M slots scored, the K best kept, softmax over them: plain autodiff reaches everything."""
    address = memory.address
    q = address.query(x)
    q = q if address.query_norm is None else address.query_norm(q)
    keys, n = address.effective_keys(), memory.n
    s = jnp.einsum("nhap,hamp->nham", q, keys) * address.scale
    scores = (s[:, :, 0, :, None] + s[:, :, 1, None, :]).reshape(*s.shape[:2], n * n)
    # By place, not by comparing scores with the last kept: a compiled program may round the two differently.
    kept = jnp.any(jax.nn.one_hot(jax.lax.top_k(scores, memory.topk)[1], n * n, dtype=bool), axis=-2)
    weights = jax.nn.softmax(jnp.where(kept, scores, -jnp.inf), axis=-1)
    return jnp.einsum("nhm,md->nd", weights, memory.values.rows[...]).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("options", [dict(memory_heads=2), dict(theta="right_dxd", theta_noise=0.1, memory_topk=5)])
def test_gradients_equal_those_of_scoring_every_slot(options):
    memory, x, g = layer(**options), normal(T, B, D, seed=1), normal(T, B, D, seed=2)
    # A row key that wins every pair of its reads, and values hit by both heads.
    memory.address.keys[...] = memory.address.keys[...].at[0, 0, 2].multiply(8.0)
    graph, state = nnx.split(memory)

    def loss(state, x, read):
        memory = nnx.merge(graph, state, copy=True)
        return jnp.sum(jnp.sin(read(memory, x)) * g)

    found = jax.jit(jax.value_and_grad(lambda s, x: loss(s, x, lambda m, x: m(x).y), argnums=(0, 1)))(state, x)
    expected = jax.jit(jax.value_and_grad(lambda s, x: loss(s, x, dense_read), argnums=(0, 1)))(state, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
    keys = jnp.abs(found[1][0]["address"]["keys"][...]).max(axis=-1)
    assert float(keys[0, 0, 2]) > 0


def test_padded_reads_are_nothing():
    memory, x = layer(memory_heads=2, query_norm="batch"), normal(T, B, D)
    valid = jnp.asarray(np.random.default_rng(0).random((T, B)) < 0.6)
    junk = jnp.where(valid[..., None], x, 1e6)
    read, other = run(memory, x, train=True, valid=valid), layer(memory_heads=2, query_norm="batch")
    same = run(other, junk, train=True, valid=valid)
    np.testing.assert_allclose(same.y, read.y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(memory.address.query_norm.mean[...], other.address.query_norm.mean[...], rtol=1e-5)
    assert not np.asarray(read.y)[~np.asarray(valid)].any()
    assert int(read.stats["hits"].sum()) == 8 * int(valid.sum())
    grad = jax.jit(jax.grad(lambda x: jnp.sum(memory(x, valid=valid).y ** 2)))(x)
    assert not np.asarray(grad)[~np.asarray(valid)].any() and np.isfinite(grad).all()


@pytest.mark.slow
def test_batch_norm_learns_statistics_in_training_only():
    memory, x = layer(query_norm="batch"), 3.0 + 2.0 * normal(T, 200, D)
    before = memory.address.query_norm.mean[...]
    first = run(memory, x).y
    np.testing.assert_array_equal(memory.address.query_norm.mean[...], before)
    step = nnx.jit(lambda memory, x: memory(x, train=True))
    for _ in range(60):
        trained = step(memory, x).y
    q = memory.address.query(x)
    np.testing.assert_allclose(memory.address.query_norm.mean[...], q.mean(0), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(memory.address.query_norm.variance[...], q.var(0), rtol=1e-2, atol=1e-2)
    # The same statistics, so the same slots and nearly the same read; before, other ones.
    assert float(jnp.abs(run(memory, x).y - trained).mean()) < 0.05 * float(jnp.abs(first - trained).mean())


@pytest.mark.parametrize("order", ["ln_after", pytest.param("ln_before", marks=pytest.mark.slow)])
def test_theta_identity_is_none_and_folding_changes_nothing(order):
    x = normal(T, B, D)
    plain = layer(memory_heads=2)
    expected = run(plain, x).y
    for theta in ("right_dxd", "left_nxn"):
        mixed = layer(memory_heads=2, theta=theta, theta_order=order)
        mixed.address.keys[...] = plain.address.keys[...]
        mixed.values.rows[...] = plain.values.rows[...]
        mixed.address.query = plain.address.query
        np.testing.assert_array_equal(run(mixed, x).y, expected)
        mixed.address.theta[...] = mixed.address.theta[...] + 0.3 * normal(*mixed.address.theta.shape, seed=4)
        unfolded = run(mixed, x).y
        assert float(jnp.abs(unfolded - expected).max()) > 0
        mixed.fold()
        once = run(mixed, x).y
        np.testing.assert_allclose(once, unfolded, rtol=1e-6, atol=1e-6)
        mixed.fold()
        np.testing.assert_array_equal(run(mixed, x).y, once)
        assert not jax.tree.leaves(nnx.state(mixed.address, nnx.Param))[0].shape == mixed.address.keys.shape


@pytest.mark.parametrize(
    "theta, frozen, moves",
    [
        ("right_dxd", False, True),
        ("left_nxn", False, False),
        pytest.param("none", False, False, marks=pytest.mark.slow),
        pytest.param("right_dxd", True, True, marks=pytest.mark.slow),
    ],
)
def test_keys_that_were_never_read_move_with_theta_on_the_right_only(theta, frozen, moves):
    # Without a norm whose gain would move every key as well.
    options = dict(memory_slots=64, memory_topk=1, read_weights="none", key_norm=None)
    memory, x = layer(theta=theta, freeze_base_keys=frozen, **options), normal(1, 2, D)
    before = memory.address.effective_keys()
    ids = np.asarray(run(memory.address, x).ids).ravel()
    graph, params, rest = nnx.split(memory, nnx.Param, ...)
    scores = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p, rest, copy=True).address(x).scores))))
    grads = scores(params)
    after = nnx.merge(graph, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rest).address.effective_keys()
    moved = np.abs(np.asarray(after - before)).max(axis=-1)[0]
    for axis, hit in enumerate((ids // 8, ids % 8)):
        never = np.setdiff1d(np.arange(8), hit)
        assert (moved[axis, never] > 1e-7).all() if moves else not moved[axis, never].any()
        assert frozen or moved[axis, hit].any()


def test_values_per_token_are_tables_of_their_own():
    x = normal(T, B, D)
    memory = layer(values_per_token=True, query_per_token=True)
    tables = memory.values.rows[...].reshape(T, 25, D)
    y = run(memory, x).y
    for t in range(T):
        own = layer()
        own.address.keys[...] = memory.address.keys[...]
        own.address.query.layers[0].kernel[...] = memory.address.query.layers[0].kernel[...][t]
        own.values.rows[...] = tables[t]
        np.testing.assert_allclose(run(own, x[t : t + 1]).y[0], y[t], rtol=1e-5, atol=1e-6)


def test_a_pool_collects_the_gradients_of_its_layers():
    pool = ValueTable(25, D, std=1.0, rngs=nnx.Rngs(9))
    options = MemoryOptions(memory_slots=25, memory_topk=4, key_width=6)
    memories = nnx.List([ProductKeyMemory(T, D, options, values=pool, rngs=nnx.Rngs(i)) for i in range(3)])
    x = normal(T, B, D)
    assert list(value_tables(memories)) == ["0/values"]
    graph, tables, rest = nnx.split(memories, _is_table, ...)

    def loss(tables, which):
        merged = nnx.merge(graph, tables, rest, copy=True)
        return sum(jnp.sum(jnp.sin(merged[i](x).y)) for i in which)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole, parts = gradient(tables, (0, 1, 2)), [gradient(tables, (i,)) for i in range(3)]
    summed = jax.tree.map(lambda *g: sum(g), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, summed)


def test_pools_and_gates_that_do_not_fit_are_named():
    def make(**options):
        own = MemoryOptions(**dict(memory_slots=25, memory_topk=4, key_width=6) | options)
        return lambda: ProductKeyMemory(T, D, own, values=pool, rngs=nnx.Rngs(0))

    pool = ValueTable(25, D, std=1.0, rngs=nnx.Rngs(9))
    for message, options in (
        ("value_op='expert' has two tables", dict(value_op="expert")),
        ("value_op='prevalue' has two tables", dict(value_op="prevalue")),
        (r"has shape \(25, 8\), this layer wants \(36, 8\)", dict(memory_slots=36)),
        (r"wants \(25, 12\)", dict(value_width=12)),
        (r"wants \(50, 4\)", dict(score="tucker", tucker_cores=2)),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)()
    pool = None
    for options in (dict(value_op="swilu"), dict(score="tucker", tucker_cores=2)):
        memory = nnx.eval_shape(make(**options))
        with pytest.raises(ValueError, match="a gate needs value_op='bag' and one core"):
            jax.eval_shape(lambda x, memory=memory: memory(x, gate=x).y, normal(T, B, D))
    with pytest.raises(ValueError, match="norm is 'x', expected one of layer, rms, batch"):
        make_axis_norm(4, "x")
    assert make_axis_norm(4, None) is make_axis_norm(4, "none") is None


def _is_table(_, variable):
    from recscale.models.inputs.tables import Table

    return isinstance(variable, Table)


def test_gates_at_zero_values():
    memory, x, z = layer(value_init_std=0.0), normal(T, B, D), normal(T, B, D, seed=3)
    assert not np.asarray(memory.values.rows[...]).any()
    np.testing.assert_array_equal(run(memory, x, gate=z, gate_fn="one_plus_tanh").y, z)
    assert not np.asarray(run(memory, x, gate=z, gate_fn="tanh").y).any()
    memory.values.rows[...] = jnp.full_like(memory.values.rows[...], 9.0)
    assert float(run(memory, x, gate=z, gate_fn="tanh").stats["gate_saturated"]) == 1.0
    assert float(run(memory, x, gate=z, gate_fn="one_plus_tanh").stats["gate_saturated"]) > 0.95


class EverySlot(nnx.Module):
    """An address that gives every slot of a table with score 1."""

    def __init__(self, slots):
        self.slots = slots

    def __call__(self, x, *, train=False, valid=None):
        reads = x.shape[0] * x.shape[1]
        ids = jnp.broadcast_to(jnp.arange(self.slots, dtype=jnp.int32), (reads, 1, self.slots))
        return Found(jnp.ones((reads, 1, self.slots)), ids)


def test_experts_with_every_slot_are_a_two_layer_network():
    memory, x = layer(value_op="expert", read_weights="none"), normal(T, B, D)
    memory.address = EverySlot(25)
    u, v = memory.pre_values.rows[...], memory.values.rows[...]
    expected = jnp.einsum("tbm,md->tbd", jax.nn.gelu(jnp.einsum("tbd,md->tbm", x, u), approximate=True), v)
    np.testing.assert_allclose(run(memory, x).y, expected, rtol=1e-5, atol=1e-5)


def test_an_expansion_of_one_is_a_bag_and_a_projection():
    x = normal(T, B, D)
    memory, bag = layer(value_op="expansion", expansion=1), layer()
    bag.address, bag.values = memory.address, memory.values
    np.testing.assert_allclose(run(memory, x).y, memory.out(run(bag, x).y), rtol=1e-5, atol=1e-6)


def test_an_expansion_has_as_many_sub_keys_as_its_virtual_slots():
    assert MemoryOptions(memory_slots=25, memory_topk=10, value_op="expansion", expansion=4).virtual_sub_keys == 10
    for topk, value_op in ((11, "expansion"), (6, "bag")):
        with pytest.raises(ValueError, match=f"n = {topk - 1} sub-keys per axis"):
            MemoryOptions(memory_slots=25, memory_topk=topk, value_op=value_op)


@pytest.mark.slow
def test_grouped_expansion_projects_each_group_apart():
    memory, x = layer(value_op="expansion", expansion=4, memory_topk=6), normal(T, B, D)
    found = run(memory.address, x)
    weights, ids = jax.nn.softmax(found.scores, axis=-1)[:, 0], np.asarray(found.ids)[:, 0]
    virtual = np.asarray(memory.permutation[...])[ids]
    assert sorted(memory.permutation[...]) == list(range(100))
    kernel, values = memory.out.kernel[...].reshape(4, D, D), memory.values.rows[...]
    expected = np.zeros((T * B, D))
    for t, k in np.ndindex(ids.shape):
        expected[t] += float(weights[t, k]) * np.asarray(values[virtual[t, k] % 25] @ kernel[virtual[t, k] // 25])
    np.testing.assert_allclose(run(memory, x).y.reshape(-1, D), expected, rtol=1e-4, atol=1e-5)


def test_prevalue_weighs_slots_by_a_second_table():
    memory, x = layer(value_op="prevalue", prevalue_width=4, read_weights="relu"), normal(T, B, D)
    found = run(memory.address, x)
    ids, w = np.asarray(found.ids)[:, 0], np.maximum(np.asarray(found.scores)[:, 0], 0)
    inner = np.einsum("ne,nje->nj", memory.project(x).reshape(-1, 4), np.asarray(memory.pre_values.rows[...])[ids])
    y = np.einsum("nj,njd->nd", w * inner, np.asarray(memory.values.rows[...])[ids])
    np.testing.assert_allclose(run(memory, x).y.reshape(-1, D), y @ memory.out.kernel[...], rtol=1e-4, atol=1e-5)


def tucker(cores=1, topk=5, **options):
    memory = layer(
        score="tucker", tucker_cores=cores, memory_topk=topk, read_weights="none", query_norm=None, key_norm=None,
        **options,
    )  # fmt: skip
    memory.address.core[...] = normal(*memory.address.core.shape, seed=7)
    memory.address.refresh()
    return memory


def test_tucker_with_all_sub_keys_is_brute_force_over_all_slots():
    memory, x = tucker(cores=2), normal(T, B, D)
    address = memory.address
    found = run(address, x)
    s = np.einsum("nhap,rhamp->nhamr", address.query(x), address.keys[...])
    every = np.einsum("nhir,chrs,nhjs->nchij", s[:, :, 0], address.core[...], s[:, :, 1]).reshape(T * B, 2, 1, 25)
    total = every.sum(1)
    order = np.argsort(-total, axis=-1, kind="stable")[..., :5]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(every, order[:, None], -1), rtol=1e-4, atol=1e-5)
    # Each core weighs its own half of the value.
    halves = np.asarray(memory.values.rows[...]).reshape(25, 2, D // 2)[np.asarray(found.ids)[:, 0]]
    expected = np.einsum("nck,nkcd->ncd", np.asarray(found.scores)[:, :, 0], halves).reshape(T, B, D)
    np.testing.assert_allclose(run(memory, x).y, expected, rtol=1e-4, atol=1e-5)


def test_tucker_antidiagonal_with_a_constant_component_is_additive():
    x = normal(T, B, D).at[..., 0].set(1.0)
    additive = layer(query_norm=None, key_norm=None, score_scale="none", read_weights="none")
    memory = tucker(topk=4)
    kernel = additive.address.query.layers[0].kernel[...]
    # The last key feature is the constant input 1; the second component picks it alone.
    kernel = kernel.reshape(D, 2, 6).at[:, :, 5].set(0.0).at[0, :, 5].set(1.0).reshape(D, 12)
    keys = additive.address.keys[...].at[..., 5].set(0.0)
    for module in (additive.address, memory.address):
        module.query.layers[0].kernel[...] = kernel
    additive.address.keys[...] = keys
    memory.address.keys[...] = jnp.stack([keys, jnp.zeros_like(keys).at[..., 5].set(1.0)])
    memory.address.core[...] = jnp.asarray([[0.0, 1.0], [1.0, 0.0]]).reshape(1, 1, 2, 2)
    memory.address.left[...] = memory.address.right[...] = jnp.asarray([[1.0, 0.0]])
    memory.values = additive.values
    expected, found = run(additive.address, x), run(memory.address, x)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(memory, x).y, run(additive, x).y, rtol=1e-5, atol=1e-5)


def test_singular_vectors_are_state_that_training_refreshes():
    memory, x = tucker(), normal(T, B, D)
    graph, params, state = nnx.split(memory, nnx.Param, ...)
    u = memory.address.left[...]
    np.testing.assert_allclose(jnp.abs(u), jnp.abs(jnp.linalg.svd(memory.address.core[...][0])[0][:, :, 0]), rtol=1e-5)
    moved = jax.tree.map(lambda p: p, params)
    moved["address"]["core"][...] = params["address"]["core"][...] * -1.5
    again = nnx.merge(graph, moved, state, copy=True)
    np.testing.assert_array_equal(again.address.left[...], u)  # restored, not recomputed
    run(again, x)
    np.testing.assert_array_equal(again.address.left[...], u)
    run(again, x, train=True)
    np.testing.assert_allclose(again.address.left[...], u, rtol=1e-5)  # the sign stays
    np.testing.assert_allclose(again.address.right[...], -memory.address.right[...], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(memory_heads=2),
        dict(value_op="expert"),
        dict(value_op="prevalue", prevalue_width=4),
        dict(value_op="expansion", expansion=4),
        dict(score="tucker", tucker_cores=2),
    ],
)
def test_probe_gradients_give_the_dense_gradient_of_every_table(options):
    memory, x = layer(**options), normal(T, B, D)
    graph, tables, rest = nnx.split(memory, _is_table, ...)

    def loss(tables, probes):
        merged = nnx.merge(graph, tables, rest, copy=True)
        if probes is None:
            return jnp.sum(jnp.sin(merged(x).y)), None
        with recorded(merged, probes) as tapes:
            y = merged(x).y
        return jnp.sum(jnp.sin(y)), {path: tape.reads for path, tape in tapes.items()}

    dense = jax.jit(jax.grad(lambda t: loss(t, None)[0]))(tables)

    def shapes(x):
        own = nnx.merge(graph, tables, rest, copy=True)
        with recorded(own) as tapes:
            own(x)
        return {path: tape.reads for path, tape in tapes.items()}

    widths = {path: table.rows.shape for path, table in value_tables(memory).items()}
    probes = {
        path: [jnp.zeros(shape) for shape in probe_shapes(reads, widths[path][1])]
        for path, reads in jax.eval_shape(shapes, x).items()
    }
    grads, reads = jax.jit(jax.grad(loss, argnums=1, has_aux=True))(tables, probes)
    assert set(grads) == {"values", "pre_values"} & set(dense)
    for path, g in grads.items():
        rows, width = widths[path]
        factors = row_grads(reads[path], g)
        total = np.zeros((rows, width))
        for i, w, r in zip(*(np.asarray(part) for part in factors[:3]), strict=True):
            total[i] += w * np.asarray(factors.g[r]) if i >= 0 else 0.0
        np.testing.assert_allclose(total, dense[path]["rows"][...], rtol=1e-4, atol=1e-6)
    if options == dict(memory_heads=2):
        (read,), (g,) = reads["values"], grads["values"]
        exact = sum_hits(sort_hits(read.ids, 25), read.factor, g, 25)
        np.testing.assert_array_equal(exact, dense["values"]["rows"][...])
    assert value_tables(memory)["values"].tape is None


def test_controls_train_nothing_of_what_they_freeze():
    hashed, frozen = layer(addressing="random"), layer(values_frozen=True)
    assert not jax.tree.leaves(nnx.state(hashed.address, nnx.Param))
    assert not value_tables(frozen) and jax.tree.leaves(nnx.state(frozen.address, nnx.Param))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(hashed(x).y)))(normal(T, B, D))
    assert not np.asarray(grad).any()


def test_usage_on_hand_made_counts():
    stats = jax.jit(read_stats, static_argnums=2)
    slots = jnp.arange(16, dtype=jnp.int32).reshape(4, 4)
    uniform = stats(slots, jnp.full((4, 1, 4), 0.25), 16)
    assert float(uniform["usage"]) == 1.0 and abs(float(uniform["kl"])) < 1e-6
    assert float(uniform["top1_weight"]) == 0.25 and float(uniform["effective_slots"]) == pytest.approx(4.0)
    assert float(uniform["usage_null"]) == pytest.approx(1 - (15 / 16) ** 16, rel=1e-5)
    assert float(uniform["hits_per_slot"]) == 1.0
    one = stats(jnp.zeros((4, 4), jnp.int32), jnp.full((4, 1, 4), 0.25), 16)
    assert float(one["usage"]) == 1 / 16 and float(one["kl"]) == pytest.approx(np.log(16), rel=1e-6)
    absent = stats(jnp.full((2, 3), -1), jnp.zeros((2, 1, 3)), 16)
    assert all(np.isfinite(value).all() for value in absent.values()) and float(absent["usage"]) == 0.0

    many = jnp.asarray([[3, 900, 3, -1], [900, 3, 70, 70]])
    found = stats(many, jnp.arange(8.0).reshape(2, 1, 4), 1000)  # few hits: counted by sorting
    spread = np.asarray(found["weight"]) / np.asarray(found["weight"]).sum()
    expected = np.log(1000) + np.sum(spread[spread > 0] * np.log(spread[spread > 0]))
    assert float(found["kl"]) == pytest.approx(expected, rel=1e-5) and float(found["usage"]) == pytest.approx(3e-3)

    accumulator = UsageAccumulator(16, sub_keys=4)
    with pytest.raises(ValueError, match="no memory read was accumulated"):
        accumulator.metrics()
    for _ in range(3):
        accumulator.add(uniform["hits"], uniform["weight"])
    found = accumulator.metrics()
    assert found["usage"] == 1.0 and found["kl"] == pytest.approx(0.0, abs=1e-12) and found["hits_per_slot"] == 3.0
    assert found["kl_null"] == 15 / 96 and found["row_usage"] == found["column_usage"] == 1.0
    single = UsageAccumulator(16, sub_keys=4)
    single.add(one["hits"], one["weight"])
    assert single.metrics()["kl"] == pytest.approx(np.log(16)) and single.metrics()["row_usage"] == 0.25
    weightless = UsageAccumulator(4)
    weightless.add([3, 1, 0, 0], np.zeros(4))  # the hits alone say where reads went
    assert weightless.metrics()["kl"] == pytest.approx(np.log(4) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25))


def test_usage_nulls_hold_under_uniform_routing():
    rng = np.random.default_rng(0)
    slots = 4096
    for per_slot in (1, 16):
        counts = np.bincount(rng.integers(0, slots, slots * per_slot), minlength=slots)
        accumulator = UsageAccumulator(slots)
        accumulator.add(counts, counts.astype(float))
        found = accumulator.metrics()
        assert found["usage"] == pytest.approx(found["usage_null"], abs=0.02)
        if per_slot == 16:
            assert found["kl"] == pytest.approx(found["kl_null"], rel=0.08)
        else:
            assert found["usage_null"] == pytest.approx(0.632, abs=1e-3)
            assert found["kl"] == pytest.approx(0.576, abs=0.03)  # the formula says 0.5 there


@pytest.mark.slow
def test_layer_can_be_built_from_explicit_sizes():
    options = MemoryOptions(memory_slots=49, memory_topk=7, read_weights="sigmoid")
    memory = ProductKeyMemory(T, D, options, rngs=nnx.Rngs(0))
    assert run(memory, normal(T, B, D)).y.shape == (T, B, D)
    with pytest.raises(ValueError, match="value_op='bag'"):
        layer(value_op="swilu")(normal(T, B, D), gate=normal(T, B, D), gate_fn="tanh")
    assert dataclasses.replace(MemoryOptions(), memory_slots=2**9).slots == 23**2
