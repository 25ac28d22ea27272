"""NaN where nothing may be read reaches nothing, and NaN scores give one order, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.hybrid_attention import hybrid_attention
from recscale.pallas_kernels.product_key_topk import product_key_topk
from recscale.pallas_kernels.sparse_gather import sparse_dot, sparse_gather, tpu_sc

ANY = pytest.mark.parametrize("name", ["reference", "xla", "pallas_tpu", "pallas_gpu"])


def options(name):
    return {"implementation": name, **({"interpret": True} if name.startswith("pallas") else {})}


@ANY
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_absent_hits_read_nothing(name, dtype):
    """Row 0, where an absent hit's place is, holds NaN; no present hit names it."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal((8, 64)), dtype).at[0].set(jnp.nan)
    ids = jnp.asarray(rng.integers(1, 8, (6, 4)), jnp.int32).at[0].set(-1).at[1, 2].set(-1)
    weights = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)

    @jax.jit
    def everything(values, weights):
        out, pull = jax.vjp(lambda v, w: sparse_gather(v, ids, w, **options(name)), values, weights)
        return out, *pull(out), sparse_dot(values, ids, out, **options(name))

    out, dvalues, dweights, products = everything(values, weights)
    for found in (out, dvalues, dweights, products):
        assert np.isfinite(np.asarray(found, np.float32)).all()
    assert not np.asarray(out, np.float32)[0].any() and not np.asarray(dvalues, np.float32)[0].any()
    assert not np.asarray(dweights)[0].any() and float(dweights[1, 2]) == float(products[1, 2]) == 0


def test_subcores_add_nothing_of_absent_hits():
    words = [jnp.full(8, jnp.nan), jnp.arange(8.0)]
    np.testing.assert_array_equal(tpu_sc.weighted_sum(words, [jnp.float32(0), jnp.float32(2)])[0], 2 * words[1])


@ANY
def test_nothing_beyond_a_length_reaches_anything(name):
    """k, v and the bias hold NaN there, in a whole tile and in a part of one; their gradients are 0."""
    rng = np.random.default_rng(0)
    R, N, S, H, d = 1, 4, 160, 1, 16
    lengths = jnp.asarray([37], jnp.int32)
    beyond = (jnp.arange(S) >= lengths[:, None])[..., None, None]
    q, k, v = (jnp.asarray(rng.standard_normal((R, n, H, d)), jnp.bfloat16) for n in (N, S, S))
    bias = jnp.asarray(rng.standard_normal((R, S, H)), jnp.float32)

    @jax.jit
    def everything(q, k, v, bias):
        attend = functools.partial(hybrid_attention, lengths=lengths, scale=0.3, **options(name))
        (o, lse), pull = jax.vjp(lambda q, k, v, b: attend(q, k, v, key_bias=b), q, k, v, bias)
        return (o, lse), pull((o, lse))

    expected = everything(q, *(jnp.where(beyond, 0, x) for x in (k, v)), jnp.where(beyond[..., 0], 0, bias))
    found = everything(q, *(jnp.where(beyond, jnp.nan, x) for x in (k, v)), jnp.where(beyond[..., 0], jnp.nan, bias))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    for gradient in found[1][1:3]:
        assert not np.asarray(jnp.where(beyond, gradient, 0), np.float32).any()


@functools.cache
def _chosen(name):
    rng = np.random.default_rng(0)
    q = jnp.asarray(np.round(2 * rng.standard_normal((5, 1, 2, 8))) / 2, jnp.float32)
    keys = jnp.asarray(np.round(2 * rng.standard_normal((1, 2, 300, 8))) / 2, jnp.float32)
    keys = keys.at[0, 1, 270, 3].set(jnp.nan).at[0, 1, 7].set(jnp.nan)  # in the first chunk of 256 and behind it
    q = q.at[3, 0, 0, 1].set(jnp.nan).at[4].set(jnp.nan)  # a read whose rows are NaN, one of which all is
    find = jax.jit(lambda q, keys: product_key_topk(q, keys, 4, **options(name)))
    return jax.device_get(find(q, keys))


@ANY
def test_broken_scores_come_first_and_in_one_order(name):
    scores, ids = _chosen(name)
    _, expected = _chosen("reference")
    np.testing.assert_array_equal(ids, expected)
    assert np.isnan(scores).all()
    assert set((ids[:3] % 300).ravel()) == {7, 270}
    np.testing.assert_array_equal(ids[4, 0], [0, 1, 2, 3])
