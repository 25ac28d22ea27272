"""The Hopper kernels of sparse reads, interpreted: sums, gates, both gradients, pieces of hot rows, wrong ids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.sparse_gather import gpu, sparse_gather
from recscale.pallas_kernels.targets import compiling_for, get_target

KERNEL = dict(implementation="pallas_gpu", interpret=True)

# Two warpgroups in all, so that each has several reads and runs end amid rows.
TARGET = dataclasses.replace(get_target("h100"), sms=1)


@pytest.fixture(autouse=True)
def few_in_flight(monkeypatch):
    """Whole pieces and rests at small shapes; they also compile sooner."""
    monkeypatch.setattr(gpu, "_READ", (2, 3))
    monkeypatch.setattr(gpu, "_GRADIENTS", (2, 3))


SLOW = pytest.mark.slow  # the interpreter takes seconds for each shape of program


def case(reads, per_read, rows, width, dtype=jnp.float32, seed=0):
    """Values, ids with absent hits, an empty read and duplicates, weights, g; small integers: every sum is exact."""
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((reads, per_read)) < 0.2, -1, rng.integers(0, rows, (reads, per_read)))
    if reads > 2:
        ids[1], ids[2] = -1, ids[2, 0]
    values, weights, g = (rng.integers(-3, 4, s) for s in ((rows, width), (reads, per_read), (reads, width)))
    return (
        jnp.asarray(values, dtype),
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(g, dtype),
    )


def expected64(values, ids, weights, g):
    """y, dV and dw in float64, ids beyond the table clamped."""
    values, ids, weights, g = (np.asarray(a, np.float64) for a in (values, ids, weights, g))
    index = np.clip(ids.astype(int), 0, len(values) - 1)
    weights = np.where(ids >= 0, weights, 0.0)
    dvalues = np.zeros_like(values)
    np.add.at(dvalues, index, weights[..., None] * g[:, None])
    dw = np.where(ids >= 0, np.einsum("nd,njd->nj", g, values[index]), 0.0)
    return np.einsum("nj,njd->nd", weights, values[index]), dvalues, dw


@pytest.mark.parametrize(
    "reads, per_read, rows, width, dtype",
    [
        (5, 1, 1, 64, jnp.float32),
        (5, 7, 9, 128, jnp.bfloat16),
        (3, 3, 4, 192, jnp.bfloat16),
        (1, 8, 30, 1024, jnp.float32),
        (7, 4, 91, 320, jnp.float32),
    ],
)
def test_reads_are_weighted_sums(reads, per_read, rows, width, dtype):
    values, ids, weights, g = case(reads, per_read, rows, width, dtype)
    out, y = gpu.read(values, ids, weights, None, "none", target=TARGET, interpret=True)
    assert out.dtype == dtype and y is None
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected64(values, ids, weights, g)[0])
    dw = gpu.weight_gradient(values, ids, g, target=TARGET, interpret=True)
    np.testing.assert_array_equal(dw, expected64(values, ids, weights, g)[2])


def test_sums_are_float32_and_rounded_once():
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.standard_normal((9, 64)), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, 9, (3, 40)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((3, 40)), jnp.float32)
    out, _ = gpu.read(values, ids, weights, None, "none", target=TARGET, interpret=True)
    exact, _, _ = expected64(values, ids, weights, np.zeros((3, 64)))
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    "gate_fn", ["one_plus_tanh", *(pytest.param(name, marks=SLOW) for name in ("tanh", "sigmoid", "identity"))]
)
def test_gates_and_their_gradients(gate_fn):
    values, ids, weights, dout = case(4, 4, 9, 64)
    values, gate = values / 4, jnp.asarray(np.random.default_rng(1).standard_normal(dout.shape), jnp.float32)

    def loss(values, weights, gate, **options):
        out = sparse_gather(values, ids, weights, gate=gate, gate_fn=gate_fn, **options)
        return jnp.sum(out * dout), out

    def both(**options):
        return jax.jit(jax.grad(lambda *a: loss(*a, **options), argnums=(0, 1, 2), has_aux=True))(values, weights, gate)

    for found, reference in zip(*map(jax.tree.leaves, (both(**KERNEL), both(implementation="reference"))), strict=True):
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, width", [pytest.param(jnp.float32, 128, marks=SLOW), (jnp.bfloat16, 64)])
def test_gradients_in_one_pass(dtype, width, monkeypatch):
    """Rows with more hits than a piece, a run that starts amid one, unhit rows; reruns are bit-equal."""
    monkeypatch.setattr(gpu, "PIECE", 4)
    values, ids, weights, g = case(9, 5, 7, width, dtype)
    ids = jnp.where(ids == 3, 4, ids).at[3:7].set(5)
    gradients = jax.jit(lambda *arrays: gpu.gradients(*arrays, target=TARGET, interpret=True))
    found, again = (gradients(values, ids, weights, g) for _ in range(2))
    _, dvalues, dw = expected64(values, ids, weights, g)
    np.testing.assert_array_equal(found[0], dvalues)
    np.testing.assert_array_equal(found[1], dw)
    assert not np.asarray(found[0])[3].any()
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


@SLOW
@pytest.mark.parametrize("hit", ["one row", "no row"])
def test_gradients_of_extreme_reads(hit, monkeypatch):
    monkeypatch.setattr(gpu, "PIECE", 4)
    values, ids, weights, g = case(6, 4, 5, 64)
    ids = jnp.full_like(ids, 2 if hit == "one row" else -1)
    dvalues, dw = gpu.gradients(values, ids, weights, g, target=TARGET, interpret=True)
    np.testing.assert_array_equal(dvalues, expected64(values, ids, weights, g)[1])
    np.testing.assert_array_equal(dw, expected64(values, ids, weights, g)[2])


def test_pieces_of_a_row_are_added_left_to_right():
    """A sum that only this order gives: pieces of 4096 hits, each summed from its own start."""
    hits, big = 2 * gpu.PIECE + 3, 2.0**24
    rows_of_hits = jnp.zeros(hits, jnp.int32)
    parts = jnp.zeros((hits // gpu.PIECE + 1, 1)).at[:, 0].set(jnp.asarray([np.nan, 1.0, -big]))
    found = gpu._add_further(jnp.asarray([[big], [7.0]]), parts, rows_of_hits)
    np.testing.assert_array_equal(found, [[(np.float32(big) + np.float32(1)) - np.float32(big)], [7.0]])


def test_wrong_ids_stay_in_the_table():
    values, ids, weights, g = case(3, 3, 5, 64)
    ids = ids.at[0, 0].set(2**31 - 1).at[2, 1].set(5)
    out, _ = gpu.read(values, ids, weights, None, "none", target=TARGET, interpret=True)
    y, dvalues, dw = expected64(values, ids, weights, g)
    np.testing.assert_array_equal(out, y)
    found = gpu.gradients(values, ids, weights, g, target=TARGET, interpret=True)
    np.testing.assert_array_equal(found[0], dvalues)
    np.testing.assert_array_equal(found[1], dw)


@SLOW
def test_replicas():
    values, ids, weights, g = case(3, 3, 5, 64)

    def dvalues(values, **options):
        return jax.grad(lambda v: jnp.sum(sparse_gather(v, ids, weights, **options) * g))(values)

    replicas = jnp.stack([values, values + 1])
    found = jax.jit(jax.vmap(lambda v: dvalues(v, **KERNEL)))(replicas)
    np.testing.assert_array_equal(found, jax.vmap(lambda v: dvalues(v, implementation="reference"))(replicas))


def test_rematerialised_replicas_trace_for_the_chip():
    """Interpretation has effects that jax.checkpoint refuses, the kernel itself has none."""
    values, ids, weights, g = case(3, 3, 5, 64)

    def loss(values):
        return jnp.sum(jax.checkpoint(lambda v: sparse_gather(v, ids, weights))(values) * g)

    with compiling_for("h100"):
        jaxpr = jax.make_jaxpr(jax.vmap(jax.grad(loss)))(jnp.stack([values, values]))
    assert "sparse_gather_gradients" in str(jaxpr)


def test_frozen_values_get_a_factored_gradient():
    values, ids, weights, g = case(4, 3, 5, 64)

    def loss(weights, probe, **options):
        return jnp.sum(sparse_gather(values, ids, weights, probe=probe, value_grad="rows", **options) * g)

    dw, dprobe = jax.grad(loss, argnums=(0, 1))(weights, jnp.zeros(g.shape), **KERNEL)
    np.testing.assert_array_equal(dw, expected64(values, ids, weights, g)[2])
    np.testing.assert_array_equal(dprobe, g)


@pytest.mark.parametrize(
    "target, shape, dtype, ids_shape, reason",
    [
        (TARGET, (8, 128), jnp.float16, (4, 4), "float16"),
        (TARGET, (8, 72), jnp.float32, (4, 4), "72 wide, expected a multiple of 64"),
        (TARGET, (8, 2048), jnp.float32, (4, 4), "2048 wide, more than the 1024"),
        (TARGET, (8, 128), jnp.float32, (0, 4), "empty axis"),
        (TARGET, (8, 128), jnp.float32, (2**20, 2**12), "32-bit"),
    ],
)
def test_refusals_name_their_reason(target, shape, dtype, ids_shape, reason):
    assert reason in gpu.obstacle(target, shape, dtype, ids_shape, "none")


def test_a_named_kernel_that_cannot_serve_raises():
    values, ids, weights, _ = case(3, 3, 5, 72)
    with pytest.raises(NotImplementedError, match="72 wide"):
        sparse_gather(values, ids, weights, **KERNEL)
