"""Sum pooling and DIN: equations, counts, masks; and how the tokens of any encoder meet any backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models import build, count, registry
from recscale.models.baselines import din, sum_pooling
from recscale.models.inputs import Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.models.ranker import Backbone
from recscale.scaling.counting.abstract import tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

ENCODERS = ("sum_pooling", "din")


def encoder_of(name, schema, **config):
    module = {"din": din.DIN_SPEC, "sum_pooling": sum_pooling.SUM_POOLING}[name]
    return module.build(registry.freeze_config(name, dict(encoder=config))[0], schema, rngs=nnx.Rngs(0))


def with_lengths(inputs, *lengths):
    history = inputs.user.histories["clicks"]
    valid = np.arange(history.events.shape[1])[None] < np.asarray(lengths)[:, None]
    rng = np.random.default_rng(5)
    events = jnp.asarray(rng.standard_normal(history.events.shape) * valid[..., None], jnp.float32)
    ages = None
    if history.delta_s is not None:
        ages = jnp.asarray(np.cumsum(rng.integers(1, 10**5, valid.shape), axis=1) * valid, jnp.int32)
    changed = history.replace(events=events, length=jnp.asarray(lengths, jnp.int32), delta_s=ages)
    return inputs.replace(user=inputs.user.replace(histories={"clicks": changed}))


def padded(inputs, extra):
    """`extra` more columns of random values beyond the length."""
    history = inputs.user.histories["clicks"]
    rng = np.random.default_rng(7)
    requests, columns, width = history.events.shape
    junk = jnp.asarray(rng.standard_normal((requests, extra, width)), jnp.float32)
    ages = history.delta_s
    if ages is not None:
        ages = jnp.concatenate([ages, jnp.asarray(rng.integers(0, 9, (requests, extra)), jnp.int32)], axis=1)
    changed = history.replace(events=jnp.concatenate([history.events, junk], axis=1), delta_s=ages)
    return inputs.replace(user=inputs.user.replace(histories={"clicks": changed}))


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_sum_pooling(full_schema, pool):
    schema = full_schema(timestamps=False)
    inputs = with_lengths(random_inputs(schema, 3, 2), 0, 2, 7)
    tokens = encoder_of("sum_pooling", schema, pool=pool)(inputs)
    assert tokens.candidate is None and tokens.user.shape == (3, 1, 12)
    expected = np.asarray(inputs.user.histories["clicks"].events).sum(1)
    expected = expected / np.asarray([1, 2, 7])[:, None] if pool == "mean" else expected
    np.testing.assert_allclose(tokens.user[:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softmax", [False, True])
def test_din_follows_its_equation(full_schema, softmax):
    schema = full_schema(timestamps=False)
    inputs = with_lengths(random_inputs(schema, 3, 2), 0, 2, 7)
    encoder = encoder_of("din", schema, softmax=softmax, hidden=(5, 4))
    encoder.bias[...] = jnp.arange(5, dtype=jnp.float32) / 10
    tokens = encoder(inputs)
    assert tokens.user is None and tokens.candidate.shape == (3, 2, 1, 12)
    fields, events = inputs.candidates.fields, np.asarray(inputs.user.histories["clicks"].events)
    x = np.concatenate([fields["item"], fields["shop"], np.zeros((3, 2, 2))], axis=-1)
    for r, length in enumerate((0, 2, 7)):
        for c in range(2):
            e = events[r, :length]
            wide = np.broadcast_to(x[r, c], e.shape)
            h = np.concatenate([e, wide, e - wide, e * wide], axis=-1) @ np.asarray(encoder.kernel[...])
            h = np.maximum(h + np.asarray(encoder.bias[...]), 0)
            h = np.maximum(h @ np.asarray(encoder.second.kernel[...]) + np.asarray(encoder.second.bias[...]), 0)
            a = (h @ np.asarray(encoder.out.kernel[...]) + np.asarray(encoder.out.bias[...]))[:, 0]
            a = np.exp(a) / np.exp(a).sum() if softmax else a
            np.testing.assert_allclose(tokens.candidate[r, c, 0], a @ e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, config",
    [
        ("sum_pooling", {}),
        ("sum_pooling", dict(pool="mean", recent=3)),
        ("sum_pooling", dict(time_feature="none")),
        ("din", {}),
        ("din", dict(candidate="project", softmax=True, hidden=(7, 5))),
        ("din", dict(recent=3, time_feature="none", activation="silu", init="xavier_normal")),
    ],
    ids=str,
)
def test_every_flag_counts(schema, name, config):
    graph, state = nnx.split(nnx.eval_shape(lambda: encoder_of(name, schema, **config)))
    spec = {"din": din.DIN_SPEC, "sum_pooling": sum_pooling.SUM_POOLING}[name]
    frozen = registry.freeze_config(name, dict(encoder=config))[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == spec.count_params(frozen, schema).dense
    inputs = random_inputs(schema, 2, 3)
    flops = spec.count_flops(frozen, schema)
    assert count_flops(lambda s, u: nnx.merge(graph, s).encode_user(u).cache, state, inputs.user) == 2 * flops.user
    total = count_flops(lambda s, i: nnx.merge(graph, s)(i), state, inputs)
    assert total == 2 * flops.user + 6 * flops.candidate
    shape, tokens = spec.token_shape(frozen, schema), jax.jit(lambda i: encoder_of(name, schema, **config)(i))(inputs)
    for found, expected in ((tokens.user, shape.user), (tokens.candidate, shape.candidate)):
        assert (0 if found is None else found.shape[-2]) == expected
        assert found is None or found.shape[-1] == shape.width


def test_published_form_of_din(full_schema):
    schema = full_schema(timestamps=False)
    A, S, F1, F2 = 12, 7, 80, 40
    flops = din.count_flops(din.DINConfig(), schema)
    assert flops.user == 2 * S * A * F1
    assert flops.candidate == 2 * A * F1 + S * (2 * A * F1 + 2 * F1 * F2 + 2 * F2) + 2 * S * A
    assert din.count_params(din.DINConfig(), schema).dense == 4 * A * F1 + F1 + F1 * F2 + F2 + F2 + 1


@pytest.mark.parametrize("name", ENCODERS)
def test_columns_beyond_the_length_change_nothing(schema, full_schema, name):
    config = dict(backbone=dict(widths=(8,)))
    model = build(name, full_schema(events=7 + 9), config, rngs=nnx.Rngs(0))
    forward = jax.jit(lambda i: model(i).logits)
    inputs = with_lengths(random_inputs(schema, 5, 2), 0, 1, 3, 6, 7)
    logits = forward(inputs)
    assert jnp.isfinite(logits).all()
    for extra in (1, 9):
        np.testing.assert_allclose(forward(padded(inputs, extra)), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_order_is_invisible_without_time(full_schema, name):
    schema = full_schema(timestamps=False)
    encoder = encoder_of(name, schema)
    inputs = with_lengths(random_inputs(schema, 2, 2), 7, 7)
    history = inputs.user.histories["clicks"]
    turned = history.replace(events=history.events[:, ::-1])
    backwards = inputs.replace(user=inputs.user.replace(histories={"clicks": turned}))
    for a, b in zip(encoder(inputs), encoder(backwards), strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_recent_is_the_shortened_history(schema, name):
    short = schema.with_history_length(3)
    inputs = with_lengths(random_inputs(schema, 2, 2), 7, 2)
    history = inputs.user.histories["clicks"]
    cut = history.replace(
        events=history.events[:, :3], delta_s=history.delta_s[:, :3], length=jnp.minimum(history.length, 3)
    )
    expected = encoder_of(name, short)(inputs.replace(user=inputs.user.replace(histories={"clicks": cut})))
    for a, b in zip(encoder_of(name, schema, recent=3)(inputs), expected, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Every pair; those with neither DIN nor RankMixer in the slow stage.
PAIRS = [
    pytest.param(encoder, backbone, marks=() if encoder == "din" or backbone == "rankmixer" else pytest.mark.slow)
    for encoder in registry.list_models("encoder")
    for backbone in registry.list_models("backbone")
]


@pytest.mark.parametrize(("encoder", "backbone"), PAIRS)
def test_any_encoder_meets_any_backbone(schema, encoder, backbone):
    name = f"{encoder}+{backbone}"
    config = dict(backbone=dict(tower=(4,)))
    model = nnx.eval_shape(lambda: build(name, schema, config, rngs=nnx.Rngs(0)))
    assert isinstance(model.backbone, Backbone)
    graph, state = nnx.split(model)
    out = jax.eval_shape(lambda s, i: nnx.merge(graph, s)(i).logits, state, random_inputs(schema, 2, 3))
    assert out.shape == (2, 3, 2) and out.dtype == jnp.float32
    assert tree_params(model) == count(name, schema, config).dense_params


def test_history_tokens_count_in_t(schema):
    config = dict(backbone=dict(tokens=6, width=12))
    model = nnx.eval_shape(lambda: build("din+rankmixer", schema, config, rngs=nnx.Rngs(0)))
    assert model.backbone.tokenizer.plan.tokens == 6 == model.backbone.blocks[0].ffn.up.kernel.shape[0]


@pytest.mark.parametrize("name", [*registry.list_models("encoder"), "hyformer", "mixformer", "onetrans_lite"])
def test_no_events_is_no_setting(schema, name):
    """0 must not be read as "not set"."""
    config = dict(recent=0)
    with pytest.raises(ValueError, match="recent is 0, expected at least 1 event"):
        count(name, schema, config if name in registry.list_models("ranker") else dict(encoder=config))


def test_a_candidate_without_a_partner_is_refused():
    schema = Schema((Field("item", "candidate", 4, 10),), (Sequence("h", 3, (Field("e", "user", 4, 10),)),))
    with pytest.raises(ValueError, match="use candidate='project'"):
        build("din", schema, rngs=nnx.Rngs(0))
    assert build("din", schema, dict(encoder=dict(candidate="project")), rngs=nnx.Rngs(0))
