"""Row updates of memory values: against textbook loops and dense Adam, untouched rows, replicas, resume, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.memories.value_table import RowGrads
from recscale.scaling.data import make_source
from recscale.scaling.records import runs as records
from recscale.scaling.training import get_config, train
from recscale.scaling.training.rows.memory_rows import ValueOptions, init_slots, update_dense, update_rows, value_rate
from recscale.scaling.training.rows.memory_usage import holdout_usage, slot_counts
from recscale.scaling.training.step import make_trainer

M, W = 40, 5
UPDATES = ("rows_adam", "rows_adagrad", "rows_sgd")


def hits(seed, reads=9, per_read=4, rows=M, absent=0.1):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, (reads, per_read))
    ids = np.where(rng.random(ids.shape) < absent, -1, ids)
    ids[0] = ids[1, 0]
    return RowGrads(
        jnp.asarray(ids.ravel(), jnp.int32),
        jnp.asarray(rng.standard_normal(ids.size), jnp.float32),
        jnp.arange(ids.size, dtype=jnp.int32) // per_read,
        jnp.asarray(rng.standard_normal((reads, W)), jnp.float32),
    )


def dense(grads, rows=M):
    ids, w, read, g = (np.asarray(part) for part in grads)
    total = np.zeros((rows, g.shape[1]))
    np.add.at(total, ids[ids >= 0], (w[:, None] * g[read])[ids >= 0])
    return total


def reference(options, table, steps, rate):
    """Textbook loop over rows in NumPy float64."""
    table = np.array(table, np.float64)
    m, v, s, count = np.zeros_like(table), np.zeros_like(table), np.zeros(len(table)), np.zeros(len(table))
    for step, grads in enumerate(steps):
        total, hit = dense(grads), np.unique(np.asarray(grads.ids)[np.asarray(grads.ids) >= 0])
        norm = np.sqrt(np.sum(total**2))
        if options.clip_norm and norm > options.clip_norm:
            total *= options.clip_norm / norm
        for row in hit:
            g, count[row] = total[row], count[row] + 1
            t = step + 1 if options.bias_correction == "global" else count[row]
            if options.update == "rows_sgd":
                change = g
            elif options.update == "rows_adagrad":
                s[row] += np.mean(g**2)
                change = g / (np.sqrt(s[row]) + options.eps)
            else:
                m[row], v[row] = 0.9 * m[row] + 0.1 * g, 0.999 * v[row] + 0.001 * g**2
                change = (m[row] / (1 - 0.9**t)) / (np.sqrt(v[row] / (1 - 0.999**t)) + options.eps)
            table[row] -= rate * (change + options.weight_decay * table[row])
    return table


@pytest.mark.parametrize("limit", [None, 4 * W * 7])
@pytest.mark.parametrize(
    "options",
    [*(ValueOptions(update=u) for u in UPDATES)]
    + [ValueOptions(bias_correction="row"), ValueOptions(weight_decay=0.1), ValueOptions(clip_norm=1.5)],
    ids=lambda o: f"{o.update},{o.bias_correction},{o.weight_decay},{o.clip_norm}",
)
def test_matches_a_row_by_row_reference(options, limit, monkeypatch):
    if limit:  # seven hits a chunk: rows go on from one chunk to the next, and a remainder is left
        monkeypatch.setattr("recscale.scaling.training.rows.memory_rows._LIMIT_BYTES", limit)
    start = jnp.asarray(np.random.default_rng(0).standard_normal((M, W)), jnp.float32)
    table, slots, steps = start, init_slots(options, start), [hits(seed) for seed in range(20)]
    step = jax.jit(lambda *a: update_rows(options, *a))
    for i, grads in enumerate(steps[:3]):
        table, slots = step(table, slots, grads, jnp.float32(0.1), jnp.int32(i))
    # float32 rounding of 1 - 0.999^t is what separates Adam from the float64 reference
    tolerance = 2e-4 if "adam" in options.update else 1e-5
    np.testing.assert_allclose(table, reference(options, start, steps[:3], 0.1), atol=tolerance)


@pytest.mark.parametrize("update", UPDATES)
def test_rows_without_a_hit_stay_bit_identical(update):
    options = ValueOptions(update=update, weight_decay=0.1)
    start = jnp.asarray(np.random.default_rng(0).standard_normal((M, W)), jnp.float32)
    table, slots = start, init_slots(options, start)
    step = jax.jit(lambda *a: update_rows(options, *a))
    for i in range(20):
        table, slots = step(table, slots, hits(i, rows=25), jnp.float32(0.1), jnp.int32(i))
    np.testing.assert_array_equal(table[25:], start[25:])
    assert (np.asarray(table[:25]) != np.asarray(start[:25])).all()
    assert not any(np.asarray(slot[25:]).any() for slot in slots.values())


@pytest.mark.slow
def test_lazy_adam_is_dense_adam_if_every_row_is_hit_and_order_does_not_matter():
    rows, dense_options = ValueOptions(), ValueOptions(update="dense_adam")
    start = jnp.asarray(np.random.default_rng(0).standard_normal((6, W)), jnp.float32)
    a, b, c = ((start, init_slots(rows, start)) for _ in range(3))
    for i in range(10):
        grads = hits(i, reads=30, rows=6)
        assert set(range(6)) <= set(np.asarray(grads.ids).tolist())
        turn = np.random.default_rng(i).permutation(grads.ids.size)
        a = update_rows(rows, *a, grads, jnp.float32(0.01), jnp.int32(i))
        b = update_dense(dense_options, *b, jnp.asarray(dense(grads, 6), jnp.float32), jnp.float32(0.01), jnp.int32(i))
        turned = RowGrads(grads.ids[turn], grads.weights[turn], grads.read[turn], grads.g)
        c = update_rows(rows, *c, turned, jnp.float32(0.01), jnp.int32(i))
    np.testing.assert_allclose(a[0], b[0], atol=2e-6)
    np.testing.assert_allclose(a[0], c[0], atol=1e-6)


def test_an_inactive_replica_is_left_alone_even_with_nan():
    options, table = ValueOptions(), jnp.ones((M, W))
    grads = hits(0)._replace(g=jnp.full((9, W), jnp.nan))
    for update, g in ((update_rows, grads), (update_dense, jnp.full((M, W), jnp.nan))):
        new, slots = update(options, table, init_slots(options, table), g, jnp.float32(1), jnp.int32(0), False)
        np.testing.assert_array_equal(new, table)
        assert not any(np.asarray(slot).any() for slot in slots.values())


def test_rates_follow_their_rules():
    rate, factor = jnp.asarray([1e-3, 2e-3]), jnp.float32(0.5)

    def at(step, **kwargs):
        return np.asarray(value_rate(ValueOptions(**kwargs), rate, factor, jnp.int32(step)))

    np.testing.assert_allclose(at(7, rate=10.0), [5e-3, 1e-2], rtol=1e-6)
    linear = dict(rate_rule="linear", rate=4.0, decay_steps=100)
    np.testing.assert_allclose([at(s, **linear)[0] for s in (0, 50, 100, 500)], [2e-3, 1.25e-3, 5e-4, 5e-4], rtol=1e-6)
    np.testing.assert_allclose(at(7, rate_rule="absolute", rate=1e-2), [5e-3, 5e-3], rtol=1e-6)
    np.testing.assert_allclose(at(7, rate_rule="constant", rate=1e-2), [1e-2, 1e-2], rtol=1e-6)
    with pytest.raises(ValueError, match="value_lr_decay_examples"):
        ValueOptions(rate_rule="linear")
    with pytest.raises(ValueError, match="rows_adam, rows_adagrad, rows_sgd, dense_adam"):
        ValueOptions(update="adam")


def test_a_row_step_needs_the_same_memory_for_any_number_of_rows():
    """At fixed hits the temporaries are equal, far below the table, and the whole donated table is reused."""
    options, width, reads, per_read = ValueOptions(), 16, 256, 8
    shape, found = jax.ShapeDtypeStruct, []
    for rows in (2**12, 2**18, 2**21):
        table = shape((rows, width), jnp.float32)
        slots = {"mean": table, "square": table}
        n = reads * per_read
        grads = RowGrads(
            shape((n,), jnp.int32), shape((n,), jnp.float32), shape((n,), jnp.int32), shape((reads, width), jnp.float32)
        )
        step = jax.jit(lambda *a: update_rows(options, *a), donate_argnums=(0, 1))
        memory = step.lower(table, slots, grads, shape((), jnp.float32), shape((), jnp.int32)).compile()
        memory = memory.memory_analysis()
        assert memory.alias_size_in_bytes >= 3 * rows * width * 4
        found.append(memory.temp_size_in_bytes)
    assert found[0] < 2**21 and max(found) - min(found) < 2**12


def make_config(architecture="pkm", **training):
    config = get_config(architecture, "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    config.model.update({"tokens": 4, "width": 8, "hidden": 16, "memory_slots": 64, "memory_topk": 4, "key_width": 4})
    config.training.update({"requests": 64, "examples": 64 * 12, "warmup_examples": 64, "checkpoint_every_s": 0.0})
    config.training.update(training)
    return config


def trainer_of(config, replicas):
    source = make_source(config.data.to_dict(), requests=config.training.requests, candidates=1)
    return make_trainer(config, source, replicas, warmup=1)


@pytest.mark.slow
def test_a_step_trains_hit_rows_only_and_replicas_equal_single_runs():
    config = make_config()
    config.model.memory_slots = 4096
    config.model.memory_topk = 2
    both = trainer_of(config, [(0, 1e-3), (1, 1e-2)])
    state = both.fresh_state()
    (name,) = state.values
    before = np.asarray(state.values[name])
    for _ in range(3):
        state, metrics = both.step(state)
    after = np.asarray(state.values[name])
    hit = np.abs(np.asarray(state.value_slots[name]["square"])).max(axis=-1) > 0
    moved = (after != before).any(axis=-1)
    assert 0 < moved.mean() < 0.9
    np.testing.assert_array_equal(moved, hit)
    usage = np.asarray(metrics["stats"]["memory1/usage"])
    assert usage.shape == (2,) and (usage > 0).all() and (usage < 0.5).all()

    single = trainer_of(config, [(1, 1e-2)])
    state_single = single.fresh_state()
    for _ in range(3):
        state_single, _ = single.step(state_single)
    np.testing.assert_allclose(state_single.values[name][0], after[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.holdout_logits(state)[1], single.holdout_logits(state_single)[0], atol=1e-4)


@pytest.mark.slow
def test_row_and_dense_updates_agree_on_the_first_step():
    """Moments start at 0, so a row that was hit moves alike; the others only under dense Adam, and by nothing yet."""
    found = {}
    for update in ("rows_adam", "dense_adam"):
        trainer = trainer_of(make_config(value_update=update), [(0, 1e-3)])
        state, metrics = trainer.step(trainer.fresh_state())
        found[update] = (state.values, state.params, metrics["loss"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found.values())


@pytest.mark.slow
def test_the_whole_step_reuses_the_values_and_builds_nothing_of_their_size():
    config = make_config()
    config.model.memory_slots, config.model.width = 2**18, 32
    trainer = trainer_of(config, [(0, 1e-3)])
    state = jax.eval_shape(lambda: trainer._initial_state(jnp.zeros(1, jnp.uint32), jnp.ones(1)))
    memory = trainer._step.lower(state, None).compile().memory_analysis()
    table = 2**18 * 32 * 4
    assert memory.alias_size_in_bytes >= 3 * table
    assert memory.temp_size_in_bytes < table / 2


@pytest.mark.parametrize(
    "architecture, table",
    [("lmn", "memory/values"), pytest.param("msn", "blocks/1/ffn/memory/values", marks=pytest.mark.slow)],
)
def test_every_memory_logs_the_norms_of_its_rows(architecture, table):
    config = get_config(architecture, "known_truth")
    config.data.preset = "smoke"
    config.model.memory_slots = 64
    config.training.requests = 4
    trainer = trainer_of(config, [(0, 1e-3), (1, 1e-3)])
    state = jax.eval_shape(lambda: trainer._initial_state(jnp.zeros(2, jnp.uint32), jnp.ones(2)))
    stats = jax.eval_shape(trainer._train_step, state, None)[1]["stats"]
    found = {name: value.shape for name, value in stats.items() if "row_norm" in name}
    assert found == {f"{table}/row_norm_p{q}": (2,) for q in (10, 50, 90)}


def test_axes_of_slots_are_known_unless_an_expansion_permutes_them():
    config = make_config()
    trainer = trainer_of(config, [(0, 1e-3)])
    assert trainer.memory_sub_keys == 8
    counts = {"memory1/hits": np.zeros((1, 64)), "memory1/weight": np.zeros((1, 64))}
    for value in counts.values():
        value[0, [3, 5, 11]] = 1.0  # two rows, two columns of 8 (3 and 11 share one)
    rows = trainer.source.requests * trainer.source.candidates
    (found,) = holdout_usage([counts], replicas=1, batch_rows=rows, trained_rows=128, sub_keys=trainer.memory_sub_keys)
    assert found["memory_row_usage"] == found["memory_column_usage"] == 0.25
    assert found["memory_usage"] == 3 / 64 and found["memory_hits_per_slot"] == pytest.approx(2 * 3 / 64)
    config.model.update({"value_op": "expansion", "expansion": 4})
    assert trainer_of(config, [(0, 1e-3)]).memory_sub_keys is None


def test_vectors_over_slots_are_told_from_other_figures():
    vectors = {"memory1/hits": jnp.ones(8), "memory1/weight": jnp.ones(8), "blocks/3/hits": jnp.ones(4)}
    others = {"memory1/usage": jnp.ones(()), "hits": jnp.ones(()), "expert_load": jnp.ones(4)}
    assert slot_counts(vectors | others).keys() == vectors.keys()


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["pkm", "memory_plus"])
def test_interrupted_run_ends_bit_identical_and_usage_is_recorded(architecture, tmp_path):
    config = make_config(architecture)
    whole = train(config, tmp_path / "whole")
    seen = []

    def stop(event):
        seen.append(event)
        if len(seen) == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config, tmp_path / "broken", progress=stop)
    again = train(config, tmp_path / "broken")
    numbers = {k: v for k, v in whole["metrics"].items() if isinstance(v, int | float)}
    assert {k: again["metrics"][k] for k in numbers} == numbers
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "broken/metrics.jsonl").read_bytes()
    line = records.read_metrics(tmp_path / "whole")[-1]
    place = "memory1" if architecture == "pkm" else "memory2"
    for name in ("usage", "usage_null", "kl", "kl_null", "top1_weight", "effective_slots", "hits_per_slot"):
        assert 0 <= line[f"model_{place}/{name}"] < 100, name
    metrics = whole["metrics"]
    assert 0 < line["model_blocks/1/memory/values/row_norm_p50"] < 10  # of memory_plus: the pool
    assert 0 < metrics["memory_usage"] <= 1 and metrics["memory_usage"] <= 1.5 * metrics["memory_usage_null"]
    per_row = 4 * 4 * config.model.memory_topk  # tokens, heads, slots
    assert metrics["memory_hits_per_slot"] == pytest.approx(12 * 64 * per_row / 64)
    for name in ("memory_row_usage", "memory_column_usage"):
        assert metrics["memory_usage"] <= metrics[name] <= 1
    assert set(metrics["memory"]) == ({"memory1"} if architecture == "pkm" else {"memory1", "memory2"})
    row = records.run_row(whole)
    assert row["memory_slots"] == 64 and row["memory_usage"] == metrics["memory_usage"]


def test_options_are_read_strictly():
    with pytest.raises(ValueError, match="training.value_lr_rule is 'decay'"):
        trainer_of(make_config(value_lr_rule="decay"), [(0, 1e-3)])
    assert dataclasses.replace(ValueOptions(), update="dense_adam").dense
