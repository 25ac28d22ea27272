"""Memory values inside a step, by the closed form of a model of one table; and which tables a model may hold."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from in_float64 import in_float64

from recscale.models.inputs import Batch, CandidateSide, Field, Schema, Task, UserSide
from recscale.models.inputs.batch import Output
from recscale.models.inputs.tables import Table, find_touched
from recscale.models.memories.value_table import ValueTable
from recscale.scaling.training import get_config
from recscale.scaling.training import step as steps
from recscale.scaling.training.rows import memory_state
from recscale.scaling.training.rows.memory_rows import ValueOptions
from recscale.scaling.training.rows.memory_state import MemoryValues
from recscale.scaling.training.rows.touched_rows import touched_rows
from recscale.scaling.training.step import StepOptions, Trainer

R, C, P, V, W, M = 3, 2, 3, 7, 2, 6
RATES, EPS = (0.5, 0.25, 0.125), 2.0
SCHEMA = Schema((Field("item", "candidate", W, V),), (), (Task("click"),))
# Slots of every candidate, by rows of two hits; the last slot is hit by none, and one hit is absent.
SLOTS = np.asarray([[0, 1], [1, 1], [2, 4], [3, -1], [4, 0], [0, 2]])
KEYS = np.asarray([[3, 3], [0, 2], [1, 1], [4, 4], [2, 0], [0, 0]])


class Remembering(nnx.Module):
    """logit = item . (values read with weights of the item itself) + what two further slots say of the item."""

    def __init__(self, rngs):
        self.bias = nnx.Param(jnp.zeros(()))
        self.memory = nnx.Dict(values=ValueTable(M, W, std=1.0, rngs=rngs))

    def __call__(self, inputs, key=None):
        x = inputs.candidates.fields["item"].reshape(R * C, W)
        read = self.memory["values"].sum(jnp.asarray(SLOTS, jnp.int32), x)
        said = self.memory["values"].dot(jnp.asarray(KEYS, jnp.int32), x)
        logits = self.bias[...] + jnp.sum(read, axis=1) + jnp.sum(said, axis=1)
        return Output(logits.reshape(R, C, 1))


def trainer_of(monkeypatch, build=Remembering, mesh=None, **options):
    monkeypatch.setattr(steps.models, "build", lambda *given, rngs: build(rngs))
    chosen = dict(optimizer=optax.identity(), embedding_optimizer="rowwise_sgd", embedding_rate=0.3, embedding_l2=0.0)
    chosen |= dict(embedding_eps=1e-8, embedding_init_std=0.5, warmup=8, decay_shape="linear")
    source = types.SimpleNamespace(schema=SCHEMA, requests=R, candidates=C)
    return Trainer("remembering", {}, source, (4, 5, 6), RATES, StepOptions(**chosen | options), mesh)


def batch_of():
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, V, (R, C)).astype(np.int32), rng.integers(0, 2, (R, C, 1)).astype(np.float32)
    return Batch(
        UserSide({}, {}, {}), CandidateSide({"item": ids}, {}), labels, np.ones_like(labels), labels[..., 0] > -1
    )


@pytest.mark.parametrize("update", ["rows_sgd", "rows_adam", "dense_adam"])
def test_values_of_a_step_are_the_closed_form(update, monkeypatch):
    """Of three replicas one lives, one is dead and one dies."""
    trainer, batch = trainer_of(monkeypatch, values=ValueOptions(update, rate=3.0, eps=EPS)), batch_of()
    state = in_float64(trainer._initial_state)(np.asarray(trainer.seeds, np.uint32), np.asarray(RATES, np.float32))
    state = dataclasses.replace(state, step=np.int32(1), alive=np.asarray([True, False, True]))
    state.tables["item"][2] = np.inf
    assert list(state.values) == list(state.value_slots) == ["memory/values"]
    after, metrics = in_float64(trainer.program)(state, batch)
    before, found = state.values["memory/values"], after.values["memory/values"]
    assert before.shape == (P, M, W)
    x = state.tables["item"][0][batch.candidates.ids["item"].ravel()]
    logits = np.asarray([
        sum(weight * before[0][slot].sum() for slot, weight in zip(slots, own, strict=True) if slot >= 0)
        + sum(before[0][slot] @ own for slot in keys)
        for slots, keys, own in zip(SLOTS, KEYS, x, strict=True)
    ])  # fmt: skip
    slope = (1 / (1 + np.exp(-logits)) - batch.labels.ravel()) / (R * C)
    np.testing.assert_allclose(metrics["prediction"][0], np.mean(1 / (1 + np.exp(-logits))), rtol=1e-6)
    grad = np.zeros((M, W))
    for slots, keys, own, s in zip(SLOTS, KEYS, x, slope, strict=True):
        for slot, weight in zip(slots, own, strict=True):
            if slot >= 0:
                grad[slot] += weight * s
        for slot in keys:
            grad[slot] += own * s
    # Adam counts the steps of the run, of which this is the second.
    mean, square = 0.1 * grad / (1 - 0.9**2), 0.001 * grad**2 / (1 - 0.999**2)
    change = grad if update == "rows_sgd" else mean / (np.sqrt(square) + EPS)
    rate = 3.0 * RATES[0] * 2 / 8
    np.testing.assert_allclose(found[0] - before[0], -rate * change, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(found[1:], before[1:])
    slots = after.value_slots["memory/values"]
    assert slots.keys() == (set() if update == "rows_sgd" else {"mean", "square"})
    for name, expected in (("mean", 0.1 * grad), ("square", 0.001 * grad**2)):
        if name in slots:
            np.testing.assert_allclose(slots[name][0], expected, rtol=1e-6)
            assert not slots[name][1:].any()
    norms = np.sqrt((found**2).sum(axis=-1))
    assert metrics["stats"].keys() == {f"memory/values/row_norm_p{q}" for q in (10, 50, 90)}
    for q in (10, 50, 90):
        expected = np.quantile(norms, q / 100, axis=1)
        np.testing.assert_allclose(metrics["stats"][f"memory/values/row_norm_p{q}"], expected, rtol=1e-6)


def test_tables_of_a_model_belong_to_values():
    class Stray(Remembering):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.own = nnx.Dict(rows=Table(jnp.zeros((3, 2))))

    with pytest.raises(ValueError, match="holds tables at .*own/rows.* value tables at memory/values|must belong"):
        MemoryValues(Stray(nnx.Rngs(0)), ValueOptions())
    plain = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    nothing = MemoryValues(plain, ValueOptions())
    assert not nothing.rows and not nothing.present and nothing.sub_keys is None and nothing.probes({}, None) == {}
    model = Remembering(nnx.Rngs(0))
    by_rows, dense = (MemoryValues(model, ValueOptions(update)) for update in ("rows_sgd", "dense_adam"))
    assert by_rows.rows and not dense.rows and dense.probes({}, None) == {}
    with dense.recording(model, None) as reads:
        assert reads == {} and model.memory["values"].tape is None
    with by_rows.recording(model, None) as reads:
        model.memory["values"].dot(jnp.zeros((3, 2), jnp.int32), jnp.ones((3, W)))
        assert reads == {}
    ((read,),) = reads.values()
    assert read.kind == "dot" and model.memory["values"].tape is None
    probes = by_rows.probes({"memory/values": jnp.ones((P, M, W))}, lambda: reads)
    assert [probe.shape for probe in probes["memory/values"]] == [(P, 3, 2)]
    assert not np.asarray(probes["memory/values"][0]).any()


def test_axes_of_keys_are_those_that_all_memories_share(monkeypatch):
    class Memory(nnx.Module):
        def __init__(self, n, permutation=None):
            self.n, self.permutation = n, permutation

    monkeypatch.setattr(memory_state, "ProductKeyMemory", Memory)

    def of(*memories):
        found = MemoryValues(nnx.List(list(memories)), ValueOptions())
        return found.present, found.sub_keys

    assert of() == (False, None) and of(Memory(4)) == of(Memory(4), Memory(4)) == (True, 4)
    assert of(Memory(4), Memory(5)) == of(Memory(4), Memory(4, "turned")) == of(Memory(4, "turned")) == (True, None)


def test_what_a_trainer_asks_of_its_model(monkeypatch):
    """Experts of the first layer that has some; replicas in turn unless they hold a memory or a mesh; recomputation."""

    class Experts(nnx.Module):
        def __init__(self, factor):
            self.factor = factor

        def places(self, rows):
            return self.factor * rows

    class Mixture(Remembering):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.first, self.second = Experts(10), Experts(20)

    monkeypatch.setattr(steps, "TopKMoE", Experts)
    monkeypatch.setattr(steps, "take_turns", lambda model: True)
    trainer = trainer_of(monkeypatch, Mixture)
    assert trainer.expert_places == 10 * R * C and trainer._one_by_one
    assert not trainer_of(monkeypatch, mesh=jax.make_mesh((1,), ("data",)))._one_by_one
    monkeypatch.setattr(memory_state, "ProductKeyMemory", Experts)
    Experts.n, Experts.permutation = 3, None
    trainer = trainer_of(monkeypatch, Mixture)
    assert not trainer._one_by_one and trainer.memory_sub_keys == 3
    asked = []
    monkeypatch.setattr(steps, "check_remat", lambda *given: asked.append(given[1:]))
    monkeypatch.setattr(steps, "check_parts", lambda *given: asked.append(given))
    monkeypatch.setattr(steps, "rematerialise", lambda model, remat: asked.append((type(model), remat)))
    trainer = trainer_of(monkeypatch, remat="dots", values=ValueOptions("dense_adam"))
    jax.eval_shape(trainer._train_step, trainer.state_shapes(), batch_of())
    assert asked[:2] == [("dots", False), (1, False)] and set(asked[2:]) == {(Remembering, "dots")}


def test_a_trainer_is_made_of_what_a_configuration_says(monkeypatch):
    asked, config = [], get_config("dlrm_mlp")
    monkeypatch.setattr(steps, "step_options", lambda *given: asked.append(given) or "options")
    monkeypatch.setattr(steps, "Trainer", lambda *given: given)
    source = types.SimpleNamespace(requests=R, candidates=C)
    made = steps.make_trainer(config, source, [(4, 0.5), (5, 0.25)], 7, None)
    assert made == ("dlrm_mlp", config.model, source, (4, 5), (0.5, 0.25), "options", None)
    assert asked == [(config.training, R * C, 7)]


def test_rows_are_found_where_requests_are_not_split():
    batch, mesh = jax.tree.map(jnp.asarray, batch_of()), jax.make_mesh((1,), ("data",))
    expected = find_touched(SCHEMA, batch)
    for given in (None, mesh):
        jax.tree.map(np.testing.assert_array_equal, touched_rows(SCHEMA, batch, given), expected)
        assert "shard_map" not in str(jax.make_jaxpr(lambda b, m=given: touched_rows(SCHEMA, b, m))(batch))
