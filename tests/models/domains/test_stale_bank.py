"""The bank of stale vectors: exact reads and writes, joins, forecasts, probes, and a cost that knows no rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.domains.stale_bank import (
    NO_ID,
    LSTMForecast,
    Snapshots,
    StaleBank,
    forecast_loss,
    join,
    linear_forecast,
    log2_bucket,
    momentum,
    probe,
)

V, W = 11, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def ids(*values):
    return jnp.asarray(values, jnp.int32)


def state_of(bank):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(bank)))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_write_changes_its_ids_and_nothing_else():
    bank, vectors = StaleBank(V, W, dtype=jnp.float32), normal(3, W)
    bank.write(ids(4, 0, 9), vectors, 5, jnp.asarray([True, True, False]))
    found = bank.read(ids(0, 4, 9, 1))
    assert found.known.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(found.last[:2], vectors[1::-1])
    np.testing.assert_array_equal(found.last[2:], np.zeros((2, W)))
    assert found.age(7).tolist() == [2, 2, 0, 0]
    before = state_of(bank)
    bank.write(ids(3), normal(1, W, seed=1), 6)
    after = state_of(bank)
    others = np.arange(V) != 3
    assert_same(jax.tree.map(lambda x: x[others], before), jax.tree.map(lambda x: x[others], after))
    assert after["steps"][3] == 6


def test_writes_of_different_ids_commute():
    banks = [StaleBank(V, W, snapshots=3, snapshot_rows=6) for _ in range(2)]
    pairs = [(ids(1, 8), normal(2, W), 1), (ids(2, 7), normal(2, W, seed=1), 2)]
    for bank, order in zip(banks, ([0, 1], [1, 0]), strict=True):
        for k in order:
            bank.write(*pairs[k])
    assert_same(*map(state_of, banks))


def test_reading_writes_nothing_and_gives_no_gradient():
    bank = StaleBank(V, W, snapshots=2, dtype=jnp.float32)
    bank.write(ids(1, 2), normal(2, W), 3)
    graph, state = nnx.split(bank)

    def total(state):
        found = nnx.merge(graph, state, copy=True).read(ids(1, 2, 5, -1, V, NO_ID))
        return jnp.square(found.vectors).sum(), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True, allow_int=True)(state)
    floats = [leaf for leaf in jax.tree.leaves(gradient) if leaf.dtype != jax.dtypes.float0]
    assert floats and not any(np.abs(np.asarray(leaf, np.float32)).max() for leaf in floats)
    assert found.known.tolist() == [True, True, False, False, False, False]
    assert_same(state_of(bank), state_of(nnx.merge(graph, state)))


def test_padding_is_never_written_and_an_id_given_twice_is_refused(monkeypatch):
    bank = StaleBank(V, W)
    before = state_of(bank)
    bank.write(ids(-1, V, NO_ID, -1), normal(4, W), 1)
    assert_same(before, state_of(bank))
    monkeypatch.setenv("RECSCALE_CHECK", "1")
    bank.write(ids(-1, -1, 3, 3), normal(4, W), 1, jnp.asarray([True, True, True, False]))
    with pytest.raises(ValueError, match="id 3 twice"):
        bank.write(ids(4, 3, 3), normal(3, W), 1)
    for name in ("rows", "width", "snapshots", "snapshot_rows"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            StaleBank(**{"rows": V, "width": W, name: 0})


def test_snapshots_of_frequent_rows_alone():
    bank = StaleBank(V, W, snapshots=3, snapshot_rows=4, dtype=jnp.float32)
    given = [normal(2, W, seed=k) for k in range(4)]
    for step, vectors in enumerate(given):
        bank.write(ids(2, 6), vectors, 10 + step)
    found = bank.read(ids(2, 6))
    assert found.steps.tolist() == [[13, 12, 11], [13, -1, -1]]
    np.testing.assert_array_equal(found.vectors[0], jnp.stack([given[3][0], given[2][0], given[1][0]]))
    np.testing.assert_array_equal(found.vectors[1, 1:], jnp.zeros((2, W)))


def test_join_replaces_exactly_what_is_fresh():
    fresh_ids, fresh = ids(0, 3, 7, NO_ID), normal(4, W)
    history = jnp.asarray([[3, 5, -1, 7], [7, 0, NO_ID, 3]], jnp.int32)
    base = normal(2, 4, W, seed=1)

    def joined(fresh, gradient):
        return join(history, fresh_ids, fresh, base, gradient=gradient)

    found = joined(fresh, False)
    expected = np.array(base)
    for place, row in (((0, 0), 1), ((0, 3), 2), ((1, 0), 2), ((1, 1), 0), ((1, 3), 1)):
        expected[place] = fresh[row]
    np.testing.assert_array_equal(found, expected)
    stopped, passed = (jax.grad(lambda x, g=g: joined(x, g).sum())(fresh) for g in (False, True))
    assert not jnp.abs(stopped).max()
    np.testing.assert_array_equal(passed[:, 0], [1, 2, 2, 0])


def drifting(bank, drift, steps):
    start = normal(2, W)
    for step in steps:
        bank.write(ids(1, 2), start + drift * step, step)
    return start


def test_linear_is_exact_under_a_constant_drift_and_none_is_off_by_age():
    bank, drift = StaleBank(V, W, snapshots=2, dtype=jnp.float32), normal(2, W, seed=3)
    start = drifting(bank, drift, (0, 3, 5))
    found, now = bank.read(ids(1, 2)), 9
    np.testing.assert_allclose(linear_forecast(found, now), start + drift * now, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(start + drift * now - found.last, drift * 4, rtol=1e-4, atol=1e-5)
    once = StaleBank(V, W, snapshots=2, dtype=jnp.float32)
    once.write(ids(1), normal(1, W), 0)
    np.testing.assert_array_equal(linear_forecast(once.read(ids(1, 5)), 4), once.read(ids(1, 5)).last)
    assert once.read(ids(1, 5)).known.tolist() == [True, False]
    twice = StaleBank(V, W, snapshots=2, dtype=jnp.float32)
    start = drifting(twice, drift, (0, 2))  # the first step is as good as any
    np.testing.assert_allclose(linear_forecast(twice.read(ids(1, 2)), 5), start + drift * 5, rtol=1e-5, atol=1e-5)
    drifting(twice, 0 * drift, (2,))  # of two made in one step nothing can be said
    np.testing.assert_array_equal(linear_forecast(twice.read(ids(1, 2)), 5), start)
    with pytest.raises(ValueError, match="two snapshots"):
        linear_forecast(StaleBank(V, W).read(ids(1)), 3)


def test_an_lstm_against_its_equations():
    model = LSTMForecast(W, 3, rngs=nnx.Rngs(0))
    kernel, bias, out = normal(W + 1 + 3, 12, seed=1), normal(12, seed=2), normal(3, W, seed=3)
    model.gates.kernel[...], model.gates.bias[...], model.out[...] = kernel, bias, out
    steps = np.asarray([[7, 4, 0], [5, -1, -1], [-1, -1, -1]], np.int32)
    vectors, now = normal(3, 3, W, seed=4), 9
    expected = np.array(vectors[:, 0], np.float64)
    for i, own in enumerate(steps):
        h, c = np.zeros(3), np.zeros(3)
        for k in (2, 1, 0):
            if own[k] >= 0:
                gap = np.log1p((now if k == 0 else own[k - 1]) - own[k])
                gates = np.concatenate([vectors[i, k], [gap], h]) @ kernel + bias
                i_, f, o = (1 / (1 + np.exp(-g)) for g in (gates[:3], gates[3:6] + 1, gates[9:]))
                c = f * c + i_ * np.tanh(gates[6:9])
                h = o * np.tanh(c)
        expected[i] += h @ out
    np.testing.assert_allclose(model(Snapshots(vectors, jnp.asarray(steps)), now), expected, rtol=1e-5, atol=1e-5)


def test_the_forecast_loss_is_a_mean_over_what_was_known():
    a, b = normal(3, W), normal(3, W, seed=1)
    error = np.square(np.asarray(a) - np.asarray(b)).mean(axis=1)
    for mask in ([True, False, True], [False, True, False], [False] * 3):
        expected = error[mask].mean() if any(mask) else 0.0
        assert float(forecast_loss(a, b, jnp.asarray(mask))) == pytest.approx(expected, rel=1e-6)


def test_an_lstm_starts_as_none_and_learns_without_touching_the_encoder():
    bank, drift = StaleBank(V, W, snapshots=3, dtype=jnp.float32), normal(2, W, seed=3)
    start = drifting(bank, drift, (0, 3, 5))
    found, now = bank.read(ids(1, 2, 7)), jnp.asarray(8)
    model = LSTMForecast(W, 8, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(found, now), found.last)
    graph, params = nnx.split(model)

    def loss(params, encoder):
        fresh = encoder * jnp.pad(start + drift * now, ((0, 1), (0, 0)))
        return forecast_loss(nnx.merge(graph, params)(found, now), fresh, found.known)

    @jax.jit
    def step(params):
        value, (own, encoder) = jax.value_and_grad(loss, argnums=(0, 1))(params, jnp.ones(()))
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, own), value, encoder

    losses = []
    for _ in range(40):
        params, value, encoder = step(params)
        assert encoder == 0
        losses.append(float(value))
    assert losses[0] == pytest.approx(float(jnp.square(3 * drift).mean()), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def test_a_probe_by_bucket():
    fresh = normal(6, W)
    read = fresh.at[2].multiply(-1).at[3].multiply(2)
    known = jnp.asarray([True, True, True, True, False, True])
    bucket = log2_bucket(jnp.asarray([0, 0, 1, 5, 6, 100]), 4)
    assert bucket.tolist() == [0, 0, 1, 2, 2, 3]
    found = probe(read, fresh, known, bucket.at[5].set(-1), 4)
    assert found.count.tolist() == [2, 1, 2, 0] and found.coverage.tolist() == [1, 1, 0.5, 0]
    np.testing.assert_allclose(found.cosine, [1, -1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(found.error, [0, 2, 1, 0], atol=1e-6)


def test_what_was_just_written_reads_back_to_the_rounding_of_its_numbers():
    bank, vectors = StaleBank(V, 64), normal(V, 64)
    bank.write(jnp.arange(V), vectors, 2)
    found = bank.read(jnp.arange(V))
    same = probe(found.last, vectors, found.known, found.age(2), 1)
    assert same.cosine[0] > 1 - 1e-4 and same.error[0] < 2**-8


def test_momentum_moves_a_share_of_the_way():
    states = [nnx.state(LSTMForecast(2, 2, rngs=nnx.Rngs(k))) for k in range(2)]
    moved = momentum(*states, 0.75)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *states)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), moved, expected)


def test_a_step_needs_no_memory_that_grows_with_the_rows():
    """The bank is updated in place, and what the program needs besides is the same for a hundred times the rows."""

    def program(rows):
        graph, state = nnx.split(nnx.eval_shape(lambda: StaleBank(rows, W, snapshots=2)))

        def step(state, ids, vectors):
            bank = nnx.merge(graph, state, copy=True)
            found = bank.read(ids).last.sum()
            bank.write(ids, vectors, 3, jnp.broadcast_to(jnp.isfinite(found), ids.shape))
            return nnx.state(bank), found

        shapes = (jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((8, W), jnp.float32))
        return jax.jit(step, donate_argnums=0).lower(state, *shapes).compile().memory_analysis()

    small, large = program(1_000), program(100_000)
    assert large.temp_size_in_bytes <= small.temp_size_in_bytes + 64
    assert large.alias_size_in_bytes >= 100_000 * W * 2 * 2  # both snapshots, bfloat16


def test_snapshots_say_what_they_hold():
    found = Snapshots(normal(2, 3, W), jnp.asarray([[4, 2, -1], [-1, -1, -1]], jnp.int32))
    assert found.known.tolist() == [True, False] and found.age(9).tolist() == [5, 0]
