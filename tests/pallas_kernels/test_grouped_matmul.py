"""The grouped product against a dense loop per expert: forward, gradients, odd group sizes, reruns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.grouped_matmul import api, grouped_matmul

# (rows, sizes): none, one, all in one group, nothing a multiple of a tile, rows left over, a single group.
CASES = [
    (23, (0, 1, 17, 0, 5)),
    (23, (0, 0, 23)),
    (23, (4, 2, 7)),
    (5, (0, 0)),
    (37, (13, 24)),
    (8, (8,)),
]


def operands(rows, sizes, inputs=6, outputs=5, dtype=np.float32):
    rng = np.random.default_rng(len(sizes))
    x = jnp.asarray(rng.standard_normal((rows, inputs)), dtype)
    w = jnp.asarray(rng.standard_normal((len(sizes), inputs, outputs)), jnp.float32)
    return x, w, jnp.asarray(sizes, jnp.int32)


def by_loop(x, w, sizes):
    """float64: row by row of every expert."""
    y, start = np.zeros((x.shape[0], w.shape[2])), 0
    for g, size in enumerate(np.asarray(sizes)):
        y[start : start + size] = np.asarray(x, np.float64)[start : start + size] @ np.asarray(w, np.float64)[g]
        start += size
    return y


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("rows, sizes", CASES, ids=str)
def test_equals_a_loop_over_experts(rows, sizes, implementation):
    x, w, group_sizes = operands(rows, sizes)
    found = jax.jit(lambda *a: grouped_matmul(*a, implementation=implementation))(x, w, group_sizes)
    np.testing.assert_allclose(found, by_loop(x, w, group_sizes), rtol=1e-5, atol=1e-5)
    assert (np.asarray(found)[sum(sizes) :] == 0).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    "rows, sizes", [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])], ids=str
)
def test_gradients_equal_those_of_the_loop(rows, sizes, implementation):
    x, w, group_sizes = operands(rows, sizes)
    dy = jnp.asarray(np.random.default_rng(9).standard_normal((rows, w.shape[2])), jnp.float32)
    _, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, implementation=implementation), x, w)
    dx, dw = pull(dy)
    start = 0
    for g, size in enumerate(sizes):
        here = slice(start, start + size)
        np.testing.assert_allclose(dx[here], np.asarray(dy)[here] @ np.asarray(w)[g].T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw[g], np.asarray(x)[here].T @ np.asarray(dy)[here], rtol=1e-5, atol=1e-5)
        assert size or (np.asarray(dw[g]) == 0).all()
        start += size
    assert (np.asarray(dx)[start:] == 0).all()


def test_chunks_of_rows_change_nothing(monkeypatch):
    x, w, sizes = operands(23, (0, 1, 17, 0, 2))

    def value_and_gradients():
        return jax.value_and_grad(lambda x, w: (grouped_matmul(x, w, sizes) ** 2).sum(), argnums=(0, 1))(x, w)

    whole = value_and_gradients()
    monkeypatch.setattr(api, "_CHUNK_BYTES", 4 * 5 * 6 * 4)  # four rows at a time
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), value_and_gradients(), whole)


def test_copies_of_a_chunk_stay_below_their_limit(monkeypatch):
    """As many rows as 256 MiB of copies per group allow, one at least; other platforms need no chunks."""
    for rows, groups, inputs, outputs in (
        (10**6, 8, 64, 256),
        (10**6, 3, 300, 7),
        (5, 8, 64, 256),
        (9, 2**20, 64, 128),
    ):
        chunk, copy = api._chunk(rows, groups, inputs, outputs), 4 * groups * max(inputs, outputs)
        assert chunk == 1 or chunk * copy <= 2**28
        assert chunk == rows or (chunk + 1) * copy > 2**28
    monkeypatch.setattr(api.targets, "current_platform", lambda: "tpu")
    assert api._chunk(9, 2**20, 64, 128) == 9


def test_batched_over_replicas():
    x, w, sizes = operands(23, (4, 2, 7))
    xs, ws = jnp.stack([x, 2 * x]), jnp.stack([w, w + 1])

    def gradient(x, w):
        return jax.grad(lambda w: (grouped_matmul(x, w, sizes) ** 2).sum())(w)

    found = jax.vmap(gradient)(xs, ws)
    for i in range(2):
        np.testing.assert_allclose(found[i], gradient(xs[i], ws[i]), rtol=1e-4, atol=1e-4)


def test_bfloat16_rows_keep_float32_weight_gradients():
    x, w, sizes = operands(37, (13, 24), dtype=jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    dx, dw = pull(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), by_loop(x, w.astype(jnp.bfloat16), sizes), rtol=1e-2, atol=1e-2
    )
    rows = np.split(np.asarray(x, np.float64), [13])
    np.testing.assert_allclose(dw, [np.tile(part.sum(0)[:, None], 5) for part in rows], rtol=1e-5, atol=1e-5)


def test_reruns_are_bit_equal():
    x, w, sizes = operands(23, (0, 1, 17, 0, 5))
    step = jax.jit(jax.value_and_grad(lambda w: grouped_matmul(x, w, sizes).sum()))
    jax.tree.map(np.testing.assert_array_equal, step(w), step(w))


def test_what_cannot_be_served_is_refused(monkeypatch):
    x, w, sizes = operands(8, (3, 5))
    with pytest.raises(ValueError, match=r"do not fit, expected \[N, D\] and \[G, D, F\]"):
        grouped_matmul(x[:, :2], w, sizes)
    with pytest.raises(ValueError, match=r"do not fit, expected \[N, D\] and \[G, D, F\]"):
        grouped_matmul(x[None], w, sizes)
    with pytest.raises(ValueError, match=r"group_sizes is int32 \(1,\)"):
        grouped_matmul(x, w, sizes[:1])
    with pytest.raises(ValueError, match="w is bfloat16, expected float32"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="group_sizes is float32"):
        grouped_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match="x is int32"):
        grouped_matmul(x.astype(jnp.int32), w, sizes)
    with pytest.raises(NotImplementedError, match="no such kernel"):
        grouped_matmul(x, w, sizes, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="interpret=True"):
        grouped_matmul(x, w, sizes, interpret=True)
    monkeypatch.setenv("RECSCALE_CHECK", "1")
    grouped_matmul(x, w, sizes)
    grouped_matmul(x, w, jnp.asarray([0, 8], jnp.int32))
    with pytest.raises(ValueError, match="sum to 9"):
        grouped_matmul(x, w, sizes.at[0].set(4))
    with pytest.raises(Exception, match="none negative"):
        jax.block_until_ready(jax.jit(grouped_matmul)(x, w, sizes.at[0].set(-1)))
        jax.effects_barrier()
