"""Tokenizers: which fields make which token, what is computed once per request, what contradicts itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.inputs import Field, Schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.history import TokenShape
from recscale.models.inputs.tokenizers import (
    SidePlan,
    Tokenizer,
    TokenizerOptions,
    TokenPlan,
    plan_tokens,
    possible_tokens,
)
from recscale.scaling.counting.jaxpr_flops import count_flops


def even_schema(user=4, candidate=4, width=3):
    sides = ["user"] * user + ["candidate"] * candidate
    return Schema(tuple(Field(f"f{i}", side, width, 10) for i, side in enumerate(sides)))


def tokens_of(schema, width=8, requests=2, candidates=3, sequence=None, **options):
    """All tokens [R, C, T, D], and the pieces they came from."""
    sequence = sequence or TokenShape()
    plan = plan_tokens(schema, TokenizerOptions(**options), width, sequence)
    tokenizer = Tokenizer(plan, width, rngs=nnx.Rngs(0))
    inputs = random_inputs(schema, requests, candidates)
    state = tokenizer.encode_user(inputs.user)
    rows = tokenizer.join(state, tokenizer.candidate_tokens(state, inputs.candidates))
    return plan, tokenizer, inputs, np.asarray(rows).reshape(plan.tokens, requests, candidates, width)


def test_cut_is_one_affine_map_per_run_of_fields():
    schema = even_schema()
    plan, tokenizer, inputs, tokens = tokens_of(schema, tokens=4)
    assert plan.user.runs == (("f0", "f1"), ("f2", "f3")) and plan.candidate.runs == (("f4", "f5"), ("f6", "f7"))
    kernel, bias = np.asarray(tokenizer.user.kernel[...]), np.asarray(tokenizer.user.bias[...])
    piece = np.concatenate([inputs.user.fields["f2"], inputs.user.fields["f3"]], axis=-1)
    np.testing.assert_allclose(tokens[1, :, 0], piece @ kernel[1] + bias[1], rtol=1e-5, atol=1e-6)
    kernel = np.asarray(tokenizer.candidate.kernel[...])
    piece = np.concatenate([inputs.candidates.fields["f6"], inputs.candidates.fields["f7"]], axis=-1)
    np.testing.assert_allclose(tokens[3], piece @ kernel[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(tokens=5),
        dict(tokens=5, user_tokens=2),
        dict(tokens=7, cut_align="exact"),
        dict(tokens=4, tokenizer_shared=True),
        dict(tokens=4, tokenizer_shared=True, tokenizer_hidden=5),
        dict(tokens=6, tokenizer_hidden=5),
        dict(tokens=5, global_token=True),
        dict(tokenizer="group"),
        dict(tokenizer="group", global_token=True, tokenizer_hidden=6),
        dict(tokens=6, global_token="split"),
        dict(tokenizer="group", global_token="split", tokenizer_hidden=6),
        dict(tokenizer="field"),
    ],
    ids=str,
)
def test_closed_forms_and_the_two_sides(schema, options):
    plan = plan_tokens(schema, TokenizerOptions(**options), 8)
    graph, params = nnx.split(nnx.eval_shape(lambda: Tokenizer(plan, 8, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == plan.params(8)
    inputs = random_inputs(schema, 2, 3)

    def encode(params, user):
        return nnx.merge(graph, params).encode_user(user)

    def candidate_tokens(params, state, candidates):
        return nnx.merge(graph, params).candidate_tokens(state, candidates)

    state = jax.eval_shape(encode, params, inputs.user)
    candidate = jax.eval_shape(candidate_tokens, params, state, inputs.candidates)
    assert state.tokens.shape == (plan.user_tokens, 2, 8) and candidate.shape == (plan.candidate_tokens, 2, 3, 8)
    flops = plan.flops(8)
    assert count_flops(encode, params, inputs.user) == 2 * flops.user
    assert count_flops(candidate_tokens, params, state, inputs.candidates) == 6 * flops.candidate


def test_exact_cut_is_the_literal_equal_cut():
    schema = even_schema(user=0, candidate=5, width=3)
    plan, tokenizer, inputs, tokens = tokens_of(schema, tokens=4, cut_align="exact")
    assert plan.candidate.widths == (4, 4, 4, 4)
    x = np.concatenate([inputs.candidates.fields[f"f{i}"] for i in range(5)], axis=-1)
    x = np.pad(x, [(0, 0), (0, 0), (0, 1)])
    for t in range(4):
        expected = x[..., 4 * t : 4 * t + 4] @ np.asarray(tokenizer.candidate.kernel[...])[t]
        np.testing.assert_allclose(tokens[t], expected, rtol=1e-5, atol=1e-6)


def test_shared_projection_is_one_matrix():
    plan, tokenizer, _, _ = tokens_of(even_schema(2, 6), tokens=4, tokenizer_shared=True)
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(tokenizer, nnx.Param))] == [(8,), (plan.user.padded[0], 8)]


def test_groups_and_global_token(schema):
    plan, tokenizer, inputs, tokens = tokens_of(schema, tokenizer="group", global_token=True)
    assert plan.user.runs == (("user", "age"), ("hour",))
    assert plan.candidate.runs == (("item", "shop"), ("price", "overlap"))
    x = [np.repeat(np.asarray(inputs.user.fields[name])[:, None], 3, 1) for name in ("user", "age", "hour")]
    x += [np.asarray(inputs.candidates.fields[name]) for name in ("item", "shop", "price", "overlap")]
    expected = np.concatenate(x, axis=-1) @ np.asarray(tokenizer.everything.kernel[...])
    np.testing.assert_allclose(tokens[-1], expected, rtol=1e-5, atol=1e-6)


def test_identity_passes_fields_through():
    plan, tokenizer, inputs, tokens = tokens_of(even_schema(2, 2), width=3, tokenizer="identity")
    assert plan.params(3) == 0 and plan.flops(3).candidate == 0
    np.testing.assert_array_equal(tokens[0, :, 1], inputs.user.fields["f0"])
    np.testing.assert_array_equal(tokens[3], inputs.candidates.fields["f3"])


def test_history_tokens_are_projected_and_counted():
    sequence = TokenShape(user=2, candidate=1, width=5)
    schema = even_schema()
    plan = plan_tokens(schema, TokenizerOptions(tokens=7), 8, sequence)
    assert (plan.user_tokens, plan.candidate_tokens) == (2 + 2, 2 + 1)
    tokenizer = Tokenizer(plan, 8, rngs=nnx.Rngs(0))
    assert plan.params(8) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tokenizer, nnx.Param)))
    inputs, rng = random_inputs(schema, 2, 3), np.random.default_rng(0)
    user = jnp.asarray(rng.standard_normal((2, 2, 5)), jnp.float32)
    own = jnp.asarray(rng.standard_normal((2, 3, 1, 5)), jnp.float32)
    state = tokenizer.encode_user(inputs.user, user)
    expected = user[:, 1] @ tokenizer.user_history.kernel[...][1]
    np.testing.assert_allclose(state.tokens[3], expected, rtol=1e-5, atol=1e-6)
    made = tokenizer.candidate_tokens(state, inputs.candidates, own)
    expected = own[:, :, 0] @ tokenizer.candidate_history.kernel[...][0]
    np.testing.assert_allclose(made[2], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="built for 2 history tokens"):
        tokenizer.encode_user(inputs.user)


def test_number_of_tokens_chosen_for_none():
    assert possible_tokens(even_schema(4, 4), TokenizerOptions()) == range(2, 9)
    assert plan_tokens(even_schema(4, 4), TokenizerOptions(), 24).tokens == 8
    assert plan_tokens(even_schema(4, 3), TokenizerOptions(), 24).tokens == 6  # 7 does not divide 24
    assert plan_tokens(even_schema(30, 30), TokenizerOptions(), 96).tokens == 16
    assert plan_tokens(even_schema(30, 30), TokenizerOptions(), 34).tokens == 2  # 17 are too many
    for (user, candidate), options, possible in (
        ((0, 4), {}, range(1, 5)),
        ((4, 4), dict(global_token=True), range(3, 10)),
        ((4, 4), dict(global_token="split"), range(4, 11)),
        ((4, 2), dict(cut_align="exact"), range(2, 19)),
    ):
        assert possible_tokens(even_schema(user, candidate), TokenizerOptions(**options)) == possible
    assert possible_tokens(even_schema(), TokenizerOptions(), TokenShape(user=2, candidate=1, width=5)) == range(5, 12)


def test_sides_share_tokens_by_width():
    plan = plan_tokens(even_schema(6, 2), TokenizerOptions(tokens=4), 8)
    assert (plan.user_tokens, plan.candidate_tokens) == (3, 1)
    assert plan_tokens(even_schema(0, 4), TokenizerOptions(tokens=4), 8).user_tokens == 0


def uneven_schema(user, candidate):
    """Fields u0, u1, ... and c0, c1, ... of these widths."""
    sides = (("user", user), ("candidate", candidate))
    return Schema(tuple(Field(f"{side[0]}{i}", side, w, 10) for side, widths in sides for i, w in enumerate(widths)))


@pytest.mark.parametrize(
    ("user", "candidate", "options", "shared"),
    [
        ([30], 7 * [1], dict(tokens=6), (1, 5)),  # a field is not split
        (7 * [1], [30], dict(tokens=6), (5, 1)),
        (5 * [2], 5 * [2], dict(tokens=5), (2, 3)),
        (5 * [2], 5 * [1], dict(tokens=6), (4, 2)),
        ([30], 7 * [1], dict(tokens=6, cut_align="exact"), (5, 1)),
        (4 * [3], 4 * [3], dict(tokens=6, global_token=True), (2, 4)),
        (4 * [3], 4 * [3], dict(tokens=6, global_token="split"), (3, 3)),
        (4 * [3], 4 * [3], dict(tokens=6, global_token="split", user_tokens=2), (2, 4)),
        (4 * [3], 4 * [3], dict(tokens=5, user_tokens=4), (4, 1)),
        (4 * [3], 4 * [3], dict(tokens=5, user_tokens=1), (1, 4)),
    ],
    ids=str,
)
def test_tokens_of_uneven_sides(user, candidate, options, shared):
    plan = plan_tokens(uneven_schema(user, candidate), TokenizerOptions(**options), 8)
    assert (plan.user_tokens, plan.candidate_tokens, plan.tokens) == (*shared, sum(shared))


@pytest.mark.parametrize(
    ("widths", "tokens", "runs"),
    [
        ([5, 1, 1, 1, 8], 3, [1, 3, 1]),
        ([1, 1, 1, 9], 3, [2, 1, 1]),  # a run for every token
        ([9, 1, 1, 1], 3, [1, 1, 2]),
        ([2, 2, 2], 2, [1, 2]),
        ([3, 1, 2, 2, 4], 2, [3, 2]),
        ([3, 1, 2, 2, 4], 5, [1, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_runs_end_nearest_to_equal_shares(widths, tokens, runs):
    """Numbers of fields per token; every run is padded to the widest."""
    side = plan_tokens(uneven_schema([], widths), TokenizerOptions(tokens=tokens), 8).candidate
    assert [len(run) for run in side.runs] == runs and sum(side.runs, ()) == tuple(f"c{i}" for i in range(len(widths)))
    assert side.padded == tokens * (max(side.widths),)


def test_auto_passes_embeddings_of_the_right_width_through():
    def projected(schema, width=3, **options):
        return plan_tokens(schema, TokenizerOptions(tokenizer="auto", **options), width).projected

    plain, raw = even_schema(2, 2), Schema((*even_schema(2, 2).fields, Field("price", "candidate", 3)))
    assert not projected(plain) and projected(plain, 4) and projected(plain, tokenizer_hidden=5) and projected(raw)


def test_work_and_what_no_gradient_needs():
    """2 FLOPs per weight; those of a gradient into raw numbers alone are needed by nobody."""
    sides = [
        SidePlan((("a",), ("b",)), (3, 5), False, batched, trained)
        for batched, trained in ((False, (True, False)), (True, (True, False)), (True, (False, False)))
    ]
    assert [side.flops(None, 8) for side in sides] == [(128, 80), (160, 0), (160, 160)]
    assert [side.flops(4, 8) for side in sides] == [(192, 40), (208, 0), (208, 80)]
    assert dataclasses.replace(sides[1], pad_to=7).padded == (7, 7)
    mixed, (raw, trained) = sides[0], [SidePlan((("c",),), (width,), False, False, (width < 6,)) for width in (6, 4)]
    history = TokenShape(user=2, candidate=1, width=3, user_trained=False)
    every = dict(everything=(raw, trained), user_everything=raw)
    for plan, flops in (
        (TokenPlan(mixed, trained), (128, 64, 80, 0)),
        (TokenPlan(mixed, trained, hidden=5), (2 * (40 + 80), 2 * (20 + 40), 50, 0)),
        (TokenPlan(mixed, trained, history), (128 + 96, 64 + 48, 80 + 96, 0)),
        (TokenPlan(mixed, trained, **every), (128 + 96 + 96, 64 + 64, 80 + 96 + 96, 0)),
        (TokenPlan(mixed, trained, hidden=5, **every), (240 + 60 + 140, 120 + 120, 50 + 60 + 60, 0)),
        (TokenPlan(mixed, trained, projected=False), (0, 0, 0, 0)),
    ):
        found = plan.flops(8)
        assert (found.user, found.candidate, found.user_unneeded, found.candidate_unneeded) == flops
    as_they_are = TokenPlan(raw, raw, projected=False)
    assert not as_they_are.trained and dataclasses.replace(as_they_are, sequence=TokenShape(1, 0, 3)).trained
    assert TokenPlan(raw, raw).trained and dataclasses.replace(as_they_are, candidate=trained).trained
    assert dataclasses.replace(as_they_are, everything=(raw, raw)).trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens=9), "can make 2 to 8"),
        (dict(tokens=1), "can make 2 to 8"),
        (dict(tokens=4, user_tokens=4), "expected 1 to 3"),
        (dict(tokens=8, user_tokens=3), "expected 4 to 4"),
        (dict(tokens=7, user_tokens=1, global_token="split"), "expected 2 to 5"),
        (dict(tokenizer="field", tokens=4), "makes 8 of this schema"),
        (dict(tokenizer="group", tokenizer_shared=True), "tokenizer_shared needs"),
        (dict(tokenizer="identity"), "needs fields of width 8"),
        (dict(tokenizer="identity", tokenizer_hidden=4), "has no projection"),
        (dict(tokenizer="field", cut_align="exact"), "cut_align='exact' has no effect with tokenizer='field'"),
        (dict(), "no number of tokens"),
    ],
    ids=str,
)
def test_contradictions_name_what_would_fit(options, message):
    width = 11 if not options else 8
    with pytest.raises(ValueError, match=message):
        plan_tokens(even_schema(), TokenizerOptions(**options), width)


def test_a_schema_without_candidate_fields_is_refused():
    with pytest.raises(ValueError, match="nothing to rank"):
        plan_tokens(even_schema(4, 0), TokenizerOptions(tokens=4), 8)
    with pytest.raises(ValueError, match="the schema has none; use True"):
        plan_tokens(even_schema(0, 4), TokenizerOptions(tokens=4, global_token="split"), 8)


def test_missing_field_is_named():
    _, tokenizer, inputs, _ = tokens_of(even_schema(), tokens=4)
    fields = {name: x for name, x in inputs.user.fields.items() if name != "f1"}
    with pytest.raises(KeyError, match="lack the fields f1"):
        tokenizer.encode_user(inputs.user.replace(fields=fields))
