"""A step of a model of one matrix, by its closed form; what a state is at first; and what a trainer does around it."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from in_float64 import in_float64
from jax.sharding import AbstractMesh, PartitionSpec

from recscale.models.inputs import Batch, CandidateSide, Field, Schema, Task, UserSide
from recscale.models.inputs.batch import Output
from recscale.scaling import parallel
from recscale.scaling.training import step as steps
from recscale.scaling.training.accumulation import check_parts, in_parts
from recscale.scaling.training.optimizers import dense_optimizer
from recscale.scaling.training.rematerialisation import check_remat, rematerialise
from recscale.scaling.training.replicas import take_turns
from recscale.scaling.training.schedule import NEVER
from recscale.scaling.training.step import StepOptions, Trainer

R, C, P, V, W, Y = 4, 2, 3, 9, 4, 2
WEIGHTS, RATES = np.asarray([1.0, 0.5]), (0.5, 0.25, 0.125)
SCHEMA = Schema((Field("item", "candidate", W, V),), (), tuple(Task(f"t{i}", weight=w) for i, w in enumerate(WEIGHTS)))


class Banked(nnx.Module):
    """logits = item @ kernel; counts its calls and keeps what a step leaves pending."""

    def __init__(self, rngs, pending=True):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (W, Y)))
        self.bank, self.calls = nnx.Variable(jnp.zeros(Y)), nnx.Variable(jnp.zeros((), jnp.int32))
        self.pending = pending

    def __call__(self, inputs, key=None):
        logits = inputs.candidates.fields["item"] @ self.kernel[...]
        if key is None:
            return Output(logits)
        real = logits * inputs.candidates.valid[..., None]
        self.calls[...] = self.calls[...] + 1
        stats = {"memory1/hits": jnp.ones(3), "mean": jnp.mean(real), "draw": jax.random.uniform(key)}
        extra = {"extra": 0.25 * jnp.sum(self.kernel[...])}
        return Output(logits, extra, stats, pending=jnp.sum(real, (0, 1)) if self.pending else None)

    def settle(self, pending, ok):
        self.bank[...] = jnp.where(ok, pending, self.bank[...])


def trainer_of(monkeypatch, mesh=None, pending=True, **options):
    monkeypatch.setattr(steps.models, "build", lambda *given, rngs: Banked(rngs, pending))
    chosen = dict(optimizer=optax.identity(), embedding_optimizer="rowwise_sgd", embedding_rate=0.3, embedding_l2=0.0)
    chosen |= dict(embedding_eps=1e-8, embedding_init_std=0.25, warmup=1, decay_shape="linear")
    source = types.SimpleNamespace(schema=SCHEMA, requests=R, candidates=C)
    return Trainer("banked", {}, source, (4, 5, 4), RATES, StepOptions(**chosen | options), mesh)


def batch_of():
    """Of the second task a single label is known."""
    rng = np.random.default_rng(0)
    ids, valid = rng.integers(0, V, (R, C)).astype(np.int32), np.asarray([[1, 1], [1, 0], [1, 1], [0, 0]], bool)
    mask, labels = np.ones((R, C, Y), np.float32), rng.integers(0, 2, (R, C, Y)).astype(np.float32)
    mask[0, 1], mask[..., 1] = 0, 0
    mask[2, 1, 1] = 1
    labels[2, 1, 1] = 1
    return Batch(UserSide({}, {}, {}), CandidateSide({"item": ids}, {}), labels, mask, valid)


def written_out(batch, kernel, table, rate, embedding_rate):
    """(metrics, kernel, table) after a step of gradient descent on one replica."""
    ids, seen = batch.candidates.ids["item"], batch.label_mask * batch.valid[..., None]
    x = table[ids] * batch.valid[..., None]
    logits, count = x @ kernel, seen.sum((0, 1))
    guess = 1 / (1 + np.exp(-logits))
    each = -np.log(np.where(batch.labels > 0, guess, 1 - guess))
    per_task = (each * seen).sum((0, 1)) / count
    found = {"logloss": per_task, "loss": per_task @ WEIGHTS + 0.25 * kernel.sum(), "rows": count}
    found |= {"prediction": (guess * seen).sum((0, 1)) / count, "label": (batch.labels * seen).sum((0, 1)) / count}
    slope = WEIGHTS * (guess - batch.labels) * seen / count
    rows = np.zeros_like(table)
    np.add.at(rows, ids[batch.valid], (slope @ kernel.T)[batch.valid])
    moved = kernel - rate * (np.einsum("rcw,rcy->wy", x, slope) + 0.25)
    return found | {"mean": logits.mean(), "bank": logits.sum((0, 1))}, moved, table - embedding_rate * rows


def fresh(trainer):
    """One step before its last replica dies, and the second is dead."""
    state = in_float64(trainer._initial_state)(np.asarray(trainer.seeds, np.uint32), np.asarray(RATES, np.float32))
    (name,) = state.tables
    state.tables[name][2] = np.inf
    return dataclasses.replace(state, step=np.int32(6), alive=np.asarray([True, False, True])), name


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_its_closed_form(parts, monkeypatch):
    trainer, batch = trainer_of(monkeypatch, pending=parts == 1, accumulate=parts), batch_of()
    state, name = fresh(trainer)
    drawn = jax.tree.map(jnp.asarray, batch)
    trainer.source.batch = lambda step: dataclasses.replace(drawn, labels=drawn.labels * (step == 6))
    after, metrics = in_float64(trainer.program)(state, None)
    kernel, table = np.asarray(state.params["kernel"][...]), state.tables[name]
    for p in (0, 1):
        found, moved, rows = written_out(batch, kernel[p], table[p], RATES[p], 0.3)
        for key in ("loss", "logloss", "rows", "prediction", "label"):
            np.testing.assert_allclose(metrics[key][p], found[key], rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(metrics["stats"]["mean"][p], found["mean"], rtol=1e-6)
        np.testing.assert_allclose(after.params["kernel"][...][p], kernel[p] if p else moved, rtol=1e-6)
        np.testing.assert_allclose(after.tables[name][p], table[p] if p else rows, rtol=1e-6)
        bank = after.other["bank"][...][p]
        np.testing.assert_allclose(bank, found["bank"] if parts == 1 and p == 0 else 0.0, rtol=1e-6)
    np.testing.assert_array_equal(after.params["kernel"][...][2], kernel[2])
    np.testing.assert_array_equal(after.other["bank"][...][2], 0.0)
    np.testing.assert_array_equal(after.other["calls"][...], parts)
    assert after.step == 7 and after.alive.tolist() == [True, False, False] and after.failed_at.tolist() == [-1, -1, 6]
    assert metrics["stats"].keys() == {"mean", "draw"} and len(set(metrics["stats"]["draw"])) == 2  # two share a seed
    assert metrics.keys() == {
        *("loss", "logloss", "rows", "prediction", "label"),
        "rate",
        "alive",
        "failed_at",
        "stats",
    }
    for key in ("seed", "rate", "decay_from", "decay_steps"):
        np.testing.assert_array_equal(getattr(after, key), getattr(state, key))


@pytest.mark.parametrize("record", [None, 6])
def test_several_steps_in_one_program_are_those_steps(record, monkeypatch):
    """Of batches made in the step, or replayed from what was recorded of them."""
    trainer, batch = trainer_of(monkeypatch), jax.tree.map(jnp.asarray, batch_of())
    state, _ = fresh(trainer)
    trainer.source.batch = lambda step: batch
    monkeypatch.setattr(steps, "Recordable", types.SimpleNamespace)
    trainer.source.replay = lambda record, step: dataclasses.replace(batch, labels=batch.labels * (step > record))
    many = in_float64(trainer._many_steps, 3)(state, np.int32(2), record and np.int32(record), 4)
    one, found = state, []
    program = in_float64(trainer.program)
    for _ in range(2):
        one, metrics = program(one, record and dataclasses.replace(batch, labels=batch.labels * (one.step > record)))
        found.append(metrics)
    jax.tree.map(np.testing.assert_allclose, many[0], one)
    expected = jax.tree.map(lambda *each: np.stack([*each, *[np.zeros_like(each[0])] * 2]), *found)
    jax.tree.map(np.testing.assert_allclose, many[1], expected)


def test_evaluation_is_of_every_replica_and_draws_nothing(monkeypatch):
    trainer, batch = trainer_of(monkeypatch), batch_of()
    state, name = fresh(trainer)
    given = (state.params, state.values, state.other, state.tables, batch)
    output = in_float64(lambda *a: trainer._evaluate(lambda output: output.logits, *a))(*given)
    x = state.tables[name][:2][:, batch.candidates.ids["item"]]
    expected = np.einsum("prcw,pwy->prcy", x, np.asarray(state.params["kernel"][...])[:2])
    np.testing.assert_allclose(output[:2], expected, rtol=1e-6)
    first, second, asked = batch, batch_of(), []
    trainer.source.holdout = lambda: [first, second]
    trainer.put = lambda batch: ("put", batch)

    def logits(*arguments):
        asked.append(arguments)
        return np.full((P, R, C, Y), 1.0 if arguments[-1][1] is second else 0.0)

    trainer._logits = logits
    found = trainer.holdout_logits(state)
    assert found.shape == (P, 2, R, C, Y) and found[:, 0].max() == 0 and found[:, 1].min() == 1
    assert all(mine is theirs for mine, theirs in zip(asked[0][:4], given[:4], strict=True))
    assert asked[0][4] == ("put", first) and trainer.batch_logits(state, second).min() == 1
    assert list(trainer.holdout_slot_counts(state)) == [] and trainer.memory_sub_keys is None
    trainer._memory.present, trainer._counts = True, lambda *arguments: {"hits": len(arguments)}
    assert list(trainer.holdout_slot_counts(state)) == [{"hits": 5}] * 2
    params, other = (jax.tree.leaves(trainer.model_state(state)[k]) for k in (1, 3))
    for mine, whole in ((params, state.params), (other, state.other)):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), mine, jax.tree.leaves(whole))


def test_a_state_at_first(monkeypatch):
    trainer = trainer_of(monkeypatch, embedding_optimizer="rowwise_adagrad", embedding_l2=0.5)
    shapes = trainer.state_shapes()
    of = {key: (leaf.shape, leaf.dtype.name) for key, leaf in vars(shapes).items() if hasattr(leaf, "dtype")}
    assert of == {
        "step": ((), "int32"), "rate": ((P,), "float32"), "seed": ((P,), "uint32"), "decay_from": ((), "int32"),
        "decay_steps": ((), "int32"), "alive": ((P,), "bool"), "failed_at": ((P,), "int32"),
    }  # fmt: skip
    state = in_float64(trainer._initial_state)(np.asarray(trainer.seeds, np.uint32), np.asarray(RATES, np.float32))
    assert (state.step, state.decay_from, state.decay_steps) == (0, NEVER, 1)
    assert state.alive.all() and state.failed_at.tolist() == [-1] * P and state.seed.tolist() == [4, 5, 4]
    np.testing.assert_allclose(state.rate, RATES)
    (name,) = state.tables
    table, kernel = state.tables[name], np.asarray(state.params["kernel"][...])
    for drawn in (table, kernel):
        np.testing.assert_array_equal(drawn[0], drawn[2])
        assert np.unique(drawn).size == 2 * drawn[0].size  # of another seed, others
    assert 0.15 < table[:2].std() < 0.35 and 0.4 < kernel[:2].std() < 1.6
    assert not np.isclose(table[0].ravel()[0] / 0.25, kernel[0].ravel()[0])  # streams of their own
    assert state.slots[name].keys() == {"sum", "paid", "clock"} and np.isinf(state.slots[name]["paid"]).all()
    assert trainer_of(monkeypatch, embedding_optimizer="rowwise_adagrad").state_shapes().slots[name].keys() == {"sum"}
    # Others would draw other models, tables, dropout and suffixes than those of all records.
    assert (steps._MODEL_STREAM, steps._TABLE_STREAM, steps._DROPOUT_STREAM, steps._SUFFIX_STREAM) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="3 seeds but 2 rates"):
        Trainer("banked", {}, trainer.source, (1, 2, 3), (0.1, 0.2), trainer.options)


def test_every_array_of_a_state_has_the_place_of_its_kind(monkeypatch):
    """Of eight devices that are not there: by rows, or by the columns of wide values."""
    trainer, mesh = trainer_of(monkeypatch), AbstractMesh((8,), ("fsdp",))
    whole = trainer.state_shapes()
    rows, wide = jax.ShapeDtypeStruct((P, 64, 4), jnp.float32), jax.ShapeDtypeStruct((P, 64, 2048), jnp.float32)
    sums = jax.ShapeDtypeStruct((P, 64), jnp.float32)
    state = whole.replace(
        tables={"a": rows}, slots={"a": {"sum": sums}}, values={"b": wide}, value_slots={"b": {"c": wide}}
    )
    trainer.mesh, trainer._init = mesh, types.SimpleNamespace(eval_shape=lambda *given: state)
    found = trainer.state_shapes()

    def specs(tree):
        return [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]

    table, columns = parallel.table_spec("rows", 1, rows, mesh), parallel.table_spec("slots", 1, wide, mesh)
    assert table != columns != PartitionSpec() and table != PartitionSpec()
    assert specs(found.tables) == [table] and specs(found.slots) == [parallel.table_spec("rows", 1, sums, mesh)]
    assert specs(found.values) == specs(found.value_slots) == [columns]
    assert specs(found.rate) == specs(found.step) == [PartitionSpec()]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and b.sharding.mesh == mesh


def test_a_schema_may_have_no_table(monkeypatch):
    class Dense(Banked):
        def __call__(self, inputs, key=None):
            return Output(inputs.candidates.fields["price"] @ self.kernel[...])

    trainer = trainer_of(monkeypatch)
    trainer.source.schema = Schema((Field("price", "candidate", W),), (), SCHEMA.tasks)
    monkeypatch.setattr(steps.models, "build", lambda *given, rngs: Dense(rngs))
    trainer = Trainer("dense", {}, trainer.source, trainer.seeds, RATES, trainer.options)
    sides = UserSide({}, {}, {}), CandidateSide({}, {"price": jnp.ones((R, C, W))})
    labels, valid = jnp.ones((R, C, Y)), jnp.ones((R, C), bool)
    state, metrics = jax.eval_shape(trainer._train_step, trainer.state_shapes(), Batch(*sides, labels, labels, valid))
    assert state.tables == {} and metrics["loss"].shape == (P,) and metrics["prediction"].shape == (P, Y)


def test_how_functions_are_compiled(monkeypatch):
    """States are given away, counts of steps compiled in, random draws hardly optimised; on a mesh every result has a
    place."""
    asked, jit = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda function, **options: asked.append(options) or jit(function, **options))
    trainer = trainer_of(monkeypatch)
    quick = {"compiler_options": {"xla_backend_optimization_level": "0"}}
    donated, many = {"donate_argnums": 0}, {"donate_argnums": 0, "static_argnums": 3}
    own = [options for options in asked if options.keys() & {"compiler_options", "donate_argnums"}]
    assert own == [quick, donated, many] and not trainer._one_by_one and trainer.expert_places is None
    mesh = jax.make_mesh((1,), ("data",))
    asked.clear()
    placed = trainer_of(monkeypatch, mesh)
    own = [options for options in asked if options.keys() & {"compiler_options", "donate_argnums", "out_shardings"}]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed.state_shapes())
    all_whole = parallel.replicated(mesh)
    results = [options.pop("out_shardings", None) for options in own]
    assert own == [quick, quick, donated, many, {}, {}, {}]
    both = (shardings, all_whole)
    assert results == [None, shardings, both, both, shardings, all_whole, all_whole]


def test_what_trained_is_looked_up_by_its_shapes(monkeypatch):
    trainer = trainer_of(monkeypatch)
    assert trainer.compiled is None and trainer.communication == {}
    here = jax.devices()[0]
    bound, free = jax.device_put(jnp.ones(3), here), jnp.ones(3)
    assert bound.committed and not free.committed
    first = lambda *given: given  # noqa: E731
    assert trainer._run(first, {"a": bound}, free, jnp.asarray(2.0), None, 7)[1] is free
    trainer._run(lambda *given: given, 1)
    function, (named, b, c, none, number) = trainer._ran
    a = named["a"]
    assert function is first and none is None and number == 7
    assert a.sharding == bound.sharding and b.sharding is None and (a.shape, a.dtype) == ((3,), jnp.float32)
    assert c.weak_type and not a.weak_type
    asked = []
    text = types.SimpleNamespace(as_text=lambda: "program")
    lowered = types.SimpleNamespace(compile=lambda: text)
    del trainer.compiled
    trainer._ran, trainer.mesh = (types.SimpleNamespace(lower=lambda *a: asked.append(a) or lowered), (1, 2)), "mesh"
    monkeypatch.setattr(steps, "collective_bytes", lambda text: {"all-reduce": len(text)})
    assert trainer.communication == {"all-reduce": 7} and trainer.compiled is text and asked == [(1, 2)]
    del trainer.compiled
    trainer._ran = None
    assert trainer.communication is None


def test_a_program_is_traced_for_its_devices(monkeypatch):
    told = []
    for name in ("partitioned", "laying_out", "recording"):
        monkeypatch.setattr(
            steps, name, lambda value, name=name: told.append((name, value)) or contextlib.nullcontext()
        )
    monkeypatch.setattr(steps.parallel, "lay_out", lambda mesh: ("of", mesh))
    trainer = trainer_of(monkeypatch)
    assert trainer._on_mesh(lambda a, b: a - b)(5, 3) == 2
    trainer.mesh = types.SimpleNamespace(size=8)
    trainer._on_mesh(lambda: None)()
    kernels = ("recording", trainer.kernels)
    assert told == [
        ("partitioned", 1), ("laying_out", ("of", None)), kernels,
        ("partitioned", 8), ("laying_out", ("of", trainer.mesh)), kernels,
    ]  # fmt: skip
    asked = []
    monkeypatch.setattr(steps.parallel, "place_batch", lambda *given: asked.append(given) or "placed")
    assert trainer.put("batch") == "placed" and asked == [("batch", trainer.mesh, R)]
    state = object()
    assert trainer.settled(state) is state


# ---- optimisers, parts, blocks, turns


@pytest.mark.parametrize("name", ["adamw", "adam", "rmsprop", "adagrad"])
def test_defaults_of_optimisers_in_numbers(name):
    """Of a gradient as small as eps, and of one that would be clipped or decayed."""
    for g in (1e-9, 3.0):
        x = {"kernel": np.full((1, 1), g)}
        optimizer = dense_optimizer(name)
        update = in_float64(lambda g, o=optimizer: o.update(g, o.init(g), jax.tree.map(jnp.ones_like, g))[0])(x)
        expected = {
            "rmsprop": g / np.sqrt(0.001 * g**2 + 1e-8),
            "adagrad": g / np.sqrt(0.1 + g**2 + 1e-8),
        }.get(name, g / (g + 1e-8))
        np.testing.assert_allclose(update["kernel"], expected, rtol=1e-4)


def test_a_clipped_gradient_in_numbers():
    grads = {"a": np.asarray([3.0, 0.0]), "b": np.asarray(4.0)}
    for limit, norm in ((2.5, 2.5), (5.5, 5.0)):
        optimizer = dense_optimizer("adagrad", clip_norm=limit)
        update = in_float64(lambda g, o=optimizer: o.update(g, o.init(g))[0])(grads)
        for key, g in grads.items():
            own = g * norm / 5
            np.testing.assert_allclose(update[key], own / np.sqrt(0.1 + own**2 + 1e-8), rtol=1e-5)


def test_parts_are_numbered_through_and_take_requests_in_turn():
    """Part i of n of step s is number s n + i, from which a model draws, and begins with request i."""
    batch = jax.tree.map(jnp.asarray, batch_of())

    def graded(weight, other, seed, step, batch, touched, shares):
        metrics = dict.fromkeys(("rows", "logloss", "prediction", "label"), jnp.ones((1, Y))) | {"stats": {}}
        first = jnp.sum(batch.candidates.ids["item"][0])
        return (step**2 * jnp.ones(1), (other + step, metrics, {}, None)), weight * step * first

    given = jnp.ones(1), jnp.int32(0), jnp.uint32(0), jnp.int32(3), batch, {}
    (loss, (other, _, reads, pending)), grad = in_parts(graded, 2, given[:1], *given[1:])
    first, second = batch.candidates.ids["item"].sum(axis=1)[:2]
    assert loss == (6**2 + 7**2) / 2 and other == 6 + 7 and grad == (6 * first + 7 * second) / 2
    assert reads == {} and pending is None


class Block(nnx.Module):
    def __init__(self):
        self.gain = nnx.Param(jnp.full(2, 3.0))

    def __call__(self, x, *, twice=False):
        return self.twice(x) if twice else self._once(x)

    def twice(self, x):
        return 2 * self._once(x)

    def _once(self, x):
        return jnp.sin(x) * self.gain[...]


class Blocks(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Block(), Block()])


@pytest.mark.parametrize("remat", ["none", "dots", "blocks"])
def test_blocks_are_recomputed_by_the_policy_that_is_named(remat):
    model, x = Blocks(), jnp.ones(2)
    rematerialise(model, remat)
    first, second = model.blocks

    def policies(function):
        return within(jax.make_jaxpr(function)(x).jaxpr)

    def within(jaxpr):
        found = []
        for eqn in jaxpr.eqns:
            found += [eqn.params["policy"]] if "policy" in eqn.params else []
            inner = eqn.params.get("jaxpr")
            found += within(getattr(inner, "jaxpr", inner)) if inner is not None else []
        return found

    policy = {"none": [], "dots": [jax.checkpoint_policies.dots_saveable], "blocks": [None]}[remat]
    for function in (first, second, first.twice, lambda x: first(x, twice=True)):
        assert policies(function) == policy == policies(function)
    assert policies(first._once) == [] and type(first).__name__ == "Block" and type(Block()) is Block
    np.testing.assert_allclose(first(x, twice=True), 6 * np.sin([1.0, 1.0]), rtol=1e-6)


def test_what_goes_with_recomputation_parts_and_turns(monkeypatch):
    check_remat(Blocks(), "blocks", False)
    check_remat(Block(), "none", True)
    check_parts(1, True)
    check_parts(9, False)
    for refused in (lambda: check_remat(Blocks(), "dots", True), lambda: check_parts(2, True)):
        with pytest.raises(ValueError, match="train by rows"):
            refused()
    with pytest.raises(ValueError, match="has no blocks"):
        check_remat(Block(), "dots", False)

    def turns(*shapes):
        model = nnx.Module()
        for number, shape in enumerate(shapes):
            setattr(model, f"w{number}", nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32)))
        return take_turns(model)

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert [turns((3, 3), shape) for shape in ((2, 2), (1, 2, 2), (2, 2, 2))] == [False, False, True]
    assert not turns((9_000,), (2_999,)) and turns((9_000,), (3_000,))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not turns((2, 2, 2), (20_000,))
