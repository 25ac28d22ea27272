"""Two training steps against the same written out in float64.

Batches have masked labels, padded candidates, a padded request and two histories; one table is taken whole, of another
few rows are touched; one of three replicas is dead."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64, keys_drawn_from

from recscale.models.inputs import (
    Batch,
    CandidateInputs,
    CandidateSide,
    Events,
    Field,
    History,
    Inputs,
    Schema,
    Sequence,
    Task,
    UserInputs,
    UserSide,
)
from recscale.scaling.training.optimizers import dense_optimizer
from recscale.scaling.training.step import StepOptions, Trainer

R, C, P = 5, 3, 3
ITEMS, SHOPS = 30, 5_000
MODEL = dict(tokens=4, width=8, hidden=6, query_hidden=5, seq_hidden=7, keep=3, head_dim=4, layers=1)
WEIGHTS = (1.0, 0.5)
CLIP, DECAY, L2, RATE, EMBEDDING_RATE, EPS = 0.05, 0.1, 0.02, (0.01, 0.03, 0.02), 0.05, 0.03
FACTORS = 8 / 12 * (1 - 3 / 10), 9 / 12 * (1 - 4 / 10)  # steps 7 and 8 of 12 to warm up, and of 10 from 5 on to decay

PAST = (Field("bought", "user", 4, ITEMS, table="items"), Field("at", "user", 4, SHOPS, table="shops"))
SCHEMA = Schema(
    (
        Field("age", "user", 4),
        Field("item", "candidate", 4, ITEMS, table="items"),
        Field("shop", "candidate", 4, SHOPS, table="shops"),
    ),
    (
        Sequence("clicks", 6, (Field("clicked", "user", 4, ITEMS, table="items"),)),
        Sequence("buys", 3, PAST),
    ),
    (Task("click", weight=WEIGHTS[0]), Task("buy", weight=WEIGHTS[1])),
)
VALID = np.asarray([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
LENGTHS = {"clicks": np.asarray([6, 0, 4, 2, 5]), "buys": np.asarray([1, 3, 2, 0, 3])}


def batch_of(seed, garbage=0):
    """A batch; `garbage` seeds all that is padding, its labels too."""
    real, other = np.random.default_rng(seed), np.random.default_rng(100 + garbage)

    def where(mask, draw):
        a, b = draw(real), draw(other)
        return np.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - mask.ndim)), a, b)

    def ids(mask, rows, offset=0):
        return where(mask, lambda g: offset + g.integers(1, rows // 2, mask.shape)).astype(np.int32)

    requests = VALID.any(axis=1)
    columns = {"clicks": 6, "buys": 3}
    past = {n: (np.arange(c)[None] < LENGTHS[n][:, None]) & requests[:, None] for n, c in columns.items()}
    histories = {
        "clicks": History({"clicked": ids(past["clicks"], ITEMS)}, {}, LENGTHS["clicks"].astype(np.int32)),
        "buys": History(
            {"bought": ids(past["buys"], ITEMS), "at": ids(past["buys"], SHOPS)}, {}, LENGTHS["buys"].astype(np.int32)
        ),
    }
    age = where(requests, lambda g: g.standard_normal((R, 4))).astype(np.float32)
    items, shops = ids(VALID, ITEMS), ids(VALID, SHOPS)
    labels = where(VALID, lambda g: g.integers(0, 2, (R, C, 2))).astype(np.float32)
    mask = where(VALID, lambda g: g.integers(0, 4, (R, C, 2)) > 0).astype(np.float32)
    user = UserSide({}, {"age": age}, histories)
    return Batch(user, CandidateSide({"item": items, "shop": shops}, {}), labels, mask, VALID)


def trainer_of(architecture="hyformer", model=MODEL, **options):
    chosen = dict(
        optimizer=dense_optimizer("adamw", weight_decay=DECAY, clip_norm=CLIP),
        embedding_optimizer="rowwise_adagrad",
        embedding_rate=EMBEDDING_RATE,
        embedding_eps=EPS,
        embedding_init_std=0.01,
        embedding_l2=L2,
        warmup=12,
        decay_shape="linear",
    )
    source = types.SimpleNamespace(schema=SCHEMA, requests=R, candidates=C)
    return Trainer(architecture, model, source, (0, 1, 2), RATE, StepOptions(**chosen | options))


def state_of(trainer):
    """A state of random parameters and rows; the last replica is dead."""
    rng = np.random.default_rng(0)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), trainer.state_shapes())
    drawn = lambda a: (0.4 * rng.standard_normal(a.shape)).astype(np.float32)  # noqa: E731
    for slots in zeros.slots.values():
        slots["paid"] = np.full_like(slots["paid"], np.inf)  # no row was trained
    return dataclasses.replace(
        zeros,
        params=jax.tree.map(drawn, zeros.params),
        tables=jax.tree.map(drawn, zeros.tables),
        rate=np.asarray(RATE, np.float32),
        seed=np.arange(P, dtype=np.uint32),
        step=np.asarray(7, np.int32),
        decay_from=np.asarray(5, np.int32),
        decay_steps=np.asarray(9, np.int32),
        alive=np.asarray([True, True, False]),
        failed_at=np.asarray([-1, -1, 3], np.int32),
    )


def inputs_of(tables, batch):
    """What is looked up, row by row of whole tables."""
    histories = {}
    for sequence in SCHEMA.sequences:
        name, history = sequence.name, batch.user.histories[sequence.name]
        parts = [tables[field.table][history.ids[field.name]] for field in sequence.fields]
        length = jnp.where(VALID.any(axis=1), history.length, 0)
        real = np.arange(parts[0].shape[1])[None] < length[:, None]
        events = jnp.where(real[..., None], jnp.concatenate(parts, axis=-1), 0.0)
        histories[name] = Events(events, length)
    ids = batch.candidates.ids
    fields = {"item": tables["items"][ids["item"]], "shop": tables["shops"][ids["shop"]]}
    return Inputs(
        UserInputs({"age": jnp.asarray(batch.user.dense["age"])}, histories), CandidateInputs(fields, batch.valid)
    )


def literal(trainer, state, params, tables, batch):
    """((loss, (logits, loss per task)), gradients by parameters and by whole tables)."""
    graph, _, values, other = trainer.model_state(state)

    def loss(params, tables, batch):
        logits = nnx.merge(graph, params, values, other)(inputs_of(tables, batch)).logits
        seen = batch.label_mask * batch.valid[..., None]
        each = jnp.logaddexp(0.0, logits) - batch.labels * logits
        per_task = (each * seen).sum(axis=(0, 1)) / seen.sum(axis=(0, 1))
        return jnp.sum(per_task * jnp.asarray(WEIGHTS)), (logits, per_task)

    return in_float64(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, tables, batch)


def is_matrix(path):
    """Of this model: what is called a kernel."""
    return "kernel" in jax.tree_util.keystr(path)


class Reference:
    """AdamW with a clipped gradient, and row-wise Adagrad with L2 on all rows in every step, of one replica."""

    def __init__(self, params, tables):
        self.params, self.tables, self.count = params, tables, 0
        self.m = self.v = jax.tree.map(np.zeros_like, params)
        self.sums = {name: np.zeros(len(table)) for name, table in tables.items()}

    def step(self, grads, rows, touched, rate, embedding_rate):
        self.count += 1
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        assert norm > CLIP
        grads = jax.tree.map(lambda g: g * CLIP / norm, grads)
        self.m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.m, grads)
        self.v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, self.v, grads)

        def moved(path, p, m, v):
            update = m / (1 - 0.9**self.count) / (np.sqrt(v / (1 - 0.999**self.count)) + 1e-8)
            return p - rate * (update + DECAY * p * is_matrix(path))

        self.params = jax.tree_util.tree_map_with_path(moved, self.params, self.m, self.v)
        for name, at in touched.items():
            g = np.zeros_like(self.tables[name])
            g[at] = rows[name][at]
            self.sums[name] += np.mean(g**2, axis=-1)
            trained = self.sums[name] > 0
            scale = np.where(trained, np.sqrt(self.sums[name]) + EPS, 1.0)[:, None]
            kept = np.where(trained[:, None], np.exp(-embedding_rate * L2 / scale), 1.0)
            self.tables[name] = self.tables[name] * kept - embedding_rate * g / scale


def touched_by(batch):
    """The distinct rows that real places name."""
    found = {"items": [batch.candidates.ids["item"][VALID]], "shops": [batch.candidates.ids["shop"][VALID]]}
    for history in batch.user.histories.values():
        for name, ids in history.ids.items():
            real = (np.arange(ids.shape[1])[None] < history.length[:, None]) & VALID.any(axis=1)[:, None]
            found["shops" if name == "at" else "items"].append(ids[real])
    return {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}


@pytest.fixture(scope="module")
def trainer():
    return trainer_of()


@pytest.fixture(scope="module")
def stepped(trainer):
    """Per batch of two: (batch, metrics, state after it)."""
    state, found = state_of(trainer), []
    step = in_float64(trainer.program)
    for seed in (1, 2):
        batch = batch_of(seed)
        state, metrics = step(state, batch)
        found.append((batch, metrics, state))
    return found


@pytest.mark.parametrize("replica", range(P - 1))
def test_steps_are_those_written_out(trainer, stepped, replica):
    first = state_of(trainer)
    own = lambda tree: jax.tree.map(lambda a: np.array(a[replica], np.float64), tree)  # noqa: E731
    reference = Reference(own(first.params), own(first.tables))
    for (batch, metrics, state), factor in zip(stepped, FACTORS, strict=True):
        (loss, (logits, per_task)), (grads, rows) = literal(trainer, first, reference.params, reference.tables, batch)
        seen = batch.label_mask * VALID[..., None]
        count = seen.sum(axis=(0, 1))
        assert metrics["loss"][replica] == pytest.approx(loss, rel=1e-6)
        np.testing.assert_allclose(metrics["logloss"][replica], per_task, rtol=1e-6)
        mean = (1 / (1 + np.exp(-logits)) * seen).sum(axis=(0, 1)) / count
        np.testing.assert_allclose(metrics["prediction"][replica], mean, rtol=1e-6)
        reference.step(grads, rows, touched_by(batch), RATE[replica] * factor, EMBEDDING_RATE * factor)
        for found, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference.params), strict=True):
            np.testing.assert_allclose(found[replica], expected, rtol=1e-5, atol=1e-7)
        settled = in_float64(trainer.settled)(state)
        again = in_float64(trainer.settled)(settled)  # nothing is owed any more
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), again.tables, settled.tables)
        for name, expected in reference.tables.items():
            np.testing.assert_allclose(settled.tables[name][replica], expected, rtol=1e-5, atol=1e-7)


def test_what_is_reported_of_the_batch(stepped):
    for (batch, metrics, state), factor in zip(stepped, FACTORS, strict=True):
        seen = batch.label_mask * VALID[..., None]
        np.testing.assert_allclose(metrics["rows"], seen.sum(axis=(0, 1))[None].repeat(P, 0))
        mean = (batch.labels * seen).sum(axis=(0, 1)) / seen.sum(axis=(0, 1))
        np.testing.assert_allclose(metrics["label"], mean[None].repeat(P, 0), rtol=1e-6)
        np.testing.assert_allclose(metrics["rate"], np.multiply(RATE, factor), rtol=1e-6)
        assert metrics["alive"].tolist() == [True, True, False]
        np.testing.assert_array_equal(metrics["failed_at"], state.failed_at)


def test_a_dead_replica_stays_as_it_was(trainer, stepped):
    first, last = state_of(trainer), stepped[-1][2]
    for tree in ("params", "tables"):
        for a, b in zip(jax.tree.leaves(getattr(first, tree)), jax.tree.leaves(getattr(last, tree)), strict=True):
            np.testing.assert_allclose(a[-1], b[-1], rtol=1e-12)
    assert not last.alive[-1] and last.failed_at.tolist() == [-1, -1, 3] and last.step == 9


def test_garbage_in_padding_moves_nothing(trainer, stepped):
    state, metrics = in_float64(trainer.program)(state_of(trainer), batch_of(1, garbage=5))
    _, expected_metrics, expected = stepped[0]
    for found, other in ((state, expected), (metrics, expected_metrics)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_replica_whose_loss_is_not_finite_is_left_and_noted(trainer):
    state = state_of(trainer)
    state.tables["shops"][1] = np.inf
    after, _ = in_float64(trainer.program)(state, batch_of(1))
    assert after.alive.tolist() == [True, False, False] and after.failed_at.tolist() == [-1, 7, 3]
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a[1], b[1], rtol=1e-12)
        assert np.isfinite(b[0]).all()


def test_suffixes_differ_between_steps_and_not_between_replicas():
    trainer = trainer_of(suffix=(0.5, 0.5))
    state = state_of(trainer)
    same = dataclasses.replace(
        state,
        params=jax.tree.map(lambda a: np.repeat(a[:1], P, axis=0), state.params),
        tables=jax.tree.map(lambda a: np.repeat(a[:1], P, axis=0), state.tables),
        alive=np.ones(P, bool),
    )
    losses = []
    for step in range(3):
        _, metrics = in_float64(trainer.program)(
            dataclasses.replace(same, step=np.asarray(step, np.int32)), batch_of(1)
        )
        np.testing.assert_allclose(metrics["loss"], metrics["loss"][:1].repeat(P), rtol=1e-12)
        losses.append(float(metrics["loss"][0]))
    assert len(set(losses)) == 3


def test_dropout_draws_anew_for_every_replica_and_step():
    trainer = trainer_of("rankmixer", dict(tokens=2, width=4, hidden=4, layers=2, dropout=0.5))
    state = state_of(trainer)
    with keys_drawn_from() as draws:
        for _ in range(2):
            state, _ = in_float64(trainer.program)(state, batch_of(1))
    keys = sum(draws, [])
    assert len(set(keys)) == len(keys) >= 2 * P * 2
