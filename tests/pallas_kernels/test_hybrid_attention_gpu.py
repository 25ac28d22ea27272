"""The Hopper attention kernels, interpreted on a CPU: both passes against the reference, visited tiles, and refusals.

Interpretation builds a program for each warpgroup of each kernel at every call, which is most of the time here: so each
test puts many edges into the requests of one batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.hybrid_attention import gpu, gpu_tiles, hybrid_attention, reference
from recscale.pallas_kernels.targets import get_target

TARGET = get_target("h100")
SCALE = 0.17
UNSEEN = -1e29


def arrays(R, N, S, H, Hk, d, dv, lengths, bias=False, dtype=jnp.bfloat16, seed=0):
    """(q, k, v or None, lengths, bias or None) and the cotangents (do, dlse)."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def keys(*shape, **options):  # what lies beyond a length may hold anything
        inside = np.arange(S) < np.asarray(lengths)[:, None]
        return jnp.where(inside[(..., *(None,) * len(shape))], normal(R, S, *shape, **options), jnp.nan)

    v = None if dv is None else keys(Hk, dv)
    key_bias = keys(H, dtype=jnp.float32) if bias else None
    inputs = normal(R, N, H, d), keys(Hk, d), v, jnp.asarray(lengths, jnp.int32), key_bias
    return inputs, (normal(R, N, H, dv or d), normal(R, N, H, dtype=jnp.float32))


def run(inputs, positions, cotangents):
    """(o, lse) and (dq, dk, dv, dbias) of the kernels."""
    q, k, v, lengths, bias = inputs
    options = {"target": TARGET, "interpret": True}
    o, lse = gpu.forward(q, k, v, lengths, positions, bias, SCALE, **options)
    return (o, lse), gpu.backward(q, k, v, lengths, positions, bias, SCALE, o, lse, *cotangents, **options)


def check(inputs, positions, cotangents):
    """Runs the kernels and compares with the reference; returns what they gave."""
    q, k, v, lengths, bias = inputs
    (o, lse), gradients = found = run(inputs, positions, cotangents)
    expected_o, expected_lse = reference.attention(q, k, v, lengths, positions, bias, SCALE)
    unseen = np.asarray(expected_lse) < UNSEEN
    assert o.dtype == q.dtype and lse.dtype == jnp.float32
    assert (np.asarray(lse)[unseen] == np.float32(reference.INVISIBLE)).all()
    assert not np.asarray(o, np.float32)[unseen].any()
    close(o, expected_o)
    np.testing.assert_allclose(np.where(unseen, 0, lse), np.where(unseen, 0, expected_lse), rtol=0, atol=2e-5)
    expected = reference.gradient(q, k, v, lengths, positions, bias, SCALE, *cotangents)
    for x, gradient, want in zip((q, k, v, bias), gradients, expected, strict=True):
        assert (gradient is None) == (x is None)
        if x is not None:
            assert gradient.dtype == x.dtype and gradient.shape == x.shape
            close(gradient, want)
    assert not np.asarray(gradients[0], np.float32)[unseen].any()
    beyond = np.arange(k.shape[1])[None] >= np.asarray(lengths)[:, None]
    assert not any(np.asarray(g, np.float32)[beyond].any() for g in gradients[1:] if g is not None)
    return found


def close(found, expected):
    """At the operation's tolerance for bfloat16."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 * np.abs(expected).max())


def own_positions(R, N, S, seed=1):
    """int32 [R, N], growing; the last rows of a request see nothing."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.sort(rng.integers(0, S + 9, (R, N)), axis=1), jnp.int32)


def test_odd_sizes_lengths_positions_and_bias():
    """Several tiles of rows and keys, nothing a multiple of a tile, lengths 0, 1 and S, rows that see nothing."""
    lengths = (0, 137, 1, 75)
    inputs, cotangents = arrays(4, 70, 137, 1, 1, 20, 40, lengths, bias=True)
    check(inputs, own_positions(4, 70, 137), cotangents)


@pytest.mark.slow
def test_candidates_one_key_head_and_values_that_are_keys():
    """Through the operation: the rows of all candidates and heads share each tile of keys."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal(s), jnp.float16) for s in ((2, 3, 2, 2, 8), (2, 9, 1, 8)))
    lengths = jnp.asarray((9, 4), jnp.int32)

    def total(q, k, **options):
        o, lse = hybrid_attention(q, k, None, lengths, mode="causal", scale=0.3, **options)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(lse)), (o, lse)

    options = {"argnums": (0, 1), "has_aux": True}
    kernel = jax.value_and_grad(lambda *a: total(*a, implementation="pallas_gpu", interpret=True), **options)
    plain = jax.value_and_grad(lambda *a: total(*a, implementation="reference"), **options)
    for found, expected in zip(jax.tree.leaves(kernel(q, k)), jax.tree.leaves(plain(q, k)), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        close(found, expected)


@pytest.mark.slow
def test_reruns_are_bit_equal():
    inputs, cotangents = arrays(2, 70, 137, 2, 2, 20, 40, (137, 66), bias=True)
    positions = own_positions(2, 70, 137)
    first, again = run(inputs, positions, cotangents), run(inputs, positions, cotangents)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(R=2, N=70, S=200, H=2, Hk=2, d=64, dv=64, lengths=(200, 131)),
        dict(R=2, N=130, S=130, H=1, Hk=1, d=144, dv=160, lengths=(130, 65)),
        dict(R=1, N=70, S=70, H=1, Hk=1, d=144, dv=None, lengths=(70,)),
        dict(R=2, N=9, S=140, H=3, Hk=1, d=32, dv=48, lengths=(140, 128), bias=True),
        dict(R=2, N=9, S=140, H=1, Hk=1, d=16, dv=None, lengths=(140, 64), bias=True, dtype=jnp.float16),
    ],
    ids=["d64", "wide", "wide values are keys", "bias and one key head", "f16 bias values are keys"],
)
def test_causal_of_every_kind(sizes):
    inputs, cotangents = arrays(**sizes)
    check(inputs, jnp.arange(sizes["N"], dtype=jnp.int32)[None], cotangents)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_keys_are_the_only_arrays_of_their_size(shared):
    """Built for the chip, at the widest heads: nothing is copied or summed outside the kernels, with v = k neither."""
    R, N, S, width = 2, 128, 256, 256

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def gradients(q, k, v, lengths, positions, o, lse, do, dlse):
        return gpu.backward(q, k, v, lengths, positions, None, SCALE, o, lse, do, dlse, target=TARGET)

    q, k, statistic = array(R, N, 1, width), array(R, S, 1, width), array(R, N, 1, dtype=jnp.float32)
    scalars = array(R, dtype=jnp.int32), array(1, N, dtype=jnp.int32)
    program = jax.make_jaxpr(gradients)(q, k, None if shared else k, *scalars, q, statistic, q, statistic)
    made = [out.aval for equation in program.eqns for out in equation.outvars if out.aval.size >= R * S * width]
    assert [(x.shape, x.dtype) for x in made] == [(k.shape, k.dtype)] * (1 if shared else 2)


@pytest.mark.parametrize("rows, keys", [(4, 3), (8, 16)])
def test_tiles_are_visited_iff_needed(rows, keys):
    """Every visible pair is in a visited tile, no visited tile (of growing positions) is empty, clear ones are full."""
    N, S = 13, 21
    lengths = jnp.asarray((0, 1, 5, 16, 20, 21), jnp.int32)
    R = lengths.shape[0]
    causal = jnp.arange(N, dtype=jnp.int32)[None]
    for growing, positions in (
        (True, causal),
        (True, own_positions(R, N, S)),
        (False, jnp.tile(jnp.arange(4, dtype=jnp.int32), 4)[None, :N]),
    ):
        seen = np.asarray(reference.visible(jnp.broadcast_to(positions, (R, N)), lengths, S))
        row_tiles, key_tiles = -(-N // rows), -(-S // keys)
        by_rows = np.asarray(gpu_tiles.key_ranges(positions, lengths, rows, keys))
        by_keys = np.asarray(gpu_tiles.row_ranges(positions, lengths, rows, keys, S))
        assert by_rows.shape == (R, row_tiles, 4) and by_keys.shape == (R, key_tiles, 2)
        visits = 0
        for r, i, j in np.ndindex(R, row_tiles, key_tiles):
            pairs = seen[r, i * rows : (i + 1) * rows, j * keys : (j + 1) * keys]
            begin, clear_begin, clear_end, end = by_rows[r, i]
            clear_rows, end_rows = by_keys[r, j]
            whole = pairs.all() and pairs.shape[1] == keys
            visits += begin <= j < end
            assert (begin <= j < end) or not pairs.any()
            assert (i < end_rows) or not pairs.any()
            if growing:
                assert (begin <= j < end) == pairs.any() and (i >= end_rows or pairs.any())
            assert whole or not clear_begin <= j < clear_end
            assert (whole and pairs.shape[0] == rows) or i >= clear_rows
        assert visits == int(gpu_tiles.visited_tiles(positions, lengths, rows, keys).sum())


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(dtype=jnp.float32), "TF32"),
        (dict(dtype=jnp.int8), "int8"),
        (dict(q_shape=(2, 9, 1, 272)), "272"),
        (dict(v_width=320), "320"),
        (dict(k_shape=(2, 0, 1, 64)), "nothing"),
    ],
)
def test_refuses_what_it_cannot_serve(changed, message):
    request = dict(target=TARGET, q_shape=(2, 9, 4, 64), k_shape=(2, 30, 1, 64), v_width=64, dtype=jnp.bfloat16)
    assert gpu.obstacle(**request) is None
    assert message in gpu.obstacle(**(request | changed))
