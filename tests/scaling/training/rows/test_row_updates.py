"""Row-wise Adagrad and Adam: a dense reference on touched rows, bit-identical elsewhere, no table-sized work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recscale.models.inputs.tables import Touched
from recscale.scaling.training.rows.row_updates import init_slots, pay, pay_all, take_slots, update_rows
from recscale.scaling.training.step_options import StepOptions

V, W = 50, 4


def touched_rows(rows: list[int], slots: int = 8) -> Touched:
    padded = np.full(slots, V, np.int32)
    padded[: len(rows)] = rows
    return Touched(rows=jnp.asarray(padded), hit=jnp.asarray(padded < V), positions={})


def reference(kind, table, steps, l2=0.0):
    """Textbook loop over rows in NumPy; in every step L2 takes its share of every row that was ever touched."""
    table = np.array(table, np.float64)
    state, scale = {}, {}
    for rows, grads, rate in steps:
        moved = {}
        for row, g in zip(rows, grads, strict=True):
            if kind == "rowwise_adagrad":
                state[row] = state.get(row, 0.0) + np.mean(g**2)
                moved[row], scale[row] = g, np.sqrt(state[row]) + 1e-8
            else:
                m, v, t = state.get(row, (0.0, 0.0, 0))
                m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
                state[row] = (m, v, t)
                moved[row], scale[row] = m / (1 - 0.9**t), np.sqrt(v / (1 - 0.999**t)) + 1e-8
        for row, own in scale.items():
            table[row] = table[row] * np.exp(-rate * l2 / own) - rate * moved.get(row, 0.0) / own
    return table


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "rowwise_adam"])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_matches_a_row_by_row_reference(kind, l2):
    """With L2 the rows that no batch touches pay later what the dense update takes at once, at rates that change."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(V, W)), jnp.float32)
    start, slots = table, init_slots(kind, table, l2=l2 > 0)
    steps = []
    for rows, rate in (([1, 5, 7], 0.1), ([5, 9], 0.05), ([0, 1, 49], 0.2), ([9], 0.1), ([0], 0.01)):
        grads = rng.normal(size=(8, W)).astype(np.float32)
        touched = touched_rows(rows)
        vectors = jnp.take(table, touched.rows, axis=0, mode="clip")
        if l2:
            vectors = pay(kind, vectors, take_slots(slots, touched), l2=l2)
        given = (touched, vectors, jnp.asarray(grads), jnp.float32(rate))
        table, slots = update_rows(kind, table, slots, *given, l2=l2)
        steps.append((rows, grads[: len(rows)].astype(np.float64), rate))
    untouched = sorted(set(range(V)) - {0, 1, 5, 7, 9, 49})
    for name in set(slots) - {"clock", "paid"}:
        assert not np.asarray(slots[name])[untouched].any()
    if l2:
        table, slots = pay_all(kind, table, slots, l2=l2)
        again, _ = pay_all(kind, table, slots, l2=l2)
        np.testing.assert_array_equal(again, table)
    # float32 rounding of 1 - 0.999^t is what separates Adam from the float64 reference
    expected = reference(kind, start, steps, l2)
    np.testing.assert_allclose(table, expected, atol=4e-5 if kind == "rowwise_adam" else 2e-6)
    np.testing.assert_array_equal(np.asarray(table)[untouched], np.asarray(start)[untouched])


def test_an_inactive_replica_is_left_alone_even_with_nan_gradients():
    table = jnp.ones((V, W))
    slots = init_slots("rowwise_adagrad", table)
    touched = touched_rows([1, 2])
    grads = jnp.full((8, W), jnp.nan)
    new, new_slots = update_rows(
        "rowwise_adagrad", table, slots, touched, table[:8], grads, jnp.float32(0.1), active=jnp.asarray(False)
    )
    np.testing.assert_array_equal(new, table)
    np.testing.assert_array_equal(new_slots["sum"], slots["sum"])


def test_update_aliases_the_table_and_needs_no_table_sized_temporary():
    rows = 1_000_000
    table = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    slots = {"sum": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    touched = Touched(
        rows=jax.ShapeDtypeStruct((64,), jnp.int32), hit=jax.ShapeDtypeStruct((64,), jnp.bool_), positions={}
    )
    vectors = jax.ShapeDtypeStruct((64, 16), jnp.float32)

    def step(table, slots, touched, vectors, grads):
        return update_rows("rowwise_adagrad", table, slots, touched, vectors, grads, jnp.float32(0.1))

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, slots, touched, vectors, vectors).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= rows * 17 * 4
    assert memory.temp_size_in_bytes < 1_000_000


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="embedding_optimizer is 'adagrad', .* rowwise_adagrad, rowwise_adam"):
        StepOptions(optax.identity(), "adagrad", 0.05, 1e-8, 0.01, 0.0, 10, "linear")
