"""Sparse reads against float64 references: sums, gates, gradients, their order, the probe, absent and wrong ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_reads import case, dense64, products64, read64

from recscale.pallas_kernels.sparse_gather import hits, sort_hits, sparse_dot, sparse_gather, sum_hits, xla

IMPLEMENTATIONS = ("xla", "reference")

gather = jax.jit(sparse_gather, static_argnames=("gate_fn", "value_grad", "implementation"))


@pytest.mark.parametrize(
    "per_read, width, rows",
    [
        (1, 64, 1),
        (8, 192, 7),
        (32, 128, 4096),
        (128, 64, 7),
        (5, 72, 91),
        pytest.param(8, 1024, 65_536, marks=pytest.mark.slow),
    ],
)
def test_forward(per_read, width, rows):
    values, ids, weights = case(33, per_read, rows, width)
    expected = read64(values, ids, weights)
    for implementation in IMPLEMENTATIONS:
        found = gather(values, ids, weights, implementation=implementation)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * per_read**0.5)
        assert not np.asarray(found)[1].any()
        low = gather(values.astype(jnp.bfloat16), ids, weights, implementation=implementation)
        exact = read64(np.asarray(values.astype(jnp.bfloat16), np.float32), ids, weights)
        assert low.dtype == jnp.bfloat16  # rounded once, after a float32 sum
        np.testing.assert_allclose(np.asarray(low, np.float64), exact, rtol=2**-8, atol=1e-5 * per_read**0.5)


def gate64(name, y):
    tanh = np.tanh(y)
    return {
        "none": (y, np.ones_like(y)),
        "identity": (y, np.ones_like(y)),
        "tanh": (tanh, 1 - tanh**2),
        "one_plus_tanh": (1 + tanh, 1 - tanh**2),
        "sigmoid": (1 / (1 + np.exp(-y)), np.exp(-y) / (1 + np.exp(-y)) ** 2),
    }[name]


@pytest.mark.parametrize("gate_fn", ["none", "tanh", "sigmoid", "identity", "one_plus_tanh"])
def test_gates_and_all_gradients(gate_fn, monkeypatch):
    values, ids, weights = case(30, 4, 9, 6)
    rng = np.random.default_rng(1)
    gate = None if gate_fn == "none" else jnp.asarray(rng.standard_normal((30, 6)), jnp.float32)
    dout = jnp.asarray(rng.standard_normal((30, 6)), jnp.float32)
    probe = jnp.asarray(rng.standard_normal((30, 6)), jnp.float32)  # of zeros it would be, but for the test
    y = read64(values, ids, weights) + np.asarray(probe, np.float64)
    opened, slope = gate64(gate_fn, y)
    held = np.ones_like(y) if gate is None else np.asarray(gate, np.float64)
    g = np.asarray(dout, np.float64) * held * slope
    dw = products64(values, ids, g)
    expected = (dense64(ids, weights, g, 9), dw, np.asarray(dout, np.float64) * opened, g)

    for implementation, limit in (("reference", None), ("xla", None), ("xla", 8 * 24 * 7)):
        if limit:  # a few reads or hits a chunk: several chunks and a remainder
            monkeypatch.setattr(xla, "_LIMIT_BYTES", limit)
            monkeypatch.setattr(hits, "_LIMIT_BYTES", limit // 8)

        def loss(values, weights, gate, probe, implementation=implementation):
            out = sparse_gather(
                values, ids, weights, gate=gate, gate_fn=gate_fn, probe=probe, implementation=implementation
            )
            return jnp.sum(out * dout), out

        arguments = (values, weights, gate, probe)
        wanted = (0, 1, 3) if gate is None else (0, 1, 2, 3)
        grads, out = jax.jit(jax.grad(loss, argnums=wanted, has_aux=True))(*arguments)
        np.testing.assert_allclose(out, held * opened if gate is not None else y, rtol=1e-5, atol=1e-5)
        for index, found in zip(wanted, grads, strict=True):
            reference = expected[index]
            np.testing.assert_allclose(found, reference, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_a_saturated_gate_is_finite_and_an_empty_bag_gives_the_gate_of_zero():
    values, ids, weights = jnp.full((3, 4), 20.0), jnp.asarray([[0], [-1]]), jnp.ones((2, 1))
    gate = jnp.full((2, 4), 3.0)

    def loss(weights, gate, name):
        return jnp.sum(sparse_gather(values, ids, weights, gate=gate, gate_fn=name))

    for name in ("tanh", "one_plus_tanh", "sigmoid"):
        grads = jax.grad(loss, argnums=(0, 1))(weights, gate, name)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.asarray(sparse_gather(values, ids, weights, gate=gate, gate_fn="tanh"))[1].any()
    np.testing.assert_array_equal(
        sparse_gather(values, ids, weights, gate=gate, gate_fn="one_plus_tanh")[1], np.full(4, 3.0)
    )


@pytest.mark.parametrize("rows, per_read", [(50, 6), (5_000_000, 6), (3, 300)])
def test_hits_are_sorted_by_row_and_then_as_they_came(rows, per_read):
    rng = np.random.default_rng(2)
    ids = rng.integers(-1, rows, (70, per_read)).astype(np.int32)
    ids[0, :3] = [rows - 1, 0, rows - 1]
    found = jax.jit(sort_hits, static_argnums=1)(jnp.asarray(ids), rows)
    flat = np.where(ids < 0, rows, ids).ravel()
    order = np.argsort(flat, kind="stable")
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_array_equal(found.rows, flat[order])


def test_sums_are_exactly_0_elsewhere_bit_equal_on_rerun_and_stable_under_shuffling():
    values, ids, weights = case(40, 6, 400, 16, absent=0.1)
    g = jnp.asarray(np.random.default_rng(3).standard_normal((40, 16)), jnp.float32)
    sums = jax.jit(lambda i, w, g: sum_hits(sort_hits(i, 400), w, g, 400))
    found = np.asarray(sums(ids, weights, g))
    np.testing.assert_array_equal(found, sums(ids, weights, g))
    hit = np.unique(np.asarray(ids)[np.asarray(ids) >= 0])
    assert not np.delete(found, hit, axis=0).any() and found[hit].any(axis=1).all()
    turn = np.random.default_rng(4).permutation(40)
    np.testing.assert_allclose(sums(ids[turn], weights[turn], g[turn]), found, rtol=1e-5, atol=1e-5)
    one_row = jnp.where(ids >= 0, 5, ids)
    np.testing.assert_allclose(sums(one_row, weights, g), dense64(one_row, weights, g, 400), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_hot_row_is_summed_in_pieces_from_left_to_right(monkeypatch):
    monkeypatch.setattr(hits, "PIECE", 4)
    rng = np.random.default_rng(5)
    ids = np.where(rng.random((20, 3)) < 0.6, 2, rng.integers(0, 6, (20, 3)))
    ids[3] = -1
    weights = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((20, 5)), jnp.float32)
    expected = np.zeros((6, 5), np.float32)
    for row in range(6):
        products = [np.float32(weights[t, j]) * np.asarray(g[t]) for t, j in zip(*np.nonzero(ids == row), strict=True)]
        for start in range(0, len(products), 4):
            piece = np.zeros(5, np.float32)
            for product in products[start : start + 4]:
                piece = piece + product
            expected[row] = expected[row] + piece
    found = sum_hits(sort_hits(jnp.asarray(ids), 6), weights, g, 6)
    np.testing.assert_array_equal(found, expected)


def test_probe_and_row_gradients_give_the_dense_gradient_exactly():
    values, ids, weights = case(25, 5, 12, 8)
    gate = jnp.asarray(np.random.default_rng(6).standard_normal((25, 8)), jnp.float32)

    def loss(values, probe, value_grad):
        out = sparse_gather(values, ids, weights, gate=gate, gate_fn="tanh", probe=probe, value_grad=value_grad)
        return jnp.sum(jnp.sin(out))

    both = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    dense, _ = both(values, jnp.zeros((25, 8)), "dense")
    for value_grad in ("rows", "none"):
        constant, g = both(values, jnp.zeros((25, 8)), value_grad)
        assert not np.asarray(constant).any()
        np.testing.assert_array_equal(jax.jit(sum_hits, static_argnums=3)(sort_hits(ids, 12), weights, g, 12), dense)


def test_products_with_rows_and_their_gradients():
    values, ids, _ = case(25, 5, 12, 8)
    x = jnp.asarray(np.random.default_rng(8).standard_normal((25, 8)), jnp.float32)

    def loss(values, x, implementation, value_grad="dense"):
        s = sparse_dot(values, ids, x, implementation=implementation, value_grad=value_grad)
        return jnp.sum(jnp.sin(s)), s

    both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=(2, 3))
    expected, s = both(values, x, "reference", "dense")
    np.testing.assert_allclose(s, products64(values, ids, x), rtol=1e-5, atol=1e-5)
    found, same = both(values, x, "xla", "dense")
    np.testing.assert_allclose(same, s, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    constant, _ = both(values, x, "xla", "rows")
    assert not np.asarray(constant[0]).any() and np.asarray(constant[1]).any()
    for given in ((values, ids, x[:3]), (values, ids, x[:, :3]), (values[0], ids, x), (values, ids[0], x)):
        with pytest.raises(ValueError, match="sparse_dot: values"):
            sparse_dot(*given)
    with pytest.raises(ValueError, match="value_grad is 'sparse'"):
        sparse_dot(values, ids, x, value_grad="sparse")
    with pytest.raises(NotImplementedError, match="sparse_dot cannot run as 'pallas_tpu'"):
        sparse_dot(values, ids, x, implementation="pallas_tpu")


def test_products_with_rounded_rows_have_float32_sums():
    """dx of bfloat16 values is the float32 read of them, and the values' gradient is theirs in dtype."""
    values, ids, ds = case(25, 5, 12, 8, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(8).standard_normal((25, 8)), jnp.float32)
    s, pull = jax.vjp(lambda values, x: sparse_dot(values, ids, x, implementation="xla"), values, x)
    dvalues, dx = pull(ds)
    wide = np.asarray(values, np.float64)
    np.testing.assert_allclose(s, products64(wide, ids, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, read64(wide, ids, ds), rtol=1e-5, atol=1e-5)
    assert dvalues.dtype == jnp.bfloat16
    expected = dense64(ids, ds, x, 12)
    np.testing.assert_allclose(np.asarray(dvalues, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_chunks_of_reads_hold_64_mib_of_rows(monkeypatch):
    """Eight float32 rows of every read at a time, or as many as a read has."""
    assert xla._chunk(jax.ShapeDtypeStruct((7, 192), jnp.bfloat16)) == 2**26 // (8 * 192 * 4)
    assert [xla._unroll(jax.ShapeDtypeStruct((3, hits), jnp.int32)) for hits in (5, 8, 32)] == [5, 8, 8]


def test_temporaries_stay_far_below_the_gathered_rows():
    reads, per_read, width, rows = 32_768, 32, 256, 65_536
    shape = jax.ShapeDtypeStruct

    def step(values, ids, weights, dout):
        out, pull = jax.vjp(lambda v, w: sparse_gather(v, ids, w), values, weights)
        return out, pull(dout)

    arguments = (shape((rows, width), jnp.float32), shape((reads, per_read), jnp.int32))
    arguments += (shape((reads, per_read), jnp.float32), shape((reads, width), jnp.float32))
    memory = jax.jit(step).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 2**20 < reads * per_read * width * 4


def test_ids_outside_the_table(monkeypatch):
    values, weights = jnp.arange(6.0).reshape(3, 2), jnp.ones((1, 1))
    ids = jnp.asarray([[7]])
    np.testing.assert_array_equal(sparse_gather(values, ids, weights), values[2:])
    monkeypatch.setenv("RECSCALE_CHECK", "1")
    with pytest.raises(ValueError, match="id 7 is outside a table of 3 rows"):
        sparse_gather(values, ids, weights)
    two, x = jnp.ones((1, 2)), jnp.ones((1, 2))
    for call in (lambda ids: sparse_gather(values, ids, two), lambda ids: sparse_dot(values, ids, x)):
        assert call(jnp.asarray([[0, 2]])).shape == (1, 2)
        with pytest.raises(ValueError, match="id 3 is outside a table of 3 rows"):
            call(jnp.asarray([[0, 3]]))
    one_row = jnp.ones((1, 2))
    assert not sparse_gather(one_row, jnp.asarray([[-1]]), weights).any() and not sparse_dot(one_row, -ids, x).any()
    nothing = jnp.zeros((0, 2), jnp.int32)
    assert (
        sparse_gather(one_row, nothing, jnp.zeros((0, 2))).shape == sparse_dot(one_row, nothing, x[:0]).shape == (0, 2)
    )
    with pytest.raises(Exception, match="id 7 is outside a table of 3 rows"):
        jax.block_until_ready(jax.jit(lambda i: sparse_gather(values, i, weights))(ids))
        jax.effects_barrier()


@pytest.mark.slow
def test_replicas_under_vmap():
    values, ids, weights = case(9, 3, 8, 4)
    both = jnp.stack([values, -2 * values])

    def loss(values, weights):
        return jnp.sum(sparse_gather(values, ids, weights) ** 2)

    found = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None))(both, weights)
    for i in range(2):
        alone = jax.grad(loss, argnums=(0, 1))(both[i], weights)
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


def test_errors_name_what_was_wrong():
    values, ids, weights = case(4, 3)
    gate = jnp.ones((4, 5))
    for message, kwargs in (
        ("gate_fn is 'relu'", dict(gate_fn="relu")),
        ("gate is absent", dict(gate_fn="tanh")),
        ("gate is given", dict(gate=gate)),
        ("give zeros", dict(value_grad="rows")),
        ("value_grad is 'sparse'", dict(value_grad="sparse")),
        ("probe has shape", dict(probe=gate[:2])),
        ("interpret=True", dict(interpret=True)),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_gather(values, ids, weights, **kwargs)
    for given in ((values, ids, weights[:2]), (values[0], ids, weights), (values, ids[0], weights[0])):
        with pytest.raises(ValueError, match="expected \\[M, d\\]"):
            sparse_gather(*given)
    with pytest.raises(ValueError, match="expected int32"):
        sparse_gather(values, weights, weights)
    with pytest.raises(NotImplementedError, match="pallas_tpu"):
        sparse_gather(values, ids, weights, implementation="pallas_tpu")
