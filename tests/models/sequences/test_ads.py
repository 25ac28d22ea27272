"""ADS: the plain scorer at its start, the equations, where the domain acts, chunks, padding, golden counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count, freeze_config
from recscale.models.baselines import din
from recscale.models.inputs import Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.models.sequences.ads import ADS_SPEC, ADSConfig
from recscale.models.sequences.ads_scorers import can_params
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

R, C, S, A = 3, 2, 5, 6
LENGTHS = (0, 2, S)
SMALL = dict(width=8, head_dim=4, gen_hidden=3, hidden=(5, 4), micro=(3, 2))


def small_schema(columns=S, domains=1, dense=False, timestamps=False):
    def ids(name, side, width, table=None):
        return Field(name, side, width, None if dense else 50, table=table)

    fields = (ids("u", "user", 3), Field("age", "user", 2), ids("x", "candidate", A, "items"), Field("y", "cross", 2))
    events = (ids("e", "user", A, "items"),)
    return Schema(fields, (Sequence("clicks", columns, events, timestamps),), domains=domains)


def build_of(schema, **config):
    return ADS_SPEC.build(ADSConfig(**SMALL | config), schema, rngs=nnx.Rngs(0))


@functools.cache
def encoder_of(schema=None, **config):
    """An encoder whose parameters are all random, the generators too; nothing is compiled for them."""
    return filled(lambda: build_of(schema or small_schema(), **config))


def with_lengths(inputs, *lengths, extra=0):
    """Histories of the given lengths and `extra` more columns; everything beyond a length is random."""
    old = inputs.user.histories["clicks"]
    valid = np.arange(S + extra)[None] < np.asarray(lengths)[:, None]
    real = np.pad(np.random.default_rng(3).standard_normal((R, S, A)), [(0, 0), (0, extra), (0, 0)])
    events = np.where(valid[..., None], real, np.random.default_rng(9).standard_normal((R, S + extra, A)))
    made = old.replace(events=jnp.asarray(events, jnp.float32), length=jnp.asarray(lengths, jnp.int32))
    return inputs.replace(user=inputs.user.replace(histories={"clicks": made}))


@pytest.fixture(scope="module")
def inputs():
    return with_lengths(random_inputs(small_schema(), R, C), *LENGTHS)


def token_of(encoder, inputs):
    tokens = in_float64(lambda i: tuple(encoder(i)))(inputs)
    assert tokens[0] is None and tokens[1].shape[:3] == (R, C, 1)
    return tokens[1][:, :, 0]


# ---- the start


@pytest.mark.slow
@pytest.mark.parametrize("domain_side", ["request", "candidate"])
def test_starts_as_plain_attention(inputs, domain_side):
    encoder = build_of(small_schema(), domain_side=domain_side)
    found, scorer = token_of(encoder, inputs), encoder.scorer
    events = np.asarray(inputs.user.histories["clicks"].events, np.float64)
    fields = inputs.candidates.fields
    x = np.concatenate([fields["x"], fields["y"]], axis=-1).astype(np.float64)
    W_Q, W_K, W_V = (np.asarray(getattr(scorer, n).kernel[...], np.float64) for n in ("query", "key", "value"))
    for r, length in enumerate(LENGTHS):
        for c in range(C):
            e = events[r, :length]
            q, k, v = (m.reshape(-1, 2, 4) for m in (x[r, c][None] @ W_Q, e @ W_K, e @ W_V))
            scores = np.exp(np.einsum("shd,shd->sh", np.broadcast_to(q, k.shape), k) / 2)
            expected = np.einsum("sh,shd->hd", scores / scores.sum(0) if length else scores, v)
            np.testing.assert_allclose(found[r, c], expected.reshape(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_starts_as_plain_din(inputs):
    encoder = build_of(small_schema(), scorer="din")
    config = din.DINConfig(hidden=(5, 4), candidate="project")
    plain = din.DIN_SPEC.build(config, small_schema(), rngs=nnx.Rngs(1))
    pairs = [(plain.kernel, encoder.scorer.kernel), (plain.bias, encoder.scorer.bias)]
    for name in ("second", "out"):
        pairs += [
            (getattr(getattr(plain, name), n), getattr(getattr(encoder.scorer, name), n)) for n in ("kernel", "bias")
        ]
    pairs += [(getattr(plain.project, n), getattr(encoder.project, n)) for n in ("kernel", "bias")]
    for to, source in pairs:
        to[...] = source[...]
    np.testing.assert_allclose(token_of(encoder, inputs), token_of(plain, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_generators_off_is_the_same_start(inputs):
    for scorer in ("mha", "din", "can"):
        whole, plain = (
            build_of(small_schema(), scorer=scorer),
            build_of(small_schema(), scorer=scorer, psrg=False, pcrg=False),
        )
        graph, _ = nnx.split(plain)
        state = {"scorer": nnx.split(whole.scorer)[1]} | (
            {"project": nnx.split(whole.project)[1]} if whole.project else {}
        )
        nnx.update(plain, nnx.State(state))
        np.testing.assert_allclose(token_of(whole, inputs), token_of(plain, inputs), rtol=1e-5, atol=1e-6)


# ---- the equations, parameters random


def generated(generator, x):
    hidden = np.maximum(x @ np.asarray(generator.hidden.kernel[...]) + np.asarray(generator.hidden.bias[...]), 0)
    return hidden @ np.asarray(generator.out.kernel[...]) + np.asarray(generator.out.bias[...])


def projected_and_queries(encoder, inputs, r, c, chunk, domain_side):
    """e' [S, A] and x' [S, A_q] of one request and candidate."""
    fields, user = inputs.candidates.fields, inputs.user.fields
    x = np.concatenate([fields["x"], fields["y"]], axis=-1)[r, c]
    domain = np.concatenate([user["u"], user["age"]], axis=-1)[r] if domain_side == "request" else x
    if encoder.project is not None:
        x = x @ np.asarray(encoder.project.kernel[...]) + np.asarray(encoder.project.bias[...])
    psrg = encoder.events
    private = 1 / (1 + np.exp(-generated(psrg.private, domain).reshape(A, A)))
    e = np.asarray(inputs.user.histories["clicks"].events)[r] @ (2.0 * np.asarray(psrg.shared[...]) * private)
    e = e + generated(psrg.bias, domain)
    p = generated(encoder.queries, np.concatenate([domain, x])).reshape(-1, x.shape[-1])
    return e, x + p[np.arange(S) // chunk]


def mha(scorer, e, x):
    q, k, v = (
        (m @ np.asarray(getattr(scorer, n).kernel[...])).reshape(len(m), 2, 4)
        for n, m in (("query", x), ("key", e), ("value", e))
    )
    z = np.exp((q * k).sum(-1) / 2)
    return np.einsum("sh,shd->hd", z / z.sum(0) if len(e) else z, v).reshape(-1)


def din_unit(scorer, e, x):
    h = np.concatenate([e, x, e - x, e * x], axis=-1) @ np.asarray(scorer.kernel[...]) + np.asarray(scorer.bias[...])
    h = np.maximum(np.maximum(h, 0) @ np.asarray(scorer.second.kernel[...]) + np.asarray(scorer.second.bias[...]), 0)
    return (h @ np.asarray(scorer.out.kernel[...]) + np.asarray(scorer.out.bias[...]))[:, 0] @ e


def can(scorer, e, x):
    total = np.zeros(5)
    for event, weights in zip(e, x, strict=True):
        first = np.tanh(event @ weights[:18].reshape(A, 3) + weights[18:21])
        second = np.tanh(first @ weights[21:27].reshape(3, 2) + weights[27:29])
        total += np.concatenate([first, second])
    return total


@pytest.mark.parametrize(("scorer", "unit"), [("mha", mha), ("din", din_unit), ("can", can)], ids=["mha", "din", "can"])
@pytest.mark.parametrize(("chunk", "domain_side"), [(1, "request"), (2, "candidate")])
def test_equations(inputs, scorer, unit, chunk, domain_side):
    encoder = encoder_of(scorer=scorer, chunk=chunk, domain_side=domain_side)
    found = token_of(encoder, inputs)
    for r, length in enumerate(LENGTHS):
        for c in range(C):
            e, x = projected_and_queries(encoder, inputs, r, c, chunk, domain_side)
            expected = unit(encoder.scorer, e[:length], x[:length])
            np.testing.assert_allclose(found[r, c], expected, rtol=1e-4, atol=2e-5 * max(1, np.abs(expected).max()))


def test_the_domain_of_a_request(inputs):
    """Its embedding reaches both generators and the event projection stays per request."""
    encoder, domain = encoder_of(small_schema(domains=4)), jnp.asarray([0, 1, 3], jnp.int32)
    made = inputs.replace(user=inputs.user.replace(domain=domain))
    other = made.replace(user=made.user.replace(domain=domain.at[1].set(2)))
    changed = np.abs(np.asarray(token_of(encoder, made) - token_of(encoder, other))).max(axis=(1, 2)) > 1e-6
    np.testing.assert_array_equal(changed, [False, True, False])
    with pytest.raises(ValueError, match="built for 4 domains, and the inputs name none"):
        encoder(inputs)


def test_generators_compute_in_float32(inputs):
    encoder = ADS_SPEC.build(ADSConfig(**SMALL), small_schema(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    low = jax.eval_shape(lambda i: encoder(i).candidate, inputs)
    assert low.dtype == jnp.bfloat16
    assert jax.eval_shape(encoder.events.private, jnp.zeros((R, 5), jnp.bfloat16)).dtype == jnp.float32
    assert jax.eval_shape(encoder.queries, jnp.zeros((R, C, 13), jnp.bfloat16)).dtype == jnp.float32


# ---- lengths, padding, chunks


@pytest.mark.parametrize(
    "config", [dict(), dict(scorer="din", chunk=4), dict(scorer="can", chunk=3, domain_side="candidate")], ids=str
)
def test_columns_beyond_the_length_change_nothing(inputs, config):
    encoder = encoder_of(small_schema(columns=S + 37), **config)
    for lengths in ((0, 1, S - 1), (S, 3, 4)):
        plain = token_of(encoder, with_lengths(inputs, *lengths))
        assert jnp.isfinite(plain).all()
        for extra in (1, 37):
            more = token_of(encoder, with_lengths(inputs, *lengths, extra=extra))
            np.testing.assert_allclose(more, plain, rtol=1e-5, atol=1e-5)


def test_one_chunk_of_everything_is_one_query(inputs):
    """chunk >= S: every event meets the same generated query."""
    encoder = encoder_of(chunk=8)
    assert encoder.plan.chunks == 1
    state = encoder.encode_user(inputs.user).cache
    history = inputs.user.histories["clicks"]
    turned = inputs.user.replace(histories={"clicks": history.replace(events=history.events[:, ::-1])})
    whole = jnp.asarray([S] * R, jnp.int32)
    both = []
    for user in (inputs.user, turned):
        made = user.replace(histories={"clicks": user.histories["clicks"].replace(length=whole)})
        both.append(token_of(encoder, inputs.replace(user=made)))
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)
    assert len(jax.tree.leaves(state)) == 4  # k, v, the mask, the domain vector


def test_state_holds_keys_and_values_only(inputs):
    state = jax.eval_shape(encoder_of().encode_user, inputs.user)
    assert state.tokens is None
    keys, values = state.cache.events
    assert keys.shape == values.shape == (R, S, 2, 4)


# ---- counts


def test_golden_integers():
    events = (Sequence("h", 10, (Field("e", "user", 6, 50),)),)
    schema = Schema((Field("d", "user", 4, 50), Field("x", "candidate", 6, 50)), events)
    config = ADSConfig(width=8, gen_hidden=3, chunk=2, max_length=12)
    flops = ADS_SPEC.count_flops(config, schema)
    assert ADS_SPEC.count_params(config, schema).dense == 555
    assert (flops.user, flops.candidate) == (2_940, 1_076)
    moved = ADS_SPEC.count_flops(dataclasses.replace(config, domain_side="candidate", domain_fields=("x",)), schema)
    wider = 4 * (6 - 4) * 3 + 2 * (6 - 4) * 3  # d_D is 6 there instead of 4
    assert (moved.user, moved.candidate) == (0, 2_940 + 1_076 + wider)


FLAGS = [
    dict(),
    dict(psrg=False, chunk=3),
    dict(pcrg=False, candidate="project"),
    dict(domain_side="candidate", max_length=11),
    dict(domain_fields=("age",), init_generators="glorot", recent=4),
]


@pytest.mark.parametrize("scorer", ["mha", "din", "can"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.slow
def test_every_flag_counts(scorer, flags):
    """Parameters, forward and training FLOPs, with ids and with raw numbers alone."""
    config = dict(encoder=SMALL | flags | dict(scorer=scorer), backbone=dict(widths=(4,)))
    for schema in (small_schema(domains=3, timestamps=True), small_schema(dense=True)):
        counted = count("ads", schema, config)
        assert tree_params(abstract_model("ads", schema, config)) == counted.dense_params
        function, arguments = forward_program("ads", schema, config, 2, 3)
        assert count_flops(function, *arguments) == 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate
        function, arguments = train_program("ads", schema, config, 1, 1)
        assert count_flops(function, *arguments) == counted.train_flops_per_row


# ---- what it refuses


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(scorer="din", candidate="fields"), "needs a query of width 6, the candidate fields have 8"),
        (dict(scorer="can", candidate="fields"), f"query of width {can_params(A, (3, 2))}"),
        (dict(domain_fields=("x",)), "domain_fields names x, which are no request-side fields"),
        (dict(max_length=4), "max_length is 4, but the history has 5 events"),
        (dict(head_dim=3), "width 8 is no multiple of head_dim 3"),
        (dict(chunk=0), "chunk is 0"),
        (dict(chunk=2, pcrg=False), "chunk has no effect without generated queries"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(config, message):
    with pytest.raises(ValueError, match=message):
        ADS_SPEC.count_params(freeze_config("ads", dict(encoder=SMALL | config))[0], small_schema())


def test_a_domain_must_come_from_somewhere():
    schema = small_schema()
    bare = dataclasses.replace(schema, fields=schema.candidate_fields)
    with pytest.raises(ValueError, match="neither domains nor user fields"):
        count("ads", bare)
    assert count("ads", bare, dict(encoder=dict(domain_side="candidate"))).dense_params > 0
    assert count("ads", dataclasses.replace(bare, domains=3)).dense_params > 0
    assert build("ads", bare, dict(encoder=dict(psrg=False, pcrg=False)), rngs=nnx.Rngs(0)).encoder.domain is None
    with pytest.raises(ValueError, match="no sequences"):
        count("ads", dataclasses.replace(schema, sequences=()))
