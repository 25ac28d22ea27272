"""PROMO: what trains and what is frozen, lists exchanged, cold items alone, counts, and the two towers it stands on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count, size_space
from recscale.models.domains.promo import BEST, COLD, ITEM, NETWORK, USER, WORST, PromoConfig, promo_schema
from recscale.models.domains.two_tower import TwoTowerConfig
from recscale.models.inputs import Field, Schema, Sequence, Task
from recscale.models.inputs.batch import Batch, CandidateSide, Output, Pairs, UserSide
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.tables import embed, find_touched, gather_touched, table_lookup, touched_lookup
from recscale.models.layers.losses import training_loss
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

PROMO, TWO_TOWER = "recscale.models.domains.promo:PROMO", "recscale.models.domains.two_tower:TWO_TOWER"
R, C, K, D, V = 3, 4, 3, 6, 30
KEY = jax.random.key(0)


def case(generator="table", seed=0, **flags):
    """Graph and parameters of a small model with everything moved from zero, its schema, and a batch."""
    config = PromoConfig(users=K, generator=generator, **flags)
    schema = promo_schema(D, V, config)
    graph, state = nnx.split(nnx.eval_shape(lambda: build(PROMO, schema, vars(config), rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), state)

    def vectors(*lead):
        return np.concatenate([rng.standard_normal((*lead, D - 1)), np.ones((*lead, 1))], axis=-1).astype(np.float32)

    best, worst = (vectors(R, C, K) for _ in range(2))
    best[0, 1, 2:] = worst[1, 0] = 0  # a short list, an empty one
    cold = np.asarray([[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]], np.float32)[..., None]
    lists = {BEST: best.reshape(R, C, -1), WORST: worst.reshape(R, C, -1)}
    ids = {NETWORK: np.arange(2, 2 + R * C).reshape(R, C) % 9} if generator == "table" else {}
    candidates = CandidateSide(ids, lists | {ITEM: vectors(R, C), COLD: cold})
    labels = rng.integers(0, 2, (R, C, 1)).astype(np.float32)
    batch = Batch(UserSide({}, {USER: vectors(R)}, {}), candidates, labels, np.ones_like(labels), np.ones((R, C), bool))
    batch = jax.tree.map(jnp.asarray, batch)
    tables = {NETWORK: jnp.asarray(0.3 * rng.standard_normal((V, config.network_width(D))), jnp.float32)}
    return graph, state, schema, batch, tables


def output(graph, state, schema, batch, tables, key=None):
    return in_float64(lambda s, b, t: nnx.merge(graph, s)(embed(schema, b, table_lookup(t)), key=key))(
        state, batch, tables
    )


def with_dense(batch, **changed):
    return batch.replace(candidates=batch.candidates.replace(dense=batch.candidates.dense | changed))


def frozen_scores(batch):
    u, e = (np.asarray(x, np.float64) for x in (batch.user.dense[USER], batch.candidates.dense[ITEM]))
    return np.einsum("rd,rcd->rc", u, e)


def test_without_a_fusion_scores_are_those_of_the_base():
    graph, state, *given = case()
    state["fusion"][...] = jnp.zeros((D, D))
    np.testing.assert_allclose(output(graph, state, *given).logits[..., 0], frozen_scores(given[1]), rtol=1e-12)
    fresh = nnx.eval_shape(lambda: build(PROMO, given[0], vars(PromoConfig(users=K)), rngs=nnx.Rngs(0)))
    assert fresh.fusion.shape == (D, D)
    assert not np.asarray(build(PROMO, given[0], vars(PromoConfig(users=K)), rngs=nnx.Rngs(0)).fusion[...]).any()


def test_the_scores_against_their_equation():
    graph, state, schema, batch, tables = case(layers=2)
    host = jax.device_get(batch)
    network = np.asarray(tables[NETWORK], np.float64)[host.candidates.ids[NETWORK]].reshape(R, C, 2, D + 1, D)
    expected, A = frozen_scores(batch), np.asarray(state["fusion"][...], np.float64)
    for r, c in np.ndindex(R, C):
        z = host.candidates.dense[BEST][r, c].reshape(K, D).astype(np.float64)
        z = z[(z != 0).any(axis=1)]
        for layer in network[r, c]:
            z = np.maximum(z + z @ layer[:D] + layer[D], 0)
        moved = host.user.dense[USER][r].astype(np.float64) @ A
        expected[r, c] += host.candidates.dense[COLD][r, c, 0] * (moved @ z.mean(axis=0))
    np.testing.assert_allclose(output(graph, state, schema, batch, tables).logits[..., 0], expected, rtol=1e-6)


def test_only_networks_of_cold_items_in_the_batch_get_a_gradient():
    graph, state, schema, batch, tables = case()

    def loss(tables):
        found = nnx.merge(graph, state)(embed(schema, batch, table_lookup(tables)), key=KEY)
        return training_loss(found, batch.labels, batch.label_mask)[0]

    moved = np.abs(in_float64(jax.grad(loss))(tables)[NETWORK]).max(axis=1) > 0
    cold = batch.candidates.dense[COLD][..., 0] > 0
    assert set(np.flatnonzero(moved)) == set(np.asarray(batch.candidates.ids[NETWORK])[cold])


def test_nothing_of_a_frozen_base_gets_a_gradient():
    """Its vectors are data of the batch, so a base's parameters are no argument; of the vectors nothing is trained."""
    graph, state, schema, batch, _ = case()
    assert [field.name for field in schema.table_fields()] == [NETWORK]
    assert {path for path, _ in nnx.to_flat_state(state)} == {("fusion",), ("anchor", "kernel")}


def test_exchanged_lists_negate_the_gap():
    graph, state, schema, batch, tables = case()
    dense = batch.candidates.dense
    swapped = with_dense(batch, **{BEST: dense[WORST], WORST: dense[BEST]})

    def gap(state, batch, tables):
        model, inputs = nnx.merge(graph, state), embed(schema, batch, table_lookup(tables))
        return model.gap(inputs.candidates, model.prompt(inputs.candidates, BEST))

    there, back = (in_float64(gap)(state, each, tables) for each in (batch, swapped))
    np.testing.assert_array_equal(there, -back)
    assert np.abs(there).min() > 0
    losses = [output(graph, state, schema, each, tables, KEY).losses["pfpe"] for each in (batch, swapped)]
    cold = dense[COLD][..., 0] > 0
    np.testing.assert_allclose(losses[0], 0.1 * np.logaddexp(0, -there)[cold].mean(), rtol=1e-7)  # .1 is a float32
    assert losses[0] != losses[1]


def test_popular_items_and_padding_are_left_alone():
    graph, state, schema, batch, tables = case()
    cold = batch.candidates.dense[COLD][..., 0] > 0
    found = output(graph, state, schema, batch, tables).logits[..., 0]
    np.testing.assert_allclose(found[~cold], frozen_scores(batch)[~cold], rtol=1e-12)
    assert (found != frozen_scores(batch))[cold].all()
    valid = np.ones((R, C), bool)
    valid[0, 2] = False
    padded, broken = batch.replace(valid=valid), np.array(batch.candidates.dense[BEST])
    broken[0, 2] = np.nan
    plain, junk = (
        output(graph, state, schema, each, tables, KEY) for each in (padded, with_dense(padded, **{BEST: broken}))
    )
    np.testing.assert_array_equal(junk.logits[valid], plain.logits[valid])
    assert (
        plain.losses["pfpe"] == junk.losses["pfpe"] != output(graph, state, schema, batch, tables, KEY).losses["pfpe"]
    )


def test_a_call_is_its_two_halves_and_training_changes_no_logit():
    graph, state, schema, batch, tables = case()
    whole = output(graph, state, schema, batch, tables)

    def halves(state, batch, tables):
        model, inputs = nnx.merge(graph, state), embed(schema, batch, table_lookup(tables))
        return model.score(model.encode_user(inputs.user), inputs.candidates).logits

    np.testing.assert_array_equal(in_float64(halves)(state, batch, tables), whole.logits)
    trained = output(graph, state, schema, batch, tables, KEY)
    np.testing.assert_array_equal(trained.logits, whole.logits)
    assert not whole.losses and whole.pairs is None and trained.pairs.weight == 0.1


@pytest.mark.parametrize(
    "flags",
    [dict(), dict(generator="hypernet", layers=2), dict(generator="shared", users=2), dict(lambda1=0.0, lambda2=0.0)],
)
def test_closed_forms_equal_the_program(flags):
    config = vars(PromoConfig(**flags))
    schema = promo_schema(D, V, PromoConfig(**flags))
    check_counts(PROMO, schema, config)
    assert count(PROMO, schema, config).embedding_params == (0 if "generator" in flags else V * (D * D + D))
    assert count(PROMO, schema, config).training_only_params == (0 if flags.get("lambda1") == 0.0 else D * D)


@pytest.mark.parametrize("dense, hidden", [(False, (7, 3)), (True, (7,)), (True, ())])
def test_closed_forms_of_the_towers(dense, hidden):
    rows = None if dense else 40
    fields = (Field("user", "user", 5, rows), Field("item", "candidate", 3, rows, table="items"))
    clicks = Sequence("clicks", 4, (Field("past", "user", 3, rows, table="items"),))
    check_counts(TWO_TOWER, Schema(fields, (clicks,)), dict(width=5, hidden=hidden))


def test_the_towers_against_their_equation():
    fields = (Field("user", "user", 5, 40), Field("item", "candidate", 3, 40, table="items"), Field("age", "user", 2))
    schema = Schema(fields, (Sequence("clicks", 4, (Field("past", "user", 3, 40, table="items"),)),))
    config = dict(width=4, hidden=(6, 5))
    graph, state = nnx.split(nnx.eval_shape(lambda: build(TWO_TOWER, schema, config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape), state)
    inputs = random_inputs(schema, 2, 3)
    found = in_float64(lambda s, i: nnx.merge(graph, s)(i).logits)(state, inputs)
    user = inputs.user
    x = np.concatenate(
        [user.fields["user"], user.fields["age"], user.histories["clicks"].events.reshape(2, -1)], axis=1
    )
    for layer in state["user"]["layers"].values():
        x = np.maximum(x @ layer["kernel"][...] + layer["bias"][...], 0)
    u = np.concatenate([x @ state["user_out"]["kernel"][...] + state["user_out"]["bias"][...], np.ones((2, 1))], axis=1)
    e = np.asarray(inputs.candidates.fields["item"]) @ state["item"]["kernel"][...] + state["item"]["bias"][...]
    np.testing.assert_allclose(found[..., 0], np.einsum("rd,rcd->rc", u, e), rtol=1e-6)
    with pytest.raises(ValueError, match="two towers score one label"):
        build(TWO_TOWER, dataclasses.replace(schema, tasks=(Task("a"), Task("b"))), rngs=nnx.Rngs(0))
    sizes = [count(TWO_TOWER, schema, offer).dense_params for offer in size_space(TWO_TOWER, schema, None, 3_000)]
    assert sizes and all(abs(size - 3_000) < 300 for size in sizes)


def check_counts(name, schema, config):
    counted = count(name, schema, config)
    assert tree_params(abstract_model(name, schema, config)) == counted.dense_params
    function, arguments = forward_program(name, schema, config, 2, 3)
    assert count_flops(function, *arguments) == 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate
    function, arguments = train_program(name, schema, config, 1, 1)
    assert count_flops(function, *arguments) == counted.train_flops_per_row


def test_a_step_does_not_grow_with_the_number_of_items():
    def sizes(items):
        graph, state, _, batch, tables = case()
        schema = promo_schema(D, items, PromoConfig(users=K))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, tables))
        shapes[1][NETWORK] = jax.ShapeDtypeStruct((items, D * D + D), jnp.float32)

        def step(state, tables):
            touched = find_touched(schema, batch)
            vectors = gather_touched(tables, touched)

            def loss(state, vectors):
                inputs = embed(schema, batch, touched_lookup(vectors, touched))
                return training_loss(nnx.merge(graph, state)(inputs, key=KEY), batch.labels, batch.label_mask)[0]

            return jax.grad(loss, argnums=(0, 1))(state, vectors)

        program = jax.make_jaxpr(step)(*shapes)
        return [v.aval.shape for e in program.jaxpr.eqns for v in e.outvars]

    assert sizes(10_000) == sizes(10_000_000)


def test_a_golden_step():
    """Loss and gradient norm of one batch, made by this test on NumPy in float64."""
    graph, state, schema, batch, tables = case()

    def loss(state, tables):
        found = nnx.merge(graph, state)(embed(schema, batch, table_lookup(tables)), key=KEY)
        return training_loss(found, batch.labels, batch.label_mask)[0]

    value, grads = in_float64(jax.value_and_grad(loss, argnums=(0, 1)))(state, tables)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
    assert (float(value), float(norm)) == pytest.approx(GOLDEN, rel=1e-6)


GOLDEN = (1.1895828087, 1.0615588151)


def test_pairs_against_a_double_loop():
    rng = np.random.default_rng(1)
    shape = requests, candidates = 3, 6
    scores, labels = rng.standard_normal(shape), rng.integers(0, 2, shape).astype(float)
    above, mask = rng.integers(0, 2, shape) > 0, np.ones(shape)
    mask[1, 1], scores[1, 1], labels[1, 1] = 0, np.nan, np.nan
    each = [
        np.logaddexp(0, scores[r, j] - scores[r, i])
        for r in range(requests) for i in range(candidates) for j in range(candidates)
        if mask[r, i] and mask[r, j] and above[r, i] and not above[r, j] and labels[r, i] and not labels[r, j]
    ]  # fmt: skip
    assert len(each) > 2

    def loss(scores, weight):
        found = Output(scores[..., None], pairs=Pairs(jnp.asarray(above), jnp.asarray(~above), weight))
        return training_loss(found, jnp.asarray(labels)[..., None], jnp.asarray(mask)[..., None])[0]

    found = in_float64(lambda s: (loss(s, 0.5) - loss(s, 0.0), jax.grad(loss)(s, 0.5)))(scores)
    np.testing.assert_allclose(found[0], 0.5 * np.mean(each), rtol=1e-9)
    assert np.isfinite(found[1]).all() and not found[1][1, 1]


def test_other_schemas_are_refused_with_their_mend():
    schema = promo_schema(D, V, PromoConfig(users=K))
    inputs = random_inputs(schema, 2, 2)
    assert inputs.candidates.fields[NETWORK].shape == (2, 2, D * D + D)
    with pytest.raises(
        ValueError, match="'promo_best' should have width 30 .* has width 18; make it with promo_schema"
    ):
        count(PROMO, schema)
    with pytest.raises(ValueError, match="'promo_network' should have width 84"):
        count(PROMO, schema, dict(users=K, layers=2))
    with pytest.raises(ValueError, match="no vectors of a frozen base"):
        count(PROMO, Schema((Field("item", "candidate", 4, 10),)))
    with pytest.raises(ValueError, match="PROMO scores one label, and the schema has click, buy"):
        count(PROMO, dataclasses.replace(schema, tasks=(Task("click"), Task("buy"))), dict(users=K))
    with pytest.raises(ValueError, match="no such field"):
        count(PROMO, dataclasses.replace(schema, fields=schema.fields[:-1]), dict(users=K))
    for bad in (dict(lambda1=-1.0), dict(lambda2=-1.0)):
        with pytest.raises(ValueError, match="lambda1 and lambda2 are"):
            PromoConfig(**bad)
    for kind, bad in ((PromoConfig, "users"), (PromoConfig, "layers"), (TwoTowerConfig, "hidden")):
        with pytest.raises(ValueError, match=f"{bad} is .*0"):
            kind(**{bad: (0,) if bad == "hidden" else 0})
    with pytest.raises(ValueError, match="width is 0"):  # one number is the constant
        TwoTowerConfig(width=1)
    assert TwoTowerConfig(width=2).width == 2
    assert vars(PromoConfig()) == dict(
        users=5, layers=1, generator="table", activation="relu", lambda1=0.1, lambda2=0.1
    )
    assert vars(TwoTowerConfig()) == dict(width=16, hidden=(32,))
    groups = [(field.name.removeprefix("promo_"), field.group) for field in schema.fields]
    kinds = dict(user="base", item="base", best="lists", worst="lists", cold="lists", network="network")
    assert groups == list(kinds.items())
