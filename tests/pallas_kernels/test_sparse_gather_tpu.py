"""Sparse reads on TPUs, interpreted on the CPU: both TensorCore kernels, their gradients, and SparseCore arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params
from sparse_reads import case, dense64, products64, read64

from recscale.pallas_kernels.compat import tpu_races_found
from recscale.pallas_kernels.sparse_gather import (
    hits,
    reference,
    sort_hits,
    sparse_dot,
    sparse_gather,
    sum_hits,
    tpu,
    tpu_copies,
    tpu_hits,
    tpu_sc,
    tpu_slab,
)
from recscale.pallas_kernels.sparse_gather.shapes import CASES
from recscale.pallas_kernels.sparse_gather.tpu_layout import LANES, as_words, split, tiling
from recscale.pallas_kernels.targets import get_target

V5E = get_target("tpu-v5e")

ON_CPU = dict(target=V5E, interpret=True)


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
    """Loops are not unrolled: interpreted kernels compile slowly."""
    for module, name in ((tpu_copies, "UNROLL"), (tpu_slab, "UNROLL"), (tpu_hits, "_UNROLL")):
        monkeypatch.setattr(module, name, 1)


def use(monkeypatch, variant):
    """Serves reads by one of the two TensorCore kernels, whatever the table's size."""
    monkeypatch.setattr(tpu_slab, "fits", lambda *_: variant == "slab")


def check_read(variant, values, ids, weights, monkeypatch):
    use(monkeypatch, variant)
    g = jnp.asarray(np.random.default_rng(9).standard_normal((ids.shape[0], values.shape[1])), jnp.float32)

    @jax.jit
    def both(values, ids, weights, g):
        # Through an open gate a read comes in float32.
        out, y = tpu.read(values, ids, weights, jnp.ones_like(g), "identity", **ON_CPU)
        return out, y, tpu.weight_gradient(values, ids, g, **ON_CPU)

    found, y, dw = both(values, ids, weights, g)
    values = values.astype(jnp.float32)
    np.testing.assert_allclose(found, read64(values, ids, weights), rtol=1e-5, atol=1e-5 * ids.shape[1] ** 0.5)
    np.testing.assert_array_equal(found, y)
    assert not np.asarray(found)[1].any()
    np.testing.assert_allclose(dw, products64(values, ids, g), rtol=1e-5, atol=1e-5 * g.shape[1] ** 0.5)


@pytest.mark.parametrize(
    "variant, per_read, width, rows, dtype",
    [("slab", 5, 72, 91, jnp.bfloat16), ("copies", 3, 200, 12, jnp.float32)],
)
def test_reads_and_weight_gradients(variant, per_read, width, rows, dtype, monkeypatch):
    check_read(variant, *case(21, per_read, rows, width, dtype), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant, dtype", [("slab", jnp.float32), ("copies", jnp.bfloat16)])
@pytest.mark.parametrize(
    "per_read, width, rows",
    [
        (1, 64, 1),
        (1, 128, 4096),
        (5, 72, 91),
        (3, 200, 12),
        (8, 1024, 65_536),
        (8, 192, 7),
        (32, 192, 4096),
        (128, 64, 7),
        (32, 128, 65_536),
        (5, 300, 91),
    ],
)
def test_reads_and_weight_gradients_at_more_shapes(variant, per_read, width, rows, dtype, monkeypatch):
    check_read(variant, *case(33, per_read, rows, width, dtype), monkeypatch)


def test_all_gradients_equal_those_of_the_reference(monkeypatch):
    check_gradients("one_plus_tanh", "slab", jnp.float32, monkeypatch, factored=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gate_fn, variant, dtype",
    [
        ("none", "slab", jnp.float32),
        ("none", "copies", jnp.bfloat16),
        ("tanh", "copies", jnp.float32),
        ("sigmoid", "slab", jnp.bfloat16),
        ("identity", "copies", jnp.float32),
        ("one_plus_tanh", "copies", jnp.bfloat16),
    ],
)
def test_all_gradients_equal_those_of_the_reference_for_every_gate(gate_fn, variant, dtype, monkeypatch):
    check_gradients(gate_fn, variant, dtype, monkeypatch)


def check_gradients(gate_fn, variant, dtype, monkeypatch, factored=True):
    use(monkeypatch, variant)
    monkeypatch.setattr(tpu_hits, "CHUNK", 128)
    values, ids, weights = case(30, 4, 9, 136, dtype)
    rng = np.random.default_rng(1)
    gate = None if gate_fn == "none" else jnp.asarray(rng.standard_normal((30, 136)), jnp.float32)
    dout = jnp.asarray(rng.standard_normal((30, 136)), jnp.float32)

    def loss(values, weights, probe, gate, implementation, value_grad="dense"):
        interpret = implementation == "pallas_tpu"
        out = sparse_gather(
            values, ids, weights, gate=gate, gate_fn=gate_fn, probe=probe, value_grad=value_grad,
            implementation=implementation, interpret=interpret,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) * dout), out

    wanted = (0, 1, 2) if gate is None else (0, 1, 2, 3)
    both = jax.jit(jax.grad(loss, argnums=wanted, has_aux=True), static_argnums=(4, 5))
    arguments = (values, weights, jnp.zeros((30, 136)), gate)
    expected, out_expected = both(*arguments, "reference")
    found, out = both(*arguments, "pallas_tpu")
    bound = 2e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (out, out_expected)), rtol=bound, atol=bound)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound * max(np.abs(b).max(), 1))
    if not factored:
        return
    # The same factors give the dense gradient exactly: dV[m] = sum of w g.
    constant = both(*arguments, "pallas_tpu", "rows")[0]
    assert not np.asarray(constant[0], np.float32).any()
    dense = jax.jit(functools.partial(tpu.value_gradient, 9, **ON_CPU))(ids, weights, constant[2])
    np.testing.assert_array_equal(dense.astype(dtype), found[0])


def summed_in_order(ids, weights, g, rows, piece):
    """dV in float32, hits in flat order, pieces added left to right."""
    total = np.zeros((rows, g.shape[1]), np.float32)
    for row in range(rows):
        products = [np.float32(weights[t, j]) * g[t] for t, j in zip(*np.nonzero(ids == row), strict=True)]
        for start in range(0, len(products), piece):
            total[row] += functools.reduce(np.add, products[start : start + piece], np.zeros_like(total[row]))
    return total


@pytest.mark.parametrize("piece", [20, pytest.param(4096, marks=pytest.mark.slow)])
def test_value_gradients_add_in_the_stated_order(piece, monkeypatch):
    # Several chunks, several blocks of rows, blocks without a hit, a hot row, absent hits.
    monkeypatch.setattr(tpu_hits, "CHUNK", 128)
    monkeypatch.setattr(tpu_hits, "_BLOCK_BYTES", 8 * 2 * LANES * 4)
    monkeypatch.setattr(tpu_hits, "PIECE", piece)
    rows, width = 60, 140
    values, ids, _ = case(70, 6, rows, width)
    ids = jnp.where((ids >= 16) & (ids < 33), 5, ids)
    rng = np.random.default_rng(3)
    # Whole numbers: products and sums are exact, whatever the order of operations within one addition ...
    whole_w, whole_g = (jnp.asarray(rng.integers(-9, 10, s), jnp.float32) for s in (ids.shape, (70, width)))
    gradients = jax.jit(functools.partial(tpu.gradients, **ON_CPU))
    dv, dw = gradients(values, ids, whole_w, whole_g)
    np.testing.assert_array_equal(dv, dense64(ids, whole_w, whole_g, rows))
    np.testing.assert_allclose(dw, products64(values, ids, whole_g), rtol=1e-5, atol=1e-3)
    # ... and powers of two as weights leave only the order to be wrong.
    w = jnp.asarray(2.0 ** rng.integers(-3, 4, ids.shape), jnp.float32)
    g = jnp.asarray(rng.standard_normal((70, width)), jnp.float32)
    dv, dw = gradients(values, ids, w, g)
    np.testing.assert_array_equal(dv, summed_in_order(np.asarray(ids), np.asarray(w), np.asarray(g), rows, piece))
    again = gradients(values, ids, w, g)
    np.testing.assert_array_equal(again[0], dv)
    np.testing.assert_array_equal(again[1], dw)
    hit = np.unique(np.asarray(ids)[np.asarray(ids) >= 0])
    assert not np.delete(np.asarray(dv), hit, axis=0).any() and np.asarray(dv)[hit].any(axis=1).all()


@pytest.mark.slow
def test_value_gradients_of_one_hot_row_and_of_shuffled_reads(monkeypatch):
    monkeypatch.setattr(tpu_hits, "CHUNK", 256)
    _, ids, weights = case(300, 20, 400, 8, absent=0.1)
    g = jnp.asarray(np.random.default_rng(3).standard_normal((300, 8)), jnp.float32)
    gradient = jax.jit(functools.partial(tpu.value_gradient, 400, **ON_CPU))
    found = gradient(ids, weights, g)
    np.testing.assert_allclose(found, sum_hits(sort_hits(ids, 400), weights, g, 400), rtol=1e-5, atol=1e-5)
    turn = np.random.default_rng(4).permutation(300)
    np.testing.assert_allclose(gradient(ids[turn], weights[turn], g[turn]), found, rtol=1e-5, atol=1e-5)
    one_row = jnp.where(ids >= 0, 5, ids)
    assert int(jnp.sum(one_row == 5)) > hits.PIECE
    np.testing.assert_allclose(gradient(one_row, weights, g), dense64(one_row, weights, g, 400), rtol=1e-4, atol=1e-3)
    beyond = jnp.where(ids >= 0, ids + 400, ids)
    last = jnp.where(ids >= 0, 399, ids)
    np.testing.assert_array_equal(gradient(beyond, weights, g), gradient(last, weights, g))
    absent = jnp.full_like(ids, -1)
    assert not np.asarray(gradient(absent, weights, g)).any()


def checked(function, *arguments):
    """A kernel run with simulated copies, memory that is NaN until written, and a search for races."""
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    found = function(*arguments, target=V5E, interpret=simulated)
    assert not tpu_races_found()
    return found


def test_copies_of_a_read_neither_race_nor_read_what_was_never_written(monkeypatch):
    use(monkeypatch, "copies")
    values, ids, weights = case(32, 4, 9, 130)
    out, _ = checked(tpu.read, values, ids, weights, None, "none")
    np.testing.assert_allclose(out, read64(values, ids, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_copies_of_gradients_neither_race_nor_read_what_was_never_written(monkeypatch):
    monkeypatch.setattr(tpu_hits, "CHUNK", 256)
    values, ids, weights = case(70, 4, 9, 130)
    g = jnp.asarray(np.random.default_rng(2).standard_normal((70, 130)), jnp.float32)
    products = products64(values, ids, g)
    for variant in ("copies", "slab"):
        use(monkeypatch, variant)
        np.testing.assert_allclose(checked(tpu.weight_gradient, values, ids, g), products, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        checked(tpu.read, values, ids, weights, None, "none")[0], read64(values, ids, weights), rtol=1e-5, atol=1e-5
    )
    dv, dw = checked(tpu.gradients, values, ids, weights, g)
    np.testing.assert_allclose(dv, dense64(ids, weights, g, 9), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dw, products, rtol=1e-5, atol=1e-4)


def test_ids_outside_the_table_are_clamped_or_refused(monkeypatch):
    values, weights = jnp.arange(6.0).reshape(3, 2), jnp.ones((1, 1))
    ids = jnp.asarray([[5000]])
    read = jax.jit(functools.partial(sparse_gather, implementation="pallas_tpu", interpret=True))
    for variant in ("slab", "copies"):
        use(monkeypatch, variant)
        np.testing.assert_array_equal(read(values, ids, weights), values[2:])
        read.clear_cache()
    monkeypatch.setenv("RECSCALE_CHECK", "1")
    with pytest.raises(ValueError, match="id 5000 is outside a table of 3 rows"):
        sparse_gather(values, ids, weights, implementation="pallas_tpu", interpret=True)


@pytest.mark.slow
def test_columns_or_rows_apart_give_the_whole():
    values, ids, weights = case(20, 6, 40, 256)
    read = functools.partial(sparse_gather, implementation="pallas_tpu", interpret=True)
    whole = read(values, ids, weights)
    halves = [read(values[:, at], ids, weights) for at in (slice(0, 128), slice(128, 256))]
    np.testing.assert_array_equal(jnp.concatenate(halves, axis=1), whole)
    ranks = [
        read(values[at : at + 10], jnp.where(ids // 10 == at // 10, ids - at, -1), weights) for at in (0, 10, 20, 30)
    ]
    np.testing.assert_allclose(sum(ranks), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_products_with_rows_replicas_and_rematerialisation():
    values, ids, _ = case(25, 5, 12, 8)
    x = jnp.asarray(np.random.default_rng(8).standard_normal((25, 8)), jnp.float32)

    def loss(values, x, implementation):
        s = sparse_dot(values, ids, x, implementation=implementation, interpret=implementation == "pallas_tpu")
        return jnp.sum(jnp.sin(s))

    expected = jax.grad(loss, argnums=(0, 1))(values, x, "reference")
    both = jnp.stack([values, -2 * values])
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):
        found = jax.grad(jax.checkpoint(loss, static_argnums=2), argnums=(0, 1))(values.astype(dtype), x, "pallas_tpu")
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=bound, atol=bound)
    replicas = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None, None))
    found, expected = (replicas(both, x, name) for name in ("pallas_tpu", "reference"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [c for c in CASES if c.group == "bench"], ids=lambda c: c.name)
def test_the_compiler_is_told_the_closed_form(named):
    call = functools.partial(named.call, implementation="pallas_tpu", interpret=True)
    costs = [
        equation.params["cost_estimate"]
        for equation in equations(jax.make_jaxpr(call)(*named.structs()).jaxpr)
        if equation.primitive.name == "pallas_call"
    ]
    # The backward case has no forward left once unused results are dropped, but the trace still holds it.
    cost = costs[-1]
    assert (cost.flops, cost.bytes_accessed) == (named.flops, named.bytes_moved)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


# ---- SparseCore: arithmetic and layout; the kernel itself is compiled, never executed


@pytest.mark.parametrize(
    "width, dtype", [(72, jnp.float32), (300, jnp.float32), (72, jnp.bfloat16), (300, jnp.bfloat16)]
)
def test_words_hold_rows_exactly(width, dtype):
    values, _, _ = case(1, 1, 6, width, dtype)
    tiles, parts = tiling(width, dtype)
    words = as_words(values)
    assert words.shape == (6, tiles, LANES) and words.dtype.itemsize == 4
    back = np.concatenate([np.asarray(part).reshape(6, -1) for part in split(words)], axis=1)
    assert len(split(words)) == parts
    np.testing.assert_array_equal(back[:, :width], np.asarray(values, np.float32))
    assert not back[:, width:].any()


@pytest.mark.parametrize(
    "target, reads, per_read, width, dtype",
    [
        ("tpu-v6e", 9, 7, 300, jnp.bfloat16),
        pytest.param("tpu-v6e", 70, 5, 72, jnp.float32, marks=pytest.mark.slow),
        pytest.param("tpu-7x", 33, 32, 300, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("tpu-v5p", 9, 128, 64, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_sparse_core_arithmetic(target, reads, per_read, width, dtype):
    """Layout in, arithmetic of a register for every read and tile, layout out: what surrounds and fills the kernel."""
    values, ids, weights = case(reads, per_read, 13, width, dtype)
    tiles, _ = tiling(width, dtype)
    shape = tpu_sc.shape_of(get_target(target), reads, per_read, tiles)
    flat_ids, flat_weights = tpu_sc.arranged(ids, weights, 13, shape)
    assert flat_ids.size % (shape.workers * shape.steps * shape.step * shape.padded) == 0
    assert shape.copied * shape.padded <= 128 and shape.step % shape.copied == 0 and shape.step % 8 == 0
    table = as_words(values).reshape(-1, LANES)
    by_read = jnp.stack([flat_ids, jax.lax.bitcast_convert_type(flat_weights, jnp.int32)]).reshape(2, -1, shape.padded)

    def one_read(numbers):
        weights = jax.lax.bitcast_convert_type(numbers[1], jnp.float32)
        sums = [
            tpu_sc.weighted_sum([table[numbers[0, j] * tiles + c] for j in range(shape.padded)], list(weights))
            for c in range(tiles)
        ]
        return jnp.stack([part for parts in zip(*sums, strict=True) for part in parts])

    sums = jax.jit(lambda numbers: jax.lax.map(one_read, numbers))(jnp.moveaxis(by_read, 1, 0))
    y = tpu_sc.joined(jnp.moveaxis(sums, 1, 0), reads, width)
    exact = read64(values.astype(jnp.float32), ids, weights)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5 * per_read**0.5)


def test_requests_that_cannot_be_served_say_why():
    values, ids, weights = case(4, 3)
    for name in ("pallas_tpu", "pallas_tpu_sc"):
        with pytest.raises(NotImplementedError, match="needs a TPU of a known kind"):
            sparse_gather(values, ids, weights, implementation=name)
    with pytest.raises(NotImplementedError, match="cannot be interpreted"):
        sparse_gather(values, ids, weights, implementation="pallas_tpu_sc", interpret=True)
    request = ((7, 5), jnp.float32, (4, 3), "none")
    assert tpu_sc.obstacle(V5E, *request) == "tpu-v5e has no SparseCores"
    for name in ("tpu-v5p", "tpu-v6e", "tpu-7x"):
        assert tpu_sc.obstacle(get_target(name), *request) is None
    assert "more than the 128 rows" in tpu_sc.obstacle(get_target("tpu-v6e"), (7, 5), jnp.float32, (4, 200), "none")
    assert tpu.obstacle(V5E, *request) is None
    assert "float16" in tpu.obstacle(V5E, (7, 5), jnp.float16, (4, 3), "none")
    assert "300 hits" in tpu.obstacle(V5E, (7, 5), jnp.float32, (4, 300), "none")
    assert "nothing to read" in tpu.obstacle(V5E, (7, 5), jnp.float32, (0, 3), "none")
    assert "scalar memory" in tpu.obstacle(V5E, (7, 5), jnp.float32, (10**7, 32), "none")
    # The rule of choice: a slab of 32-bit rows takes at most half of vector memory.
    assert tpu_slab.fits(V5E, 131_072) and not tpu_slab.fits(V5E, 131_073)
    assert tpu_copies.reads_per_block(10**6, 5) * 5 % LANES == 0
    assert reference.read(values, ids, weights).shape == (4, 5)
