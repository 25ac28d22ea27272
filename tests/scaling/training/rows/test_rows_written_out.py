"""Every optimiser of rows against the same written out in float64: all options, small gradients, states, defaults."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_float64 import in_float64

from recscale.models.inputs.tables import Touched
from recscale.models.memories.value_table import RowGrads
from recscale.scaling.training import get_config
from recscale.scaling.training.rows import memory_rows, row_updates
from recscale.scaling.training.rows.memory_rows import ValueOptions
from recscale.scaling.training.rows.memory_usage import holdout_usage

V, W = 7, 3
KINDS = ("rowwise_adagrad", "rowwise_adam", "rowwise_sgd")
SHAPES = {
    "rowwise_adagrad": {"sum": ((V,), "float32")},
    "rowwise_adam": {"mean": ((V, W), "float32"), "square": ((V, W), "float32"), "count": ((V,), "int32")},
    "rowwise_sgd": {},
}
OWED = {"paid": ((V,), "float32"), "clock": ((), "float32")}


def assert_moved(start, table, expected):
    """Constants of a program are float32: of 1 - 0.999^t that leaves 1e-5."""
    moved = expected - start
    np.testing.assert_allclose(table - start, moved, rtol=1e-4, atol=1e-6 * np.abs(moved).max())


def described(slots):
    return {name: (slot.shape, str(slot.dtype)) for name, slot in slots.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_rows_at_first(kind):
    table = jnp.ones((V, W))
    plain, with_l2 = row_updates.init_slots(kind, table), row_updates.init_slots(kind, table, l2=True)
    assert described(plain) == SHAPES[kind] and described(with_l2) == SHAPES[kind] | OWED
    for name, slot in with_l2.items():
        np.testing.assert_array_equal(slot, np.inf if name == "paid" else 0)
    for update, rule in memory_rows._RULES.items():
        kept = {correction: SHAPES[rule].copy() for correction in ("row", "global")}
        kept["global"].pop("count", None)
        for correction, expected in kept.items():
            options = ValueOptions(update, bias_correction=correction)
            assert described(memory_rows.init_slots(options, table)) == expected
            assert options.dense == (update == "dense_adam")


class Row:
    """One row and what its optimiser keeps, written out."""

    def __init__(self, kind, values, b1, b2, eps):
        self.kind, self.values, self.b1, self.b2, self.eps = kind, np.array(values, np.float64), b1, b2, eps
        self.mean, self.square, self.sum, self.count = np.zeros(W), np.zeros(W), 0.0, 0

    def change(self, g, count=None):
        """What to subtract, times the rate."""
        self.count += 1
        t = self.count if count is None else count
        self.mean = self.b1 * self.mean + (1 - self.b1) * g
        self.square = self.b2 * self.square + (1 - self.b2) * g**2
        self.sum += (g**2).sum() / W
        if self.kind == "rowwise_sgd":
            return g
        if self.kind == "rowwise_adagrad":
            return g / (np.sqrt(self.sum) + self.eps)
        return self.mean / (1 - self.b1**t) / (np.sqrt(self.square / (1 - self.b2**t)) + self.eps)

    def kept(self, weight):
        """What is left of the row by an L2 of this weight."""
        if self.kind == "rowwise_sgd":
            return np.exp(-weight)
        if not self.count:
            return 1.0
        if self.kind == "rowwise_adagrad":
            return np.exp(-weight / (np.sqrt(self.sum) + self.eps)) if self.sum else 1.0
        scale = np.sqrt(self.square / (1 - self.b2**self.count)) + self.eps
        return np.where(self.square > 0, np.exp(-weight / scale), 1.0)


# Rows of every batch; the first batches touch the first and the last row of the table, some rows are touched often.
BATCHES = ([0, 2, 6], [2, 5], [0, 1, 2, 6], [], [6], [2, 4])


def touched_by(rows):
    padded = np.full(5, V, np.int32)
    padded[: len(rows)] = rows
    return Touched(jnp.asarray(padded), jnp.arange(5) < len(rows), {})


@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("constants", [{}, dict(eps=1e-9, b1=0.6, b2=0.7)], ids=["defaults", "others"])
def test_rows_are_those_written_out(kind, l2, size, constants):
    """With L2 no row rests: what it owes is paid before it is read and all at the end, but a row of no gradient, and of
    Adam one component without, owes nothing."""
    rng = np.random.default_rng(1)
    start, rates = rng.normal(size=(V, W)), (0.1 * size if l2 else 0.1) * np.asarray([1, 2, 0.5, 3, 1, 4])
    eps, b1, b2 = (constants.get(name, value) for name, value in (("eps", 1e-8), ("b1", 0.9), ("b2", 0.999)))
    own = dict(l2=l2, **{name: value for name, value in constants.items() if name != "b1"})
    rows = [Row(kind, values, b1, b2, eps) for values in start]
    table, slots, trained = start, row_updates.init_slots(kind, jnp.asarray(start), l2=l2 > 0), set()
    for batch, rate in zip(BATCHES, rates, strict=True):
        grads = size * rng.normal(size=(5, W))
        grads[0, 1] = 0.0
        grads[[row == 5 for row in batch] + [False] * (5 - len(batch))] = 0.0  # row 5 gets no gradient
        grads[len(batch) :] = np.nan
        touched = touched_by(batch)

        def step(table, slots, touched, grads, rate):
            vectors = jnp.take(table, touched.rows, axis=0, mode="clip")
            if l2:
                vectors = row_updates.pay(kind, vectors, row_updates.take_slots(slots, touched), **own)
            return row_updates.update_rows(
                kind, table, slots, touched, vectors, grads, rate, **({"l2": l2} if l2 else {}), **constants
            )

        table, slots = in_float64(step)(table, slots, touched, grads, rate)
        trained |= set(batch)
        for number, row in enumerate(rows):
            change = row.change(grads[batch.index(number)]) if number in batch else 0.0
            if l2 and number in trained:
                row.values *= row.kept(rate * l2)
            row.values -= rate * change
    expected = np.stack([row.values for row in rows])
    if l2:
        assert slots["clock"] == pytest.approx(rates.sum())
        table, slots = in_float64(lambda table, slots: row_updates.pay_all(kind, table, slots, **own))(table, slots)
        resting = sorted(set(range(V)) - trained)
        assert resting == [3] and np.isinf(slots["paid"][resting]).all()
        np.testing.assert_allclose(np.delete(slots["paid"], resting), rates.sum())
    assert_moved(start, table, expected)
    kept = {"sum": "sum", "mean": "mean", "square": "square", "count": "count"}
    for name in SHAPES[kind]:
        np.testing.assert_allclose(slots[name], [getattr(row, kept[name]) for row in rows], rtol=1e-5)


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_that_is_not_active_keeps_its_rows_and_its_clock(kind, l2):
    table, touched = np.ones((V, W)), touched_by([0, 6])
    slots = row_updates.init_slots(kind, jnp.asarray(table), l2=l2 > 0)

    def step(active, table, slots):
        return row_updates.update_rows(kind, table, slots, touched, table[:5], table[:5], 0.5, active=active, l2=l2)

    after, kept = in_float64(step, 0)(False, table, slots)
    np.testing.assert_array_equal(after, table)
    jax.tree.map(np.testing.assert_array_equal, kept, slots)
    assert (in_float64(step, 0)(True, table, slots)[0][[0, 6]] != 1).all()


def test_bias_correction_takes_the_count_it_is_given():
    grads = 1e-9 * np.random.default_rng(0).normal(size=(V, W))
    slots = {"mean": grads / 3, "square": grads**2 / 5}
    change, new = in_float64(lambda *a: row_updates.row_step("rowwise_adam", *a, count=jnp.int32(4)))(slots, grads)
    mean, square = 0.9 * slots["mean"] + 0.1 * grads, 0.999 * slots["square"] + 0.001 * grads**2
    np.testing.assert_allclose(new["mean"], mean)
    np.testing.assert_allclose(new["square"], square)
    np.testing.assert_allclose(change, mean / (1 - 0.9**4) / (np.sqrt(square / (1 - 0.999**4)) + 1e-8), rtol=1e-4)
    assert set(new) == {"mean", "square"}


# ---- memory values


READS = 4
GLOBAL = dict(b1=0.6, b2=0.7, eps=1e-9)
OPTIONS = [
    ValueOptions(),
    ValueOptions(bias_correction="row", **GLOBAL),
    ValueOptions(weight_decay=0.3, **GLOBAL),
    ValueOptions("rows_adagrad", eps=2e-9),
    ValueOptions("rows_adagrad", clip_norm=1.5, bias_correction="row"),
    ValueOptions("rows_sgd", weight_decay=0.1, clip_norm=1.5),
    ValueOptions("rows_sgd", clip_norm=100.0),
]


def hits_of(seed, size):
    """Ids repeat, name the first and the last row, one too many (the last row then) and none; row 3 is never hit."""
    rng = np.random.default_rng(seed)
    ids = np.asarray([[6, 0, 2], [2, 2, -1], [V + 2, 5, 0], [-1, 2, 6]])
    if seed % 2:  # all are there, and of row 5 none
        ids = np.where(ids == 5, 1, np.where(ids < 0, V - 1, ids))
    ids = ids.astype(np.int32).ravel()
    read = (np.arange(ids.size) // 3).astype(np.int32)
    return RowGrads(ids, rng.normal(size=ids.size), read, size * rng.normal(size=(READS, W)))


def dense_sum(grads):
    total = np.zeros((V, W))
    for row, weight, read in zip(grads.ids, grads.weights, grads.read, strict=True):
        if row >= 0:
            total[min(row, V - 1)] += weight * grads.g[read]
    return total


def clipped(total, limit):
    norm = np.sqrt((total**2).sum())
    return total * limit / norm if limit and norm > limit else total


@pytest.mark.parametrize(("chunk", "size"), [(None, 1e-9), (5, 1.0)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.update},{o.bias_correction},{o.clip_norm}")
def test_values_are_those_written_out(options, chunk, size, monkeypatch):
    """However few hits are summed at once."""
    if chunk:
        monkeypatch.setattr(memory_rows, "_LIMIT_BYTES", 4 * W * chunk)
    rng = np.random.default_rng(3)
    start = rng.normal(size=(V, W))
    rows = [Row(memory_rows._RULES[options.update], values, options.b1, options.b2, options.eps) for values in start]
    table, slots = start, memory_rows.init_slots(options, jnp.asarray(start))
    step = in_float64(lambda *a: memory_rows.update_rows(options, *a))
    for i in range(3):
        grads = hits_of(i, size)
        table, slots = step(table, slots, grads, np.float64(0.1), np.int32(i))
        total = clipped(dense_sum(grads), options.clip_norm)
        for number in {0, 2, 6, 5 if i % 2 == 0 else 1}:
            row = rows[number]
            change = row.change(total[number], None if options.bias_correction == "row" else i + 1)
            row.values -= 0.1 * (change + options.weight_decay * row.values)
    assert_moved(start, table, np.stack([row.values for row in rows]))
    np.testing.assert_array_equal(table[3:5], start[3:5])
    for name in slots:
        np.testing.assert_allclose(slots[name], [getattr(row, name) for row in rows], rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize("options", [dict(), dict(clip_norm=1.5, weight_decay=0.2, bias_correction="row", **GLOBAL)])
def test_dense_values_are_those_written_out(options, size):
    options = ValueOptions("dense_adam", **options)
    rng = np.random.default_rng(3)
    start = rng.normal(size=(V, W))
    rows = [Row("rowwise_adam", values, options.b1, options.b2, options.eps) for values in start]
    table, slots = start, memory_rows.init_slots(options, jnp.asarray(start))
    step = in_float64(lambda *a: memory_rows.update_dense(options, *a))
    for i in range(3):
        grad = size * rng.normal(size=(V, W)) * [[1.0]] * (10 - i)
        table, slots = step(table, slots, grad, np.float64(0.1), np.int32(i))
        for row, g in zip(rows, clipped(grad, options.clip_norm), strict=True):
            row.values -= 0.1 * (row.change(g) + options.weight_decay * row.values)
    assert_moved(start, table, np.stack([row.values for row in rows]))
    for name in slots:
        np.testing.assert_allclose(slots[name], [getattr(row, name) for row in rows], rtol=1e-5)


def test_hits_are_summed_within_a_limit_and_looked_up_without_a_mask(monkeypatch):
    """Of the program: what is known of indices is said, or XLA masks every row that is read, and sorts."""
    limits, options = [], ValueOptions()
    monkeypatch.setattr(memory_rows, "rows_within", lambda *given: limits.append(given) or 10**6)
    table = jnp.ones((V, W))
    slots, grads = memory_rows.init_slots(options, table), RowGrads(*map(jnp.asarray, hits_of(0, 1.0)))
    ours = equations(lambda *a: memory_rows.update_rows(options, *a, 0.1, jnp.int32(0)), table, slots, grads)
    assert limits == [(4 * 2**20, 4 * W)]
    sorting = equations(lambda ids: memory_rows.sort_hits(ids, V), grads.ids)
    assert clipped_reads(ours) - clipped_reads(sorting) == 3 + 1 + len(slots)
    sums = [eqn for eqn in ours if eqn.primitive.name in ("scatter-add", "scatter_add", "scatter_min", "scatter-min")]
    assert sum(eqn.params["indices_are_sorted"] and eqn.invars[1].aval.shape[0] > 1 for eqn in sums) == 2
    touched = touched_by([0, 6])
    assert clipped_reads(equations(lambda slots: row_updates.take_slots(slots, touched), slots)) == len(slots)


def equations(function, *given):
    """Of a program and of those inside it."""

    def within(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                yield from within(inner) if hasattr(inner, "eqns") else ()

    return list(within(jax.make_jaxpr(function)(*given).jaxpr))


def clipped_reads(found):
    return sum(eqn.primitive.name == "gather" and eqn.params["mode"].name == "CLIP" for eqn in found)


def test_options_of_values():
    defaults = dict(rate_rule="multiple", rate=1.0, decay_steps=0, clip_norm=0.0, weight_decay=0.0)
    defaults |= dict(update="rows_adam", bias_correction="global", b1=0.9, b2=0.999, eps=1e-8)
    assert dataclasses.asdict(ValueOptions()) == defaults
    assert ValueOptions(rate_rule="linear", decay_steps=1).decay_steps == 1
    training = get_config("pkm").training
    training.update(dict(value_update="rows_sgd", value_lr_rule="linear", value_lr=3.0, value_lr_decay_examples=65))
    training.update(dict(value_clip_norm=0.5, value_weight_decay=0.25, value_bias_correction="row"))
    training.update(dict(b1=0.1, b2=0.2, eps=0.3))
    expected = ValueOptions("rows_sgd", "linear", 3.0, 9, 0.5, 0.25, "row", 0.1, 0.2, 0.3)
    assert memory_rows.value_options(training, 8) == expected
    for name, word in (("update", "adam"), ("rate_rule", "falling"), ("bias_correction", "own")):
        with pytest.raises(ValueError, match=f"is '{word}', expected one of"):
            ValueOptions(**{name: word})


def test_rates_of_values_in_numbers():
    def rate(step=3, factor=0.25, **options):
        given = jnp.asarray([0.5, 2.0]), jnp.float32(factor), jnp.int32(step)
        return memory_rows.value_rate(ValueOptions(**options), *given).tolist()

    assert rate(rate=4.0) == [0.5, 2.0] and rate(rate_rule="absolute", rate=4.0) == [1.0, 1.0]
    assert rate(rate_rule="constant", rate=4.0) == [4.0, 4.0]
    linear = dict(rate_rule="linear", rate=5.0, decay_steps=4)
    assert [rate(step, **linear) for step in (0, 3, 4, 9)] == [
        [0.625, 2.5], [0.25, 1.0], [0.125, 0.5], [0.125, 0.5],
    ]  # fmt: skip


def test_usage_is_summed_over_batches_and_averaged_over_layers():
    first, second = np.asarray([[4, 0, 0, 0], [1, 1, 1, 1]]), np.asarray([[2, 2, 0, 0], [0, 0, 0, 3]])
    batch = {"memory2/hits": first, "memory2/weight": first / 2, "memory1/hits": second, "memory1/weight": second}
    given = dict(replicas=2, batch_rows=5, trained_rows=40, sub_keys=2)
    found = holdout_usage([batch, batch, batch], **given)
    assert [list(one["memory"]) for one in found] == [["memory1", "memory2"]] * 2
    for one, usage, kl, hits in zip(
        found,
        ([0.5, 0.25], [0.25, 1.0]),
        ([np.log(2), np.log(4)], [np.log(4), 0.0]),
        ([12, 12], [9, 12]),
        strict=True,
    ):
        layers = one["memory"].values()
        np.testing.assert_allclose([layer["usage"] for layer in layers], usage)
        np.testing.assert_allclose([layer["kl"] for layer in layers], kl, atol=1e-12)
        trained = np.asarray(hits) / 4 * 40 / 15  # 15 rows were looked at
        np.testing.assert_allclose([layer["hits_per_slot"] for layer in layers], trained)
        assert one["memory_usage"] == np.mean(usage) and one["memory_kl"] == pytest.approx(np.mean(kl))
        assert one["memory_hits_per_slot"] == pytest.approx(trained.mean())
    assert found[0]["memory_row_usage"] == 0.5 and found[0]["memory_column_usage"] == 0.75
    assert "memory_row_usage" not in holdout_usage([batch], **given | dict(sub_keys=None))[0]
    nothing = {"memory1/hits": np.asarray([[0, 0], [1, 0]]), "memory1/weight": np.asarray([[0, 0], [1, 0]])}
    first, second = holdout_usage([nothing], **given | dict(sub_keys=None))
    assert first == {} and second["memory_usage"] == 0.5
    assert holdout_usage([{}], **given) == holdout_usage([], **given) == [{}, {}]
