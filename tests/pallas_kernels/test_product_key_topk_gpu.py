"""The Hopper kernel of the two-axis search, interpreted without layouts: the reference's ids and scores, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.cases import cases
from recscale.pallas_kernels.product_key_topk import pair_ranks, product_key_topk
from recscale.pallas_kernels.targets import compiling_for

find = jax.jit(product_key_topk, static_argnums=2, static_argnames=("scale", "implementation", "interpret"))
KERNEL = dict(implementation="pallas_gpu", interpret=True)


def equal(q, keys, topk, **options):
    """Asserts the kernel's result is the reference's, and returns it."""
    q, keys = jnp.asarray(q), jnp.asarray(keys)
    expected = find(q, keys, topk, implementation="reference", **options)
    found = find(q, keys, topk, **options, **KERNEL)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        np.testing.assert_array_equal(f, e)
    return found


def whole(shape, seed=0, most=3):
    """Small whole numbers: sums are exact, ties are many, bfloat16 holds them."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


def given_scores(scores):
    """q and keys whose products are exactly `scores` [H,2,n], for one read."""
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.ones((1, scores.shape[0], 2, 1)), scores[..., None]


def test_bfloat16_equals_the_reference():
    q, keys = whole((5, 1, 2, 3)), whole((1, 2, 45, 3), 1)
    equal(jnp.asarray(q, jnp.bfloat16), jnp.asarray(keys, jnp.bfloat16), 3, scale=0.5)


def test_float32_in_pieces_and_chunks():
    scores = np.random.default_rng(0).standard_normal((1, 2, 300)).astype(np.float32)
    equal(*given_scores(scores), 2)  # three bfloat16 pieces give back every float32


@pytest.mark.slow
@pytest.mark.parametrize("n, topk", [(3, 3), (7, 1), (32, 32), (100, 8), (256, 32), (1024, 16), (700, 32)])
def test_equals_the_reference_at_other_sizes(n, topk):
    q, keys = whole((70, 2, 2, 70), n), whole((2, 2, n, 70), n + 1)
    equal(jnp.asarray(q, jnp.bfloat16), jnp.asarray(keys, jnp.bfloat16), topk)
    equal(*given_scores(np.random.default_rng(n).standard_normal((1, 2, n))), topk)


@pytest.mark.slow
def test_mixed_inputs_and_heads():
    q, keys = whole((66, 2, 2, 4), most=1000), whole((2, 2, 20, 4), 1, most=40)
    scores, ids = equal(q, jnp.asarray(keys, jnp.bfloat16), 6)  # two tiles of reads; queries beyond bfloat16
    equal(q[:9], keys[0], 6)  # keys shared by the heads
    alone = find(jnp.asarray(q[:9, 1:]), jnp.asarray(keys[1:]), 6, **KERNEL)
    np.testing.assert_array_equal(alone[1][:, 0], ids[:9, 1])
    np.testing.assert_array_equal(alone[0][:, 0], scores[:9, 1])


def test_masked_keys_and_ties():
    few = np.full((1, 2, 9), -np.inf, np.float32)
    few[0, :, 4] = 1.0
    _, ids = equal(*given_scores(few), 9)
    assert int(ids[0, 0, 0]) == 4 * 9 + 4 and len(set(np.asarray(ids)[0, 0])) == 9


@pytest.mark.slow
def test_constant_scores():
    _, ids = equal(*given_scores(np.zeros((1, 2, 10))), 7)
    i, j = pair_ranks(7)
    np.testing.assert_array_equal(ids[0, 0], (i * 10 + j)[:7])


@pytest.mark.slow
def test_nan_keeps_ids_in_range():
    scores = whole((2, 2, 9))
    scores[0, 1, 2] = scores[1] = np.nan
    _, ids = find(*given_scores(scores), 3, **KERNEL)
    assert (np.asarray(ids) >= 0).all() and (np.asarray(ids) < 81).all()


@pytest.mark.slow
def test_gradient_replicas_and_reruns():
    q, keys = jnp.asarray(whole((3, 1, 2, 4))), jnp.asarray(whole((1, 2, 7, 4), 1))

    def loss(q, keys, options):
        return jnp.sum(product_key_topk(q, keys, 2, scale=0.5, **options)[0] ** 2)

    replicas = jnp.stack([keys, 2 * keys[:, ::-1]])

    def step(options):
        each = jax.value_and_grad(lambda q, k: loss(q, k, options), (0, 1))
        return jax.jit(jax.vmap(each, in_axes=(None, 0)))

    kernel = step(KERNEL)
    found = kernel(q, replicas)
    jax.tree.map(np.testing.assert_array_equal, found, step(dict(implementation="xla"))(q, replicas))
    jax.tree.map(np.testing.assert_array_equal, found, kernel(q, replicas))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases("product_key_topk") if c.group != "bench"], ids=lambda c: c.name)
def test_named_shapes(case):
    inputs = case.inputs(jax.random.key(0))
    found = jax.jit(lambda *a: case.call(*a, **KERNEL))(*inputs)
    expected = jax.jit(lambda *a: case.call(*a, implementation="reference"))(*inputs)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        f, e = (np.asarray(x, np.float64) for x in (f, e))
        np.testing.assert_allclose(f, e, rtol=0, atol=case.rtol * np.abs(e).max())


def test_what_the_kernel_refuses():
    q, keys = jnp.ones((3, 1, 2, 4)), jnp.ones((1, 2, 300, 4))
    with compiling_for("h100"):
        text = str(jax.make_jaxpr(lambda q, k: product_key_topk(q, k, 4))(q, keys))
        assert "top_k[" not in text
    with pytest.raises(NotImplementedError, match="Hopper"):
        product_key_topk(q, keys, 4, implementation="pallas_gpu")
    for message, *arguments in (
        ("topk is 33", q, keys, 33),
        ("float16", q.astype(jnp.float16), keys, 4),
        ("bytes of shared memory", jnp.ones((3, 1, 2, 2048)), jnp.ones((1, 2, 300, 2048)), 4),
    ):
        with pytest.raises(NotImplementedError, match=message):
            product_key_topk(*arguments, **KERNEL)
