"""The TensorCore kernel of the two-axis search, interpreted: ids and scores of the reference, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.cases import cases
from recscale.pallas_kernels.product_key_topk import pair_ranks, product_key_topk
from recscale.pallas_kernels.product_key_topk.reference import pair_count
from recscale.pallas_kernels.targets import compiling_for

find = jax.jit(product_key_topk, static_argnums=2, static_argnames=("scale", "implementation", "interpret"))
KERNEL = dict(implementation="pallas_tpu", interpret=True)


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
    """Small whole numbers: sums are exact, ties are many."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


def given_scores(scores):
    """q and keys whose products are exactly `scores` [H,2,n], for one read."""
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.ones((1, scores.shape[0], 2, 1)), scores[..., None]


@pytest.mark.parametrize("n, topk", [(3, 3), (7, 1), (45, 7), (100, 8)])
def test_equals_the_reference(n, topk):
    rng = np.random.default_rng(n)
    equal(whole((33, 1, 2, 5), n), whole((1, 2, n, 5), n + 1), topk, scale=0.5)
    plain = rng.standard_normal((1, 2, n)).astype(np.float32)  # one product per score: exact
    equal(*given_scores(plain), topk)
    signed = np.round(plain)
    signed[0, 0, :3] = -0.0, -0.0, 0.0
    equal(*given_scores(signed), topk)


@pytest.mark.slow
@pytest.mark.parametrize("n, topk", [(7, 2), (32, 32), (128, 128), (256, 32), (1024, 16), (1100, 40)])
def test_equals_the_reference_at_larger_sizes(n, topk):
    equal(whole((130, 2, 2, 12), n), whole((2, 2, n, 12), n + 1), topk)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), pytest.param(("float32", "bfloat16"), marks=pytest.mark.slow)]
)
def test_low_precision_inputs(dtypes):
    q, keys = whole((300, 1, 2, 8), most=40).astype(dtypes[0]), whole((1, 2, 20, 8), 1, most=40).astype(dtypes[1])
    equal(q, keys, 3)  # two blocks of reads, the last one partly filled


def test_heads():
    q, keys = whole((9, 2, 2, 128)), whole((2, 2, 10, 128), 1)  # a width that fills the lanes comes as it is
    scores, ids = equal(q, keys, 3)
    alone = find(jnp.asarray(q[:, 1:]), jnp.asarray(keys[1:]), 3, **KERNEL)
    np.testing.assert_array_equal(alone[1][:, 0], ids[:, 1])
    np.testing.assert_array_equal(alone[0][:, 0], scores[:, 1])


@pytest.mark.slow
def test_keys_shared_by_the_heads():
    equal(whole((9, 2, 2, 128)), whole((2, 10, 128), 1), 3)


def test_constant_scores_and_masked_keys():
    _, ids = equal(*given_scores(np.zeros((1, 2, 10))), 7)
    i, j = pair_ranks(7)
    np.testing.assert_array_equal(ids[0, 0], (i * 10 + j)[:7])
    scores = np.random.default_rng(0).standard_normal((1, 2, 9)).astype(np.float32)
    scores[0, 0, [0, 3, 5]] = -np.inf
    _, ids = equal(*given_scores(scores), 9)
    assert not set(np.asarray(ids)[0, 0] // 9) & {0, 3, 5}
    few = np.full((1, 2, 9), -np.inf, np.float32)
    few[0, :, 4] = 1.0
    _, ids = equal(*given_scores(few), 9)
    assert int(ids[0, 0, 0]) == 4 * 9 + 4 and len(set(np.asarray(ids)[0, 0])) == 9


def test_nan_keeps_ids_in_range():
    scores = whole((2, 2, 9))
    scores[0, 1, 2] = scores[1] = np.nan
    _, ids = find(*given_scores(scores), 9, **KERNEL)
    assert (np.asarray(ids) >= 0).all() and (np.asarray(ids) < 81).all()


def test_gradient_replicas_and_reruns():
    q, keys = jnp.asarray(whole((9, 2, 2, 4))), jnp.asarray(whole((2, 2, 7, 4), 1))

    def loss(q, keys, options):
        return jnp.sum(jax.checkpoint(lambda q, k: product_key_topk(q, k, 4, scale=0.5, **options)[0])(q, keys) ** 2)

    replicas = jnp.stack([keys, 2 * keys[:, ::-1]])
    found, again, expected = (
        jax.jit(jax.vmap(jax.value_and_grad(lambda q, k, o=o: loss(q, k, o), (0, 1)), in_axes=(None, 0)))(q, replicas)
        for o in (KERNEL, KERNEL, dict(implementation="xla"))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, found, again)


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


def test_choice_and_what_the_kernel_refuses():
    assert pair_count(32) == len(pair_ranks(32)[0]) == 119
    q, keys = jnp.ones((3, 1, 2, 4)), jnp.ones((1, 2, 300, 4))
    with compiling_for("tpu-v6e"):
        text = str(jax.make_jaxpr(lambda q, k: product_key_topk(q, k, 4))(q, keys))
        assert "pallas_call" in text and "top_k" not in text
    with pytest.raises(NotImplementedError, match="TPU"):
        product_key_topk(q, keys, 4, implementation="pallas_tpu")
    for message, *arguments in (
        ("topk is 257", q, keys, 257),
        ("float16", q.astype(jnp.float16), keys, 4),
        ("n is 9000", q, jnp.ones((1, 2, 9000, 4)), 4),
        ("bytes of VMEM", jnp.ones((3, 1, 2, 4096)), jnp.ones((1, 2, 4096, 4096)), 4),
    ):
        with pytest.raises(NotImplementedError, match=message):
            product_key_topk(*arguments, **KERNEL)
