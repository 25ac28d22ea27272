"""The kernels of the two-axis search, interpreted (Hopper's without layouts): the reference's ids and scores, bit for
bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.product_key_topk import pair_ranks, product_key_topk
from recscale.pallas_kernels.product_key_topk.reference import pair_count
from recscale.pallas_kernels.targets import compiling_for

find = jax.jit(product_key_topk, static_argnums=2, static_argnames=("scale", "implementation", "interpret"))
TPU, GPU = (dict(implementation=name, interpret=True) for name in ("pallas_tpu", "pallas_gpu"))

SLOW = pytest.mark.slow
BOTH = pytest.mark.parametrize("kernel", [TPU, GPU], ids=["tpu", "gpu"])
HOPPER_SLOWLY = pytest.mark.parametrize("kernel", [TPU, pytest.param(GPU, marks=SLOW)], ids=["tpu", "gpu"])


def equal(kernel, q, keys, topk, **options):
    """Asserts the kernel's result is the reference's, and returns it."""
    q, keys = jnp.asarray(q), jnp.asarray(keys)
    expected = find(q, keys, topk, implementation="reference", **options)
    found = find(q, keys, topk, **options, **kernel)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        np.testing.assert_array_equal(f, e)
    return found


def whole(shape, seed=0, most=3, dtype=np.float32):
    """Small whole numbers: sums are exact, ties are many, bfloat16 holds them."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(dtype)


def given_scores(scores):
    """q and keys whose products are exactly `scores` [H,2,n], for one read."""
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.ones((1, scores.shape[0], 2, 1)), scores[..., None]


@pytest.mark.parametrize("n, topk", [(3, 3), (7, 1), (45, 7), (100, 8)])
def test_tpu_equals_the_reference(n, topk):
    rng = np.random.default_rng(n)
    equal(TPU, whole((33, 1, 2, 5), n), whole((1, 2, n, 5), n + 1), topk, scale=0.5)
    plain = rng.standard_normal((1, 2, n)).astype(np.float32)  # one product per score: exact
    equal(TPU, *given_scores(plain), topk)
    signed = np.round(plain)
    signed[0, 0, :3] = -0.0, -0.0, 0.0
    equal(TPU, *given_scores(signed), topk)


@SLOW
@pytest.mark.parametrize("n, topk", [(7, 2), (32, 32), (128, 128), (256, 32), (1024, 16), (1100, 40)])
def test_tpu_equals_the_reference_at_larger_sizes(n, topk):
    equal(TPU, whole((130, 2, 2, 12), n), whole((2, 2, n, 12), n + 1), topk)


def test_gpu_equals_the_reference():
    q, keys = whole((5, 1, 2, 3), dtype=jnp.bfloat16), whole((1, 2, 45, 3), 1, dtype=jnp.bfloat16)
    equal(GPU, q, keys, 3, scale=0.5)
    scores = np.random.default_rng(0).standard_normal((1, 2, 300)).astype(np.float32)
    equal(GPU, *given_scores(scores), 2)  # in chunks; three bfloat16 pieces give back every float32


@SLOW
@pytest.mark.parametrize("n, topk", [(3, 3), (7, 1), (32, 32), (100, 8), (256, 32), (1024, 16), (700, 32)])
def test_gpu_equals_the_reference_at_other_sizes(n, topk):
    q, keys = whole((70, 2, 2, 70), n, dtype=jnp.bfloat16), whole((2, 2, n, 70), n + 1, dtype=jnp.bfloat16)
    equal(GPU, q, keys, topk)
    equal(GPU, *given_scores(np.random.default_rng(n).standard_normal((1, 2, n))), topk)


@pytest.mark.parametrize(
    "kernel, q_dtype, reads, most",
    [
        (TPU, jnp.bfloat16, 300, 40),  # two blocks of reads, the last one partly filled
        pytest.param(TPU, jnp.float32, 300, 40, marks=SLOW),
        pytest.param(GPU, jnp.float32, 66, 1000, marks=SLOW),  # two tiles of reads; queries beyond bfloat16
    ],
    ids=["tpu-bfloat16", "tpu", "gpu"],
)
def test_low_precision_keys(kernel, q_dtype, reads, most):
    q = whole((reads, 1, 2, 8), most=most, dtype=q_dtype)
    equal(kernel, q, whole((1, 2, 20, 8), 1, most=40, dtype=jnp.bfloat16), 3)


@HOPPER_SLOWLY
def test_heads(kernel):
    width = 128 if kernel is TPU else 4  # a width that fills the lanes comes as it is
    q, keys = whole((9, 2, 2, width)), whole((2, 2, 10, width), 1)
    scores, ids = equal(kernel, q, keys, 3)
    alone = find(jnp.asarray(q[:, 1:]), jnp.asarray(keys[1:]), 3, **kernel)
    np.testing.assert_array_equal(alone[1][:, 0], ids[:, 1])
    np.testing.assert_array_equal(alone[0][:, 0], scores[:, 1])


@SLOW
@BOTH
def test_keys_shared_by_the_heads(kernel):
    width = 128 if kernel is TPU else 4
    equal(kernel, whole((9, 2, 2, width)), whole((2, 10, width), 1), 3)


@HOPPER_SLOWLY
def test_constant_scores(kernel):
    _, ids = equal(kernel, *given_scores(np.zeros((1, 2, 10))), 7)
    i, j = pair_ranks(7)
    np.testing.assert_array_equal(ids[0, 0], (i * 10 + j)[:7])


@BOTH
def test_few_keys_that_are_not_masked(kernel):
    few = np.full((1, 2, 9), -np.inf, np.float32)
    few[0, :, 4] = 1.0
    _, ids = equal(kernel, *given_scores(few), 9)
    assert int(ids[0, 0, 0]) == 4 * 9 + 4 and len(set(np.asarray(ids)[0, 0])) == 9


def test_masked_keys():
    scores = np.random.default_rng(0).standard_normal((1, 2, 9)).astype(np.float32)
    scores[0, 0, [0, 3, 5]] = -np.inf
    _, ids = equal(TPU, *given_scores(scores), 9)
    assert not set(np.asarray(ids)[0, 0] // 9) & {0, 3, 5}


@HOPPER_SLOWLY
def test_nan_keeps_ids_in_range(kernel):
    scores = whole((2, 2, 9))
    scores[0, 1, 2] = scores[1] = np.nan
    _, ids = find(*given_scores(scores), 9 if kernel is TPU else 3, **kernel)
    assert (np.asarray(ids) >= 0).all() and (np.asarray(ids) < 81).all()


@HOPPER_SLOWLY
def test_gradient_replicas_and_reruns(kernel):
    """Rematerialised too on the TPU: Hopper's interpreter has effects that `jax.checkpoint` refuses."""
    remat = jax.checkpoint if kernel is TPU else lambda f: f
    reads, heads, topk = (9, 2, 4) if kernel is TPU else (3, 1, 2)
    q, keys = jnp.asarray(whole((reads, heads, 2, 4))), jnp.asarray(whole((heads, 2, 7, 4), 1))

    def step(options):
        def loss(q, keys):
            return jnp.sum(remat(lambda q, k: product_key_topk(q, k, topk, scale=0.5, **options)[0])(q, keys) ** 2)

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), in_axes=(None, 0)))

    replicas, once = jnp.stack([keys, 2 * keys[:, ::-1]]), step(kernel)
    found = once(q, replicas)
    jax.tree.map(np.testing.assert_array_equal, found, step(dict(implementation="xla"))(q, replicas))
    jax.tree.map(np.testing.assert_array_equal, found, once(q, replicas))


ODD, WIDE = ((3, 1, 2, 4), (1, 2, 300, 4)), ((3, 1, 2, 4096), (1, 2, 4096, 4096))


@pytest.mark.parametrize(
    "kernel, message, shapes, topk, dtype",
    [
        (TPU, "topk is 257", ODD, 257, jnp.float32),
        (TPU, "float16", ODD, 4, jnp.float16),
        (TPU, "n is 9000", ((3, 1, 2, 4), (1, 2, 9000, 4)), 4, jnp.float32),
        (TPU, "bytes of VMEM", WIDE, 4, jnp.float32),
        (GPU, "topk is 33", ODD, 33, jnp.float32),
        (GPU, "float16", ODD, 4, jnp.float16),
        (GPU, "bytes of shared memory", ((3, 1, 2, 2048), (1, 2, 300, 2048)), 4, jnp.float32),
    ],
)
def test_what_a_kernel_refuses(kernel, message, shapes, topk, dtype):
    q, keys = jnp.ones(shapes[0], dtype), jnp.ones(shapes[1])
    with pytest.raises(NotImplementedError, match=message):
        product_key_topk(q, keys, topk, **kernel)


@pytest.mark.parametrize("target, needed, made", [("tpu-v6e", "TPU", "pallas_call"), ("h100", "Hopper", "")])
def test_the_choice_for_a_chip(target, needed, made):
    assert pair_count(32) == len(pair_ranks(32)[0]) == 119
    q, keys = (jnp.ones(shape) for shape in ODD)
    with compiling_for(target):
        text = str(jax.make_jaxpr(lambda q, k: product_key_topk(q, k, 4))(q, keys))
        assert made in text and "top_k[" not in text
    with pytest.raises(NotImplementedError, match=needed):
        product_key_topk(q, keys, 4, implementation="pallas_tpu" if made else "pallas_gpu")
