"""The Hopper kernels of the grouped product, interpreted: experts by loop, odd sizes, gradients, reruns, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels import targets
from recscale.pallas_kernels.grouped_matmul import gpu, grouped_matmul

KERNEL = dict(implementation="pallas_gpu", interpret=True)

# Interpretation compiles the body again for every block of a kernel, seconds each: most of these tests are slow.
slow = pytest.mark.slow

# (rows, sizes): empty groups, groups sharing a tile, all in one group, rows left over, a group over two tiles.
CASES = [
    (26, (1, 17, 0, 5)),
    (150, (0, 150)),
    (140, (100, 37, 0)),
    (5, (0,)),
]


def operands(rows, sizes, inputs=24, outputs=40):
    rng = np.random.default_rng(len(sizes))
    x = jnp.asarray(rng.standard_normal((rows, inputs)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((len(sizes), inputs, outputs)), jnp.bfloat16)
    return x, w, jnp.asarray(sizes, jnp.int32)


def by_loop(x, w, sizes, dy):
    """float64 y, dx, dw, expert by expert."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw, start = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w), 0
    for g, size in enumerate(sizes):
        here = slice(start, start + size)
        y[here], dx[here], dw[g] = x[here] @ w[g], dy[here] @ w[g].T, x[here].T @ dy[here]
        start += size
    return y, dx, dw


def close(found, expected):
    """bfloat16 results of float32 sums: half a unit of the last of 8 bits."""
    found = np.asarray(found, np.float64)
    assert np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()


@slow
@pytest.mark.parametrize("rows, sizes", CASES, ids=str)
def test_equals_a_loop_over_experts(rows, sizes):
    x, w, group_sizes = operands(rows, sizes)
    dy = jnp.asarray(np.random.default_rng(9).standard_normal((rows, w.shape[2])), jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, **KERNEL), x, w)
    dx, dw = pull(dy)
    for found, expected in zip((y, dx, dw), by_loop(x, w, sizes, dy), strict=True):
        close(found, expected)
    used = sum(sizes)
    assert (np.asarray(y, np.float32)[used:] == 0).all() and (np.asarray(dx, np.float32)[used:] == 0).all()
    for g, size in enumerate(sizes):
        assert size or (np.asarray(dw[g], np.float32) == 0).all()


@slow
def test_rows_of_no_group_and_of_other_groups_do_not_leak():
    """NaN in one group and beyond the last one stays there, in values and gradients."""
    sizes = (10, 20, 7)
    x, w, group_sizes = operands(45, sizes)
    x = x.at[10:30].set(jnp.nan).at[37:].set(jnp.nan)
    y, pull = jax.vjp(lambda w: grouped_matmul(x, w, group_sizes, **KERNEL), w)
    (dw,) = pull(jnp.ones_like(y).at[10:30].set(jnp.nan))
    finite = np.isfinite(np.asarray(y, np.float32)).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(~finite), np.arange(10, 30))
    assert np.isfinite(np.asarray(dw[0], np.float32)).all() and np.isfinite(np.asarray(dw[2], np.float32)).all()


@slow
def test_sums_of_many_tiles_are_float32_and_reruns_bit_equal():
    """Several tiles of inputs and of rows through a stream that is shorter: weight gradients of float32 parameters."""
    x, w, group_sizes = operands(330, (321, 9), inputs=200, outputs=72)
    step = jax.jit(jax.grad(lambda w: grouped_matmul(x, w, group_sizes, **KERNEL).astype(jnp.float32).sum()))
    dw = step(w.astype(jnp.float32))
    expected = by_loop(x, w, (321, 9), np.ones((330, 72)))[2]
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(step(w.astype(jnp.float32)), dw)


@slow
def test_batched_over_replicas():
    x, w, group_sizes = operands(23, (4, 2, 7))
    xs = jnp.stack([x, 2 * x])
    found = jax.vmap(lambda x: grouped_matmul(x, w, group_sizes, **KERNEL))(xs)
    for i in range(2):
        np.testing.assert_array_equal(found[i], grouped_matmul(xs[i], w, group_sizes, **KERNEL))


def test_visits_cover_every_row_once():
    """Every row of a group lies in exactly one visit of its tile; bad sizes stay within the rows."""
    rng = np.random.default_rng(0)
    for sizes in [(0, 1, 17, 0, 5), (300, 0, 1), (128, 128), (0, 0), (-3, 500), tuple(rng.integers(0, 40, 30))]:
        rows = 400
        tiles = -(-rows // 128)
        groups, starts, ends, first, last = map(np.asarray, gpu._visits(jnp.asarray(sizes, jnp.int32), rows, tiles))
        owner = np.full(tiles * 128, -1)
        for tile in range(tiles):
            for visit in range(first[tile], last[tile]):
                row = np.arange(tile * 128, tile * 128 + 128)
                inside = row[(row >= starts[visit]) & (row < ends[visit])]
                assert inside.size and (owner[inside] == -1).all()
                owner[inside] = groups[visit]
        expected = np.repeat(np.arange(len(sizes)), np.maximum(sizes, 0))[:rows]
        np.testing.assert_array_equal(owner[: expected.size], expected)
        assert (owner[expected.size :] == -1).all()


def test_blocks_leave_few_processors_idle():
    h100 = targets.get_target("h100")
    assert gpu._blocks("multiply", h100, 512, 768, 768, 2) == (256, 3)
    assert gpu._blocks("contract", h100, 8 * 6, 64, 768, 2)[0] == 192


def test_what_cannot_be_served_is_refused():
    x, w, sizes = operands(8, (3, 5))
    with pytest.raises(NotImplementedError, match="x is float32, expected bfloat16"):
        grouped_matmul(x.astype(jnp.float32), w.astype(jnp.float32), sizes, **KERNEL)
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        grouped_matmul(x, w, sizes, implementation="pallas_gpu")
