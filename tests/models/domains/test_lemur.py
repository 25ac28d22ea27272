"""LEMUR: what the encoders learn from, what the bank is given and when, and what serving never computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count
from recscale.models.domains.content_encoder import ContentEncoder, ContentEncoderOptions
from recscale.models.domains.lemur import Lemur, LemurConfig
from recscale.models.inputs.batch import Contrast, Output
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.losses import contrastive_loss, training_loss
from recscale.scaling.counting.jaxpr_flops import count_flops

SMALL = dict(tokens=8, width=8, hidden=8, layers=1, content_width=8, encoder_heads=2, encoder_hidden=8,
             query_layers=1, document_layers=2, bank_dtype="float32")  # fmt: skip
EVERYTHING = dict(encode_fraction=1.0, backward_fraction=1.0)
R, C = 4, 3
KEY = jax.random.key(3)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn(make):
    """(graph, parameters, everything else) of a module, initialised without a compiler."""
    graph = nnx.split(nnx.eval_shape(make))[0]
    return graph, *in_float64(lambda: nnx.split(make(), nnx.Param, ...)[1:])()


def split(schema, **flags):
    return drawn(lambda: build("lemur", schema, SMALL | flags, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def inputs(schema):
    """Distinct items, so that a place of the batch is an item; requests 0 and 3 ask the same."""
    found = random_inputs(schema, R, C, seed=1)
    ids = jnp.asarray(np.random.default_rng(2).permutation(40)[: R * C].reshape(R, C), jnp.int32)
    content = found.candidates.content.replace(ids=ids)
    asked = found.user.content.replace(query=jnp.asarray([7, 8, 9, 7], jnp.int32))
    return found.replace(candidates=found.candidates.replace(content=content), user=found.user.replace(content=asked))


LABELS = jnp.asarray(np.arange(R * C * 2).reshape(R, C, 2) % 3 == 0, jnp.float32)


def step(graph, rate=0.1):
    """(parameters, other) -> (new ones, loss, gradients, stats): a plain gradient step on both losses."""

    def loss(params, other, inputs, key):
        model = nnx.merge(graph, params, other, copy=True)
        output = model(inputs, key=key)
        return training_loss(output, LABELS, jnp.ones_like(LABELS))[0], (nnx.split(model, nnx.Param, ...)[2], output)

    def take(params, other, inputs, key):
        (value, (other, output)), grads = jax.value_and_grad(loss, has_aux=True)(params, other, inputs, key)
        model = nnx.merge(graph, params, other, copy=True)
        model.settle(output.pending, jnp.asarray(True))
        other = nnx.split(model, nnx.Param, ...)[2]
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), other, value, grads, output.stats

    return in_float64(take)


def documents(params):
    return jax.tree.leaves(params["document"])


def test_contrast_equals_a_double_loop():
    scores, asked = 3 * normal(R, R, C), np.asarray([7, 8, 9, 7])
    clicked = LABELS[..., 0] > 0
    negative = jnp.broadcast_to((asked[:, None] != asked[None])[:, :, None], (R, R, C))

    def naive(reduce, only):
        each = []
        for r, c in np.argwhere(clicked):
            others = [scores[r, a, b] for a in range(R) for b in range(C)
                      if asked[a] != asked[r] and (clicked[a, b] or not only)]  # fmt: skip
            own = float(scores[r, r, c])
            each.append(np.log(np.exp(own) + np.exp(others).sum()) - own)
        return reduce(each)

    loss = in_float64(contrastive_loss)
    for mean, only in ((True, False), (False, True)):
        found = loss(Contrast(scores, negative, 1.0, only, mean), clicked)
        assert found == pytest.approx(naive(np.mean if mean else np.sum, only), rel=1e-5)
    flat = loss(Contrast(0 * scores, negative, 1.0, False, True), jnp.eye(R, C, dtype=bool))
    sizes = [1 + C * int((asked != a).sum()) for a in asked[:3]]
    assert flat == pytest.approx(np.log(sizes).mean(), rel=1e-6)
    gradient = in_float64(jax.grad(lambda s: contrastive_loss(Contrast(s, negative, 1.0), clicked)))(scores)
    own = gradient[np.arange(R), np.arange(R)]
    np.testing.assert_array_equal(own != 0, clicked)  # other candidates of the request are no negatives


def test_one_query_alone_has_no_contrast():
    scores = normal(2, 2, C)
    nothing = Contrast(scores, jnp.zeros((2, 2, C), bool), 1.0)
    clicked = LABELS[:2, :, 0] > 0
    graded = jax.value_and_grad(lambda s: contrastive_loss(nothing.replace(scores=s), clicked))
    loss, gradient = in_float64(graded)(scores)
    assert loss == 0 and not np.abs(gradient).max()
    output = Output(jnp.zeros((2, C, 2)), contrast=nothing.replace(scores=jnp.nan * scores))
    # Nothing is observed, so nothing is clicked: whatever the scores are.
    assert in_float64(training_loss)(output, LABELS[:2], jnp.zeros_like(LABELS[:2]))[0] == 0


def test_an_encoder_ignores_padding_wherever_it_stands():
    options = ContentEncoderOptions(content_width=8, encoder_heads=2)
    graph, *state = drawn(lambda: ContentEncoder(9, (3, 2), 2, options, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray([[4, 5, 0, 6, 0], [4, 0, 5, 0, 6], [4, 5, 6, 0, 0], [0, 0, 0, 0, 0]], jnp.int32)
    found = in_float64(lambda *state: nnx.merge(graph, *state)(tokens))(*state)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    assert np.abs(found[0] - found[2]).max() > 1e-3  # the segment counts
    assert np.isfinite(found).all()


def test_the_bank_is_written_with_the_old_parameters(schema, inputs):
    graph, params, other = split(schema, encode_fraction=0.5, backward_fraction=0.25)
    new, after, *_, stats = step(graph)(params, other, inputs, KEY)
    bank, steps = after["bank"]["vectors"][...], np.asarray(after["bank"]["steps"][...])
    written = np.flatnonzero(steps >= 0)
    assert len(written) == R * C // 2 and set(written) <= set(np.ravel(inputs.candidates.content.ids))
    assert after["now"][...] == 1 and (steps[written] == 0).all()
    tokens = {int(i): t for i, t in zip(np.ravel(inputs.candidates.content.ids),
                                       inputs.candidates.content.tokens.reshape(R * C, -1), strict=True)}  # fmt: skip
    given = jnp.stack([tokens[int(i)] for i in written])
    encoded = in_float64(lambda p: nnx.merge(graph, p, other).document(given))
    old, moved = map(encoded, (params, new))
    np.testing.assert_allclose(bank[written], old, rtol=1e-12)
    assert np.abs(bank[written] - moved).max() > 1e-3
    assert not np.abs(np.delete(np.asarray(bank), written, axis=0)).max()
    assert float(stats["bank/coverage_targets"]) == 0
    # A second step with another sample leaves what it does not encode as it was.
    _, again, *_ = step(graph)(params, after, inputs, jax.random.key(4))
    kept = np.asarray(again["bank"]["steps"][...]) == 0
    assert 0 < kept.sum() < len(written)
    np.testing.assert_array_equal(again["bank"]["vectors"][...][kept], bank[kept])


def test_at_rate_zero_what_is_read_is_what_would_be_encoded(schema, inputs):
    graph, params, other = split(schema, **EVERYTHING)
    take = step(graph, rate=0.0)
    _, other, *_ = take(params, other, inputs, KEY)
    *_, stats = take(params, other, inputs, KEY)
    assert stats["bank/cosine"] == pytest.approx(1, abs=1e-12) and stats["bank/error"] < 1e-12
    assert stats["bank/coverage_targets"] == 1 and stats["bank/cosine_age1"] == pytest.approx(1, abs=1e-12)


def test_only_the_sample_with_gradient_trains_the_encoder(schema, inputs):
    def gradient(**flags):
        graph, params, other = split(schema, **flags)
        return documents(step(graph)(params, other, inputs, KEY)[3])

    assert not any(np.abs(leaf).max() for leaf in gradient(encode_fraction=0.5, backward_fraction=0.0))
    # With reads of the others as constants: the sample's first rows alone decide.
    graph, params, other = split(schema, encode_fraction=0.5, backward_fraction=0.25)
    weights, content = jnp.arange(1.0, 7.0), inputs.candidates.content

    def sampled(params):
        fresh = nnx.merge(graph, params, other)._encode(content, KEY)
        return fresh.vectors.sum(axis=1) @ weights, fresh

    def all_of_them(params, tokens):
        return nnx.merge(graph, params, other).document(tokens).sum(axis=1) @ weights

    (_, fresh), ours = in_float64(jax.value_and_grad(sampled, has_aux=True))(params)
    assert fresh.ids.shape == (6,) and (np.diff(fresh.ids) > 0).all()
    whole = in_float64(jax.grad(all_of_them))(params, fresh.tokens)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(documents(ours), documents(whole), strict=True))


def test_the_encoder_learns_as_if_all_other_rows_were_constants(schema, inputs, monkeypatch):
    """Of six encoded rows three with gradient: the same as all six with gradient and three replaced by their values."""
    flags = dict(encode_fraction=0.5, backward_fraction=0.25)
    graph, params, other = split(schema, **flags)
    expected = step(graph)(params, other, inputs, KEY)

    def encoded(**flags):
        graph = split(schema, **flags)[0]
        return in_float64(lambda p: nnx.merge(graph, p, other)._encode(inputs.candidates.content, KEY))(params)

    values, trained = encoded(**flags).vectors, encoded(encode_fraction=0.25, backward_fraction=0.25).ids
    plain = Lemur._encode

    def with_constants(self, items, key):
        fresh = plain(self, items, key)
        return fresh._replace(vectors=jnp.where(jnp.isin(fresh.ids, trained)[:, None], fresh.vectors, values))

    monkeypatch.setattr(Lemur, "_encode", with_constants)
    everything = split(schema, encode_fraction=0.5, backward_fraction=0.5)[0]
    found = step(everything)(params, other, inputs, KEY)
    # What stands in a program as a constant is rounded to float32.
    assert found[2] == pytest.approx(float(expected[2]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(found[3]), jax.tree.leaves(expected[3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_everything_encoded_is_plain_joint_training(schema, inputs):
    """p = q = 1: losses and gradients of encoding every candidate where it stands, whatever the bank holds."""
    graph, params, other = split(schema, reader_layers=0, similarity=False, tokens=6, width=12, **EVERYTHING)

    def plain(params):
        model = nnx.merge(graph, params, other, copy=True)
        content = inputs.candidates.content
        state = model.encode_user(inputs.user)
        target = model.document(content.tokens.reshape(R * C, -1)).reshape(R, C, -1)
        output = model.backbone.score(state.backbone, inputs.candidates, target[:, :, None])
        output = output.replace(contrast=model._contrast(state, content, target))
        return training_loss(output, LABELS, jnp.ones_like(LABELS))[0]

    expected, grads = in_float64(jax.value_and_grad(plain))(params)
    *_, loss, found, _ = step(graph)(params, other, inputs, KEY)
    assert loss == pytest.approx(float(expected), rel=1e-12)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def contractions(function, *args):
    return count_flops(function, *args)


def test_serving_and_p_zero_run_no_document_encoder(schema, inputs):
    graph, params, other = split(schema, encode_fraction=0.0, backward_fraction=0.0)
    served = count("lemur", schema, SMALL | dict(encode_fraction=0.0, backward_fraction=0.0))

    def logits(key):
        return lambda p, o: nnx.merge(graph, p, o, copy=True)(inputs, key=key).logits

    once = R * served.forward_flops_user + R * C * served.forward_flops_candidate
    assert contractions(logits(None), params, other) == once
    assert contractions(logits(KEY), params, other) == once + 2 * 8 * R * R * C  # SQDC's product
    everything = split(schema, **EVERYTHING)[0]
    assert contractions(lambda p, o: nnx.merge(everything, p, o)(inputs).logits, params, other) == once


def test_one_item_in_every_row_is_encoded_once_and_seen_by_all(schema, inputs):
    graph, params, other = split(schema, encode_fraction=0.25, backward_fraction=0.25)
    content = inputs.candidates.content
    same = content.replace(ids=jnp.full((R, C), 5), tokens=jnp.broadcast_to(content.tokens[0, 0], content.tokens.shape))
    repeated = inputs.replace(candidates=inputs.candidates.replace(content=same))
    fresh = in_float64(lambda p: nnx.merge(graph, p, other)._encode(same, KEY))(params)
    assert fresh.vectors.shape[0] == 3 and (fresh.ids == 5).sum() == 1
    _, after, *_ = step(graph)(params, other, repeated, KEY)
    assert np.flatnonzero(np.asarray(after["bank"]["steps"][...]) >= 0).tolist() == [5]


def test_the_order_of_rows_changes_nothing_but_order(schema, inputs):
    graph, params, other = split(schema, encode_fraction=0.5, backward_fraction=0.5)
    order = np.asarray([2, 0, 3, 1])
    turned = jax.tree.map(lambda x: x[order], inputs)

    @in_float64
    def run(params, other, inputs):
        model = nnx.merge(graph, params, other, copy=True)
        output = model(inputs, key=KEY)
        model.settle(output.pending, jnp.asarray(True))
        return output.logits, model.bank.vectors[...]

    (plain, bank), (permuted, again) = (run(params, other, each) for each in (inputs, turned))
    np.testing.assert_allclose(permuted, plain[order], rtol=1e-9)
    np.testing.assert_allclose(again, bank, rtol=1e-9)


def test_evaluation_changes_nothing_and_padded_items_are_never_written(schema, inputs):
    graph, params, other = split(schema, **EVERYTHING)

    @in_float64
    def evaluated(params, other):
        model = nnx.merge(graph, params, other, copy=True)
        found = model(inputs).logits
        model.probe(jnp.arange(3), inputs.candidates.content.tokens[0], jnp.zeros(3, jnp.int32), 1)
        return found, nnx.split(model, nnx.Param, ...)[2]

    jax.tree.map(np.testing.assert_array_equal, evaluated(params, other)[1], other)
    content = inputs.candidates.content.replace(ids=inputs.candidates.content.ids.at[1].set(-1))
    _, after, *_ = step(graph)(
        params, other, inputs.replace(candidates=inputs.candidates.replace(content=content)), KEY
    )
    assert (np.asarray(after["bank"]["steps"][...]) >= 0).sum() == R * C - C


@pytest.mark.parametrize("predictor", ["linear", "lstm"])
def test_a_forecast_starts_as_the_last_vector_and_never_trains_the_encoder(schema, inputs, predictor):
    """The second step is the first that reads anything, and knows one vector of each: gradients are those of "none"."""
    found = {}
    for name in ("none", predictor):
        graph, *state = split(schema, predictor=name, **EVERYTHING)
        for k in range(3):
            *state, loss, gradients, stats = step(graph)(*state, inputs, jax.random.fold_in(KEY, k))
            found[name, k] = gradients["document"], stats
    for a, b in zip(*(jax.tree.leaves(found[name, 1][0]) for name in ("none", predictor)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    held, guessed = (
        found[predictor, k][1]["bank/forecast_error"] - found[predictor, k][1]["bank/error"] for k in (1, 2)
    )
    assert abs(held) < 1e-12 < abs(guessed)


def test_an_averaged_encoder_writes_other_vectors(schema, inputs):
    banks = []
    for name in ("none", "ema"):
        graph, *state = split(schema, predictor=name, **EVERYTHING)
        for k in range(2):
            *state, loss, _, _ = step(graph)(*state, inputs, jax.random.fold_in(KEY, k))
        assert np.isfinite(loss)
        banks.append(np.asarray(state[1]["bank"]["vectors"][...]))
    assert np.abs(banks[0] - banks[1]).max() > 1e-4


VARIANTS = [
    dict(sample_order="missing_first", sqdc_reduce="sum", sqdc_negatives="clicked"),
    dict(mask_same_item=True, session_mask=False, join_gradient=True),
    dict(reader_layers=0, similarity=False, tokens=6, width=12),
    dict(sqdc_weight=0.0),
    dict(ranking_gradient=False),
    dict(predictor="lstm", snapshot_rows=5, bank_dtype="bfloat16"),
]


@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_every_flag_builds_and_counts(schema, check_variant, flags):
    check_variant("lemur", schema, SMALL | flags)


@pytest.mark.slow
@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_every_flag_runs(schema, inputs, flags):
    graph, params, other = split(schema, **flags)
    assert np.isfinite(step(graph)(params, other, inputs, KEY)[2])


def test_flags_and_schemas_that_do_not_fit_are_named(schema, inputs):
    for message, flags in (
        ("0 <= backward_fraction <= encode_fraction", dict(encode_fraction=0.1)),
        ("leave no loss that trains the encoders", dict(sqdc_weight=0.0, ranking_gradient=False)),
        ("there is no SQDC loss", dict(sqdc_weight=0.0, sqdc_scale=3.0)),
        ("one snapshot is kept", dict(snapshot_rows=3)),
        ("nothing is averaged", dict(ema_decay=0.5)),
    ):
        with pytest.raises(ValueError, match=message):
            LemurConfig(**flags)
    with pytest.raises(ValueError, match="preset `content` has some"):
        count("lemur", dataclasses.replace(schema, content=None), SMALL)
    graph, *state = split(schema)
    bare = inputs.replace(user=inputs.user.replace(content=None))
    for given in (bare, inputs.replace(candidates=inputs.candidates.replace(content=None))):
        with pytest.raises(ValueError, match="the inputs carry no content"):
            jax.eval_shape(lambda given, *state: nnx.merge(graph, *state)(given).logits, given, *state)
