"""The two-axis search against brute force over all slots, its ties, its gradient, masked keys and NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.product_key_topk import api, pair_ranks, product_key_topk, reference, xla

IMPLEMENTATIONS = ("xla", "reference")

find = jax.jit(product_key_topk, static_argnums=2, static_argnames=("scale", "implementation"))


def brute_force(scores, topk):
    """scores [N,H,2,n] float32 -> the best of all n*n slots by (sum, row rank, column rank)."""
    reads, heads, _, n = scores.shape
    best, ids = np.empty((reads, heads, topk), np.float32), np.empty((reads, heads, topk), np.int32)
    scores = np.where(scores == 0, np.float32(0), scores)
    for t in range(reads):
        for h in range(heads):
            orders = [np.argsort(-scores[t, h, a], kind="stable") for a in (0, 1)]
            row, column = (scores[t, h, a][orders[a]] for a in (0, 1))
            sums = (row[:, None] + column[None]).astype(np.float32).ravel()
            chosen = np.argsort(-sums, kind="stable")[:topk]
            best[t, h] = sums[chosen]
            ids[t, h] = orders[0][chosen // n] * n + orders[1][chosen % n]
    return best, ids


def given_scores(scores):
    """q and keys whose products are exactly `scores` [H,2,n], for one read."""
    scores = jnp.asarray(scores, jnp.float32)
    return jnp.ones((1, scores.shape[0], 2, 1)), scores[..., None]


def random_scores(kind, shape, rng):
    if kind == "ties":
        return rng.integers(-3, 4, shape).astype(np.float32)
    if kind == "bfloat16":
        return np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), np.float32)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", [3, 7, 32, 45, 100, 128, 256])
def test_equals_brute_force_over_all_slots(n):
    rng = np.random.default_rng(n)
    for topk in sorted({k for k in (1, 2, 8, 32) if k <= n} | ({n} if n <= 128 else set())):
        for kind in ("plain", "ties", "bfloat16"):
            scores = random_scores(kind, (2, 2, n), rng)
            if kind == "ties":
                scores[0, 0, :2] = -0.0
            expected, expected_ids = brute_force(scores[None], topk)
            for implementation in IMPLEMENTATIONS:
                found, ids = find(*given_scores(scores), topk, implementation=implementation)
                np.testing.assert_array_equal(found, expected, err_msg=f"{topk} {kind}")
                np.testing.assert_array_equal(ids, expected_ids, err_msg=f"{topk} {kind}")
                assert all(len(set(row)) == topk for row in np.asarray(ids)[0])


def case(reads=9, heads=2, n=7, width=5, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = rng.integers(-2, 3, (reads, heads, 2, width)).astype(dtype)
    return q, rng.integers(-2, 3, (heads, 2, n, width)).astype(dtype)


def test_products_heads_and_scale():
    q, keys = case()
    expected, expected_ids = brute_force(np.einsum("nhap,hamp->nham", q, keys) * np.float32(0.5), 4)
    for implementation in IMPLEMENTATIONS:
        scores, ids = find(jnp.asarray(q), jnp.asarray(keys), 4, scale=0.5, implementation=implementation)
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(ids, expected_ids)
        for head in range(2):
            one = find(jnp.asarray(q[:, head : head + 1]), jnp.asarray(keys[head : head + 1]), 4, scale=0.5)
            np.testing.assert_array_equal(one[1][:, 0], ids[:, head])
        shared = find(jnp.asarray(q), jnp.asarray(keys[0]), 4, implementation=implementation)
        copied = find(jnp.asarray(q), jnp.asarray(np.stack([keys[0]] * 2)), 4)
        np.testing.assert_array_equal(shared[1], copied[1])


def test_permuting_keys_permutes_ids():
    rng = np.random.default_rng(3)
    scores, n = rng.standard_normal((1, 2, 19)).astype(np.float32), 19
    orders = [rng.permutation(n) for _ in range(2)]
    turned = np.stack([scores[:, a, orders[a]] for a in (0, 1)], axis=1)
    plain, ids = find(*given_scores(scores), 6)
    found, turned_ids = find(*given_scores(turned), 6)
    np.testing.assert_array_equal(found, plain)
    turned_ids = np.asarray(turned_ids)
    np.testing.assert_array_equal(orders[0][turned_ids // n] * n + orders[1][turned_ids % n], ids)


@pytest.mark.parametrize("chunk_bytes", [None, 4096])
def test_gradient_equals_that_of_the_dense_scorer(monkeypatch, chunk_bytes):
    if chunk_bytes:
        monkeypatch.setattr(xla, "_LIMIT_BYTES", chunk_bytes)  # several chunks and a remainder
    rng = np.random.default_rng(1)
    n, topk, reads = 6, 6, 37
    q = rng.standard_normal((reads, 2, 2, 5)).astype(np.float32)
    keys = rng.standard_normal((2, 2, n, 5)).astype(np.float32)
    keys[0, 0, 2] = 40 * keys[0, 0, 2]  # one row key takes all winners of about half the reads
    weights = rng.standard_normal((reads, 2, topk))
    expected_dq, expected_dkeys = np.zeros(q.shape), np.zeros(keys.shape)
    _, ids = find(jnp.asarray(q), jnp.asarray(keys), topk, scale=0.3)
    ids = np.asarray(ids)
    assert max(np.bincount(ids[t, 0] // n).max() for t in range(reads)) == topk
    for t, h, k in np.ndindex(reads, 2, topk):  # float64
        for axis, index in enumerate((ids[t, h, k] // n, ids[t, h, k] % n)):
            expected_dq[t, h, axis] += 0.3 * weights[t, h, k] * keys[h, axis, index]
            expected_dkeys[h, axis, index] += 0.3 * weights[t, h, k] * q[t, h, axis]

    for implementation in IMPLEMENTATIONS:

        def loss(q, keys, implementation=implementation):
            return jnp.sum(product_key_topk(q, keys, topk, scale=0.3, implementation=implementation)[0] * weights)

        dq, dkeys = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(q), jnp.asarray(keys))
        np.testing.assert_allclose(dq, expected_dq, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(dkeys, expected_dkeys, rtol=1e-5, atol=2e-4)


def test_shared_keys_collect_the_gradients_of_all_heads():
    q, keys = case(n=6)
    shared = jnp.asarray(keys[0])

    def loss(keys):
        return jnp.sum(product_key_topk(jnp.asarray(q), keys, 3)[0] ** 2)

    copied = jax.jit(jax.grad(loss))(jnp.stack([shared, shared]))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(shared), copied.sum(0), rtol=1e-5)


def test_constant_scores_give_the_canonical_first_slots():
    n, topk = 10, 7
    _, ids = find(*given_scores(np.zeros((1, 2, n))), topk)
    i, j = pair_ranks(topk)
    np.testing.assert_array_equal(ids[0, 0], (i * n + j)[:topk])


def test_masked_keys_and_nan():
    scores = np.random.default_rng(0).standard_normal((1, 2, 8)).astype(np.float32)
    scores[0, 0, [0, 3, 5]] = -np.inf
    for implementation in IMPLEMENTATIONS:
        found, ids = find(*given_scores(scores), 8, implementation=implementation)
        assert not set(np.asarray(ids)[0, 0] // 8) & {0, 3, 5} and np.isfinite(found).all()
        few = np.full((1, 2, 8), -np.inf, np.float32)
        few[0, :, 4] = 1.0
        found, ids = find(*given_scores(few), 8, implementation=implementation)
        np.testing.assert_array_equal(found[0, 0], [2.0, *7 * [np.float32(-1e30)]])
        assert int(ids[0, 0, 0]) == 4 * 8 + 4 and len(set(np.asarray(ids)[0, 0])) == 8
        scores_nan = scores.copy()
        scores_nan[0, 1, 2] = np.nan
        _, ids = find(*given_scores(scores_nan), 8, implementation=implementation)
        assert (np.asarray(ids) >= 0).all() and (np.asarray(ids) < 64).all()
        masked = jnp.asarray(scores)[..., None]
        search = functools.partial(product_key_topk, topk=4, implementation=implementation)
        grad = jax.jit(jax.grad(lambda q, search=search, keys=masked: jnp.sum(search(q, keys)[0])))(
            jnp.ones((1, 1, 2, 1))
        )
        assert np.isfinite(grad).all()


def test_nan_is_an_error_where_values_are_checked(monkeypatch):
    monkeypatch.setenv("RECSCALE_CHECK", "1")
    q, keys = jnp.ones((3, 1, 2, 4)), jnp.ones((1, 2, 5, 4))
    product_key_topk(q, keys, 2)
    with pytest.raises(ValueError, match="NaN in keys"):
        product_key_topk(q, keys.at[0, 1, 2, 3].set(jnp.nan), 2)
    with pytest.raises(Exception, match="NaN in q"):
        jax.block_until_ready(jax.jit(lambda q: product_key_topk(q, keys, 2))(q.at[1].set(jnp.nan)))
        jax.effects_barrier()


def test_two_runs_are_bit_equal_and_bfloat16_gradients_keep_their_dtype():
    rng = np.random.default_rng(5)
    q = jnp.asarray(rng.standard_normal((64, 2, 2, 8)), jnp.bfloat16)
    keys = jnp.asarray(rng.standard_normal((2, 2, 16, 8)), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda q, k: jnp.sum(product_key_topk(q, k, 8)[0] ** 2), argnums=(0, 1)))
    first, second = step(q, keys), step(q, keys)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first[1][0].dtype == jnp.bfloat16 and first[1][1].dtype == jnp.float32


def test_replicas_under_vmap():
    q, keys = case(seed=4)
    both = jnp.stack([jnp.asarray(keys), 2 * jnp.asarray(keys)[:, ::-1]])
    found = jax.vmap(lambda k: product_key_topk(jnp.asarray(q), k, 3))(both)
    for i in range(2):
        alone = find(jnp.asarray(q), both[i], 3)
        np.testing.assert_array_equal(found[0][i], alone[0])
        np.testing.assert_array_equal(found[1][i], alone[1])


@pytest.mark.parametrize("topk", [1, 8])
def test_nothing_is_sorted_whole(topk):
    """XLA recognises both selections as such; a full sort of every row takes 30 times as long on CPUs."""
    shape = jax.ShapeDtypeStruct
    for replicas in ((), (3,)):
        q, keys = shape((*replicas, 256, 2, 2, 8), jnp.float32), shape((*replicas, 2, 2, 64, 8), jnp.float32)
        search = lambda q, keys: product_key_topk(q, keys, topk)  # noqa: E731
        program = jax.jit(jax.vmap(search) if replicas else search).lower(q, keys).compile().as_text()
        assert " sort(" not in program and ("TopK" in program or topk == 1)


@pytest.mark.parametrize("topk, pairs", [(8, 20), (16, 50), (32, 119), (64, 280), (128, 645)])
def test_number_of_candidate_pairs(topk, pairs):
    assert len(pair_ranks(topk)[0]) == pairs == sum(topk // i for i in range(1, topk + 1))
    assert reference.pair_count(topk) == pairs


def test_chunks_of_reads_hold_64_mib(monkeypatch):
    """Of scores [H, 2, n] and of the pairs' sums and slots, of the gradients of scores: float32 and int32."""
    asked = []
    monkeypatch.setattr(xla, "rows_within", lambda *limits: asked.append(limits) or 10**6)
    q, keys, found = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((9, 3, 2, 5), (3, 2, 40, 5), (9, 3, 8)))
    ids = jax.ShapeDtypeStruct(found.shape, jnp.int32)
    jax.eval_shape(lambda q, keys: xla.topk(q, keys, 8, 1.0), q, keys)
    jax.eval_shape(lambda *a: xla.gradients(*a, 1.0), q, keys, ids, found)
    scores = np.empty((3, 2, 40), np.float32).nbytes
    assert asked == [(2**26, scores + 2 * np.empty((3, 20), np.float32).nbytes), (2**26, scores)]


def test_as_many_sub_keys_as_int32_can_name():
    """46,340^2 slots, and no more: the next square is beyond 2^31 - 1."""
    shape = jax.ShapeDtypeStruct
    api._check(shape((3, 2, 2, 1), jnp.float32), shape((2, 2, 46_340, 1), jnp.float32), 46_340, 1.0)
    with pytest.raises(ValueError, match="at most 46340"):
        api._check(shape((3, 2, 2, 1), jnp.float32), shape((2, 2, 46_341, 1), jnp.float32), 2, 1.0)


def test_errors_name_what_was_wrong():
    q, keys = jnp.ones((3, 2, 2, 4)), jnp.ones((2, 2, 5, 4))
    for message, args, kwargs in (
        ("topk is 6", (q, keys, 6), {}),
        ("topk is 0", (q, keys, 0), {}),
        ("key width 3", (q[..., :3], keys, 2), {}),
        ("2 heads, keys have 1", (q, keys[:1], 2), {}),
        (r"expected \[N, H, 2, p\]", (q[0], keys, 2), {}),
        (r"expected \[N, H, 2, p\]", (jnp.ones((3, 2, 3, 4)), keys, 2), {}),
        (r"expected \[H, 2, n, p\] or", (q, keys[None], 2), {}),
        (r"expected \[H, 2, n, p\] or", (q, jnp.ones((2, 3, 5, 4)), 2), {}),
        ("q is int32", (q.astype(jnp.int32), keys, 2), {}),
        ("keys is int32", (q, keys.astype(jnp.int32), 2), {}),
        ("interpret=True", (q, keys, 2), {"interpret": True}),
    ):
        with pytest.raises(ValueError, match=message):
            product_key_topk(*args, **kwargs)
    with pytest.raises(ValueError, match="multiply a traced scale into q"):
        api._check(q, keys, 2, jnp.ones(()))
    with pytest.raises(NotImplementedError, match="pallas_gpu"):
        product_key_topk(q, keys, 2, implementation="pallas_gpu")
