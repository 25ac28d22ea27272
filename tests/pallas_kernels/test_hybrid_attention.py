"""The attention operation: its rule, gradients of every path against each other, merging, chunks, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.dispatch import recording
from recscale.pallas_kernels.hybrid_attention import hybrid_attention, merge_attention, reference, xla

R, C, Q, S, H, d, dv = 4, 3, 5, 9, 2, 4, 3
LENGTHS = (0, 1, 6, 9)


def arrays(candidates=None, key_heads=H, values=True, bias=True, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    lead = (R, Q) if candidates is None else (R, candidates, Q)
    q, k = normal(*lead, H, d), normal(R, S, key_heads, d)
    v = normal(R, S, key_heads, dv) if values else None
    return q, k, v, normal(R, S, H) if bias else None, jnp.asarray(LENGTHS, jnp.int32)


CASES = {
    "full": (dict(), dict(mode="full")),
    "causal": (dict(), dict(mode="causal")),
    "positions": (dict(), dict(mode="positions", q_pos=jnp.asarray([0, 0, 2, 5, 8], jnp.int32))),
    "own positions": (dict(), dict(mode="positions", q_pos=jnp.arange(R * Q, dtype=jnp.int32).reshape(R, Q) // 3)),
    "candidates": (dict(candidates=C), dict(mode="full")),
    "causal candidates": (dict(candidates=C, key_heads=1), dict(mode="causal")),
    "one key head": (dict(key_heads=1, bias=False), dict(mode="full")),
    "values are keys": (dict(values=False), dict(mode="causal")),
    "one head of both": (dict(key_heads=1, values=False, candidates=C), dict(mode="full")),
}


def by_hand(q, k, v, bias, lengths, mode, q_pos=None, scale=0.7):
    """One row at a time, in float64."""
    flat = np.asarray(q, np.float64).reshape(R, -1, Q, H, d)
    k = np.broadcast_to(np.asarray(k, np.float64), (R, S, H, d))
    v = k if v is None else np.broadcast_to(np.asarray(v, np.float64), (R, S, H, v.shape[-1]))
    o, lse = np.zeros((*flat.shape[:-1], v.shape[-1])), np.full(flat.shape[:-1], -1e30)
    for r, c, i, h in np.ndindex(*flat.shape[:-1]):
        given = None if q_pos is None else np.broadcast_to(np.asarray(q_pos), (R, Q))
        first = {"full": 0, "causal": i}.get(mode, None if given is None else given[r, i])
        seen = slice(first, int(lengths[r]))
        scores = scale * k[r, seen, h] @ flat[r, c, i, h]
        scores = scores + (0 if bias is None else np.asarray(bias, np.float64)[r, seen, h])
        if scores.size:
            weights = np.exp(scores - scores.max())
            o[r, c, i, h] = weights @ v[r, seen, h] / weights.sum()
            lse[r, c, i, h] = scores.max() + np.log(weights.sum())
    return o.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])


@pytest.fixture(params=["reference", "xla", "chunks"])
def path(request, monkeypatch):
    """The implementation's name; "chunks" is XLA with room for two query rows at a time."""
    if request.param == "chunks":
        monkeypatch.setattr(xla, "_CHUNK_BYTES", 4 * R * H * S * 2)
        assert xla.rows_per_chunk(R, Q, H, S) == 2
    return "xla" if request.param == "chunks" else request.param


def scalar(q, k, v, bias, lengths, seed=3, **options):
    """A number that depends on every output, lse included."""
    o, lse = hybrid_attention(q, k, v, lengths, scale=0.7, key_bias=bias, **options)
    rng = np.random.default_rng(seed)
    total = jnp.sum(o * rng.standard_normal(o.shape, np.float32))
    return total + jnp.sum(jnp.where(lse > -1e29, lse, 0.0) * rng.standard_normal(lse.shape, np.float32)), (o, lse)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case, path):
    """The rule row by row in float64, and the gradients written out."""
    made, options = CASES[case]
    q, k, v, bias, lengths = arrays(**made)
    graded = jax.grad(scalar, argnums=(0, 1, 2, 3), has_aux=True)
    found, (o, lse) = jax.jit(lambda *a: graded(*a, implementation=path, **options))(q, k, v, bias, lengths)
    expected_o, expected_lse = by_hand(q, k, v, bias, lengths, **options)
    np.testing.assert_allclose(o, expected_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert (np.asarray(o)[0] == 0).all() and (np.asarray(lse)[0] == np.float32(-1e30)).all()  # request 0 has no event
    for name, one, other in zip("qkvb", found, written_gradient(q, k, v, bias, lengths, o, **options), strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_allclose(one, other.reshape(one.shape), rtol=1e-4, atol=1e-5, err_msg=name)
            assert (np.asarray(one)[0] == 0).all() and np.isfinite(one).all(), name


def written_gradient(q, k, v, bias, lengths, o, mode, q_pos=0):
    """`reference.gradient` for the cotangents of `scalar`."""
    rng = np.random.default_rng(3)
    do, dlse = rng.standard_normal(o.shape, np.float32), rng.standard_normal(q.shape[:-1], np.float32)
    first = {"full": jnp.zeros((1, Q), jnp.int32), "causal": jnp.arange(Q, dtype=jnp.int32)[None]}
    rows = jnp.tile(first.get(mode, jnp.atleast_2d(q_pos)), (1, q[..., 0, 0].size // (R * Q)))
    flat = [x.reshape(R, -1, *x.shape[-n:]) for x, n in ((q, 2), (do, 2), (dlse, 1))]
    return reference.gradient(flat[0], k, v, lengths, rows, bias, 0.7, *map(jnp.asarray, flat[1:]))


def test_invisible_keys_have_no_gradient_and_may_hold_anything(path):
    q, k, v, bias, lengths = arrays()
    graded = jax.jit(
        jax.grad(lambda *a: scalar(*a, lengths, mode="causal", implementation=path)[0], argnums=(0, 1, 2, 3))
    )
    beyond = np.arange(S)[None] >= np.asarray(LENGTHS)[:, None]
    for leaf in graded(q, k, v, bias)[1:]:
        assert (np.asarray(leaf)[beyond] == 0).all()
    junk = [jnp.where(beyond.reshape(R, S, *(1,) * (x.ndim - 2)), 1e4, x) for x in (k, v, bias)]
    for one, other in zip(graded(q, *junk), graded(q, k, v, bias), strict=True):
        np.testing.assert_array_equal(one, other)


def test_merging_two_parts_is_one_call(path):
    q, k, v, bias, lengths = arrays(candidates=C)
    cut = 4
    whole = jax.jit(jax.value_and_grad(lambda *a: scalar(*a, lengths, implementation=path)[0], argnums=(0, 1, 2, 3)))

    def parts(q, k, v, bias):
        pieces = []
        for part, length in (
            (slice(0, cut), jnp.minimum(lengths, cut)),
            (slice(cut, S), jnp.maximum(lengths - cut, 0)),
        ):
            keys, values, own = k[:, part], v[:, part], bias[:, part]
            pieces.append(hybrid_attention(q, keys, values, length, scale=0.7, key_bias=own, implementation=path))
        o, lse = merge_attention(pieces)
        rng = np.random.default_rng(3)
        total = jnp.sum(o * rng.standard_normal(o.shape, np.float32))
        return total + jnp.sum(jnp.where(lse > -1e29, lse, 0.0) * rng.standard_normal(lse.shape, np.float32))

    value, grads = jax.jit(jax.value_and_grad(parts, argnums=(0, 1, 2, 3)))(q, k, v, bias)
    expected, expected_grads = whole(q, k, v, bias)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["causal", "one head of both"])
def test_low_precision_stays_close(case, path):
    made, options = CASES[case]
    q, k, v, bias, lengths = arrays(**made)
    low = [None if x is None else x.astype(jnp.bfloat16) for x in (q, k, v)]
    graded = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)
    run = jax.jit(lambda *a: graded(*a, implementation=path, **options))
    (_, (o, lse)), grads = run(*low, bias, lengths)
    (_, (full, _)), exact = run(q, k, v, bias, lengths)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(o.astype(jnp.float32), full, atol=2e-2 * float(jnp.abs(full).max()))
    for one, other in zip(grads, exact, strict=True):
        if one is not None:
            assert one.dtype == jnp.bfloat16
            np.testing.assert_allclose(one.astype(jnp.float32), other, atol=4e-2 * float(jnp.abs(other).max()))


def test_under_vmap_and_rematerialisation(path):
    q, k, v, bias, lengths = arrays()

    def total(q, k):
        return scalar(q, k, v, bias, lengths, mode="causal", implementation=path)[0]

    both = jnp.stack([q, 2 * q]), jnp.stack([k, k - 1])
    grads = jax.jit(jax.vmap(jax.grad(jax.checkpoint(total), argnums=(0, 1))))(*both)
    single = jax.jit(jax.grad(total, argnums=(0, 1)))
    for i in range(2):
        for one, other in zip(grads, single(both[0][i], both[1][i]), strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-4, atol=1e-5)


def test_rows_of_a_chunk():
    """Chunks of nearly equal numbers of rows, one at least, whose float32 scores [R, H, n, S] take 32 MiB or less."""
    for requests, rows, heads, keys in ((8, 512, 4, 4096), (8, 500, 4, 4096), (2, 10, 1, 10), (2**10, 5, 64, 2**16)):
        found = xla.rows_per_chunk(requests, rows, heads, keys)
        most = 2**25 // (4 * requests * heads * keys)
        assert found == 1 or found <= most
        chunks = -(-rows // found)
        assert chunks == -(-rows // max(most, 1)) and (found - 1) * chunks < rows
    assert xla.rows_per_chunk(8, 512, 4, 4096) == 64


def test_chunks_bound_the_memory():
    """64 rows against 4,096 keys: one chunk's scores, not all of them, are ever held."""
    shapes = [(8, 512, 4, 16), (8, 4096, 4, 16), (8, 4096, 4, 16)]
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)

    def total(q, k, v, lengths):
        return jnp.sum(hybrid_attention(q, k, v, lengths, mode="causal", scale=0.25, implementation="xla")[0])

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v, lengths).compile()
    scores = 4 * 8 * 4 * 512 * 4096
    assert compiled.memory_analysis().temp_size_in_bytes < scores < 8 * xla._CHUNK_BYTES + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mode="casual"), "mode is 'casual', expected one of full, causal, positions"),
        (dict(mode="positions"), "q_pos goes with mode='positions'"),
        (dict(q_pos=jnp.zeros(Q, jnp.int32)), "q_pos goes with mode='positions'"),
        (dict(key_bias=jnp.zeros((R, S, 1))), r"key_bias has shape \(4, 9, 1\), expected \(4, 9, 2\)"),
        (dict(interpret=True), "interpret=True needs a Pallas implementation"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    q, k, v, _, lengths = arrays()
    with pytest.raises(ValueError, match=message):
        hybrid_attention(q, k, v, lengths, scale=1.0, **changes)


def test_lengths_and_positions_are_errors_where_values_are_checked(monkeypatch):
    monkeypatch.setenv("RECSCALE_CHECK", "1")
    q, k, v, _, lengths = arrays(candidates=C)
    hybrid_attention(q, k, v, lengths, scale=1.0, mode="causal")  # positions start again with every candidate
    hybrid_attention(q, k, v, lengths, scale=1.0)  # equal positions do not fall
    with pytest.raises(ValueError, match=r"lengths \[0, 1, 6, 10\], expected 0 to 9"):
        hybrid_attention(q, k, v, lengths.at[3].set(S + 1), scale=1.0)
    with pytest.raises(ValueError, match="q_pos falls"):
        hybrid_attention(q, k, v, lengths, scale=1.0, mode="positions", q_pos=jnp.asarray([0, 2, 1, 3, 4], jnp.int32))
    with pytest.raises(Exception, match="expected 0 to 9"):
        run = jax.jit(lambda lengths: hybrid_attention(q, k, v, lengths, scale=1.0))
        jax.block_until_ready(run(lengths.at[0].set(-1)))
        jax.effects_barrier()


def test_few_keys_stay_with_xla():
    """S <= d: no more scores a row than the row has numbers."""
    q, lengths = jnp.ones((2, 4, 1, 8)), jnp.asarray([8, 9])
    for keys, reason in ((8, "few keys"), (9, "")):
        served: dict = {}
        with recording(served):
            k = jax.ShapeDtypeStruct((2, keys, 1, 8), jnp.float32)
            jax.eval_shape(lambda k: hybrid_attention(q, k, k, lengths, scale=1.0), k)
        assert served == {"hybrid_attention": {"xla": reason}}


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, _, lengths = arrays()
    with pytest.raises(ValueError, match="k needs 1 or 2"):
        hybrid_attention(q, jnp.zeros((R, S, 3, d)), v, lengths, scale=1.0)
    with pytest.raises(ValueError, match="v has shape"):
        hybrid_attention(q, k, v[:, 1:], lengths, scale=1.0)
    with pytest.raises(ValueError, match="expected \\[R, "):
        hybrid_attention(q[0], k, v, lengths, scale=1.0)
    with pytest.raises(ValueError, match="expected \\[R, "):
        hybrid_attention(q, k[..., 0], v, lengths, scale=1.0)
    with pytest.raises(ValueError, match="lengths has shape"):
        hybrid_attention(q, k, v, lengths[1:], scale=1.0)
    with pytest.raises(ValueError, match="q_pos has shape"):
        hybrid_attention(q, k, v, lengths, scale=1.0, mode="positions", q_pos=jnp.zeros(Q - 1, jnp.int32))
    with pytest.raises(NotImplementedError, match="q, k and v are bfloat16, float32; it needs one type"):
        hybrid_attention(q, k, v.astype(jnp.bfloat16), lengths, scale=1.0, implementation="pallas_tpu", interpret=True)
    with pytest.raises(NotImplementedError, match="no such kernel"):
        hybrid_attention(q, k, v, lengths, scale=1.0, implementation="pallas_tpu_sc")
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        hybrid_attention(q, k, v, lengths, scale=1.0, implementation="pallas_tpu")
