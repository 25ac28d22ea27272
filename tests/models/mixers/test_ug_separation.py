"""UG-Sep: masks, the two phases against a masked model of full width, compensation, counts.

The masked references compute every token of every row, [B, T, D], and cut what flows from candidates to users with
`where`; their weights are those of the separated models, laid out at full width. They exist here only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models import build, count, freeze_config, size_space
from recscale.models.inputs import Field, Schema, reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.mixing import mix, revert
from recscale.models.mixers import ug_rankmixer as ug_sep
from recscale.models.mixers import ug_tokenmixer_large
from recscale.models.mixers.ug_rankmixer import Kept, RankMixerSeparation, SeparatedRankMixerBlock
from recscale.scaling.counting.jaxpr_flops import count_flops

T, D, F, L = 8, 16, 12, 3
RATIOS = (2, 4, 6)
R, C = 3, 2

NAMES = ["ug_rankmixer", "ug_tokenmixer_large"]
MODULES = {"ug_rankmixer": ug_sep, "ug_tokenmixer_large": ug_tokenmixer_large}


def token_schema(user_tokens, tokens=T, width=D):
    """Every field is a token, the first ones the user's."""
    sides = ["user"] * user_tokens + ["candidate"] * (tokens - user_tokens)
    return Schema(tuple(Field(f"t{i}", side, width, 10) for i, side in enumerate(sides)))


def sizes(name, **flags):
    own = dict(hidden=F)
    if name == "ug_tokenmixer_large":
        own = dict(hidden=F + 1, mixed_hidden=F, global_token=False, aux_weight=0.0, down_init_scale=1.0)
    return dict(tokenizer="identity", width=D, layers=L) | own | flags


def make(name, user_tokens, *, trained=True, **flags):
    """A model on `token_schema`; trained=True draws what starts at a constant: gains, biases, compensation."""
    model = build(name, token_schema(user_tokens), sizes(name, **flags), rngs=nnx.Rngs(0))
    if trained:
        rng = np.random.default_rng(0)
        params = nnx.state(model, nnx.Param)
        moved = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
        nnx.update(model, moved)
    return model


def inputs_for(user_tokens, requests=R, candidates=C, seed=1):
    return random_inputs(token_schema(user_tokens), requests, candidates, seed=seed)


def joined(inputs):
    """All tokens of every row: [R*C, T, D]."""
    candidates = jnp.stack(list(inputs.candidates.fields.values()), axis=2)
    user = jnp.stack(list(inputs.user.fields.values()), axis=1)
    user = jnp.broadcast_to(user[:, None], (*candidates.shape[:2], *user.shape[1:]))
    rows = jnp.concatenate([user, candidates], axis=2)
    return rows.reshape(-1, *rows.shape[2:])


def layer_norm(norm, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm.gain[...][None, None] + norm.bias[...][None, None]


def both(block, layer, part):
    """A per-token parameter of all tokens: the user's, then the candidates'."""
    sides = (getattr(getattr(block, side), layer) for side in ("user_ffn", "candidate_ffn"))
    return jnp.concatenate([getattr(side, part)[...] for side in sides])


def masked_compensation(block, mixed, user_rows, user, tokens):
    """Row g of the result is what candidate token g gets; user rows get nothing. mixed [B, H, W]."""
    if block.compensation is None:
        return jnp.zeros((mixed.shape[0], tokens, D))
    shares, kernel = block.compensation.shares, block.compensation.kernel[...]
    shares = jnp.full((tokens - user, user_rows), 1 / user_rows) if shares is None else shares[...]
    projected = mixed[:, :user_rows, : kernel.shape[0]] @ kernel
    given = jnp.einsum("gu,bud->bgd", shares, projected)
    return jnp.concatenate([jnp.zeros((mixed.shape[0], user, D)), given], axis=1)


def cut_mix(x, heads, user_rows, user):
    """mix(x, H) [B, H, W] with the slots of candidate tokens cut from user rows."""
    tokens, d = x.shape[1], x.shape[2] // heads
    parts = mix(x, heads).reshape(-1, heads, tokens, d)
    cut = (np.arange(heads)[:, None] < user_rows) & (np.arange(tokens)[None] >= user)
    return jnp.where(cut[None, :, :, None], 0.0, parts).reshape(-1, heads, tokens * d)


def masked_shortcut(shortcut, branch, x, user):
    """Attention from the branch's tokens to the block's input, [B, T, D]; users read users."""
    q, k, v = branch @ shortcut.query.kernel[...], x @ shortcut.key.kernel[...], x @ shortcut.value.kernel[...]
    cut = (np.arange(T)[:, None] < user) & (np.arange(T)[None] >= user)
    scores = jnp.where(cut[None], -jnp.inf, jnp.einsum("bqd,bkd->bqk", q, k) / D**0.5)
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, axis=-1), v)


def masked_rankmixer(model, x, user):
    """[B, T, D] -> the last tokens [B, T, D]."""
    for block in model.blocks:
        mixed = cut_mix(x, T, user, user)
        given = masked_compensation(block, mixed, user, user, T)
        s = layer_norm(block.mixing_norm.user, mixed + given + (x if block.shortcut is None else 0.0))
        h = jnp.einsum("btd,tdf->btf", s, both(block, "up", "kernel")) + both(block, "up", "bias")[None]
        h = jax.nn.gelu(h, approximate=True)
        y = jnp.einsum("btf,tdf->btd", h, both(block, "down", "kernel")) + both(block, "down", "bias")[None]
        y = y + (s if block.shortcut is None else masked_shortcut(block.shortcut, y, x, user))
        x = layer_norm(block.ffn_norm.user, y)
    return x


def rms_norm(norm, x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm.gain[...][None, None]


def swiglu(x, up, gate, out):
    h = jnp.einsum("btd,tdf->btf", x, up) * jax.nn.silu(jnp.einsum("btd,tdf->btf", x, gate))
    return jnp.einsum("btf,tdf->btd", h, out)


def full_width(block, layer):
    """A matrix of F1 for all H rows, [H, W, F1]; what is not allocated is filled with junk, for it must not matter."""
    sides = [getattr(getattr(block, side), layer).kernel[...] for side in ("user_mixed", "candidate_mixed")]
    width = block.cut.mixed_width
    missing = [((0, 0), (0, width - sides[0].shape[1]), (0, 0)), ((0, 0), (width - sides[1].shape[1], 0), (0, 0))]
    return jnp.concatenate([jnp.pad(w, m, constant_values=7.0) for w, m in zip(sides, missing, strict=True)])


def masked_tokenmixer_large(model, x, user):
    """[B, T, D] -> the normed last tokens [B, T, D]."""
    stream, every = [x], model.inter_residual_every
    for i, block in enumerate(model.blocks, start=1):
        heads, own = sum(block.cut.heads), block.cut.heads[0]
        mixed = cut_mix(rms_norm(block.mixed_norm.user, x), heads, own, user)
        y = swiglu(mixed, *(full_width(block, layer) for layer in ("up", "gate", "out")))
        y = y.reshape(-1, heads, T, D // heads)
        cut = (np.arange(heads)[:, None] >= own) & (np.arange(T)[None] < user)
        back = revert(jnp.where(cut[None, :, :, None], 0.0, y).reshape(-1, heads, T * D // heads), T)
        x = x + back + masked_compensation(block, mixed, own, user, T)
        weights = (both(block, layer, "kernel") for layer in ("up", "gate", "out"))
        x = x + swiglu(rms_norm(block.ffn_norm.user, x), *weights)
        if every and i % every == 0 and i < L:
            x = x + stream[i - every]
        stream.append(x)
    return rms_norm(model.norm.user, x)


MASKED = {"ug_rankmixer": masked_rankmixer, "ug_tokenmixer_large": masked_tokenmixer_large}


def masked_logits(model, rows):
    return model.towers(rows.mean(axis=1)).reshape(R, C, -1)


def case(name, user, **flags):
    return pytest.param(name, user, flags, id=f"{name} {user} {flags}")


KINDS = [(2, "none"), (4, "per_token"), (6, "per_token"), (4, "mean"), (2, "per_token"), (4, "none"), (6, "none")]
CASES = [case(name, user, compensation=kind) for name in NAMES for user, kind in KINDS]
CASES += [
    case("ug_rankmixer", 6, separated_residual=True),
    case("ug_rankmixer", 2, separated_residual=True),
    case("ug_tokenmixer_large", 6, heads=4),
    case("ug_tokenmixer_large", 2, heads=4, compensation="per_token"),
    case("ug_tokenmixer_large", 6, heads=2, compensation="none"),  # no whole number of heads is the user's
    case("ug_tokenmixer_large", 6, drop_dead=False),
]
NAMED = pytest.mark.parametrize("name", NAMES)


@NAMED
def test_two_phases_equal_a_masked_model(name):
    """One case of the next test without its Jacobian, at every run."""
    model, inputs = make(name, 4, compensation="per_token"), inputs_for(4)

    @jax.jit
    def masked(candidates):
        rows = MASKED[name](model, joined(inputs.replace(candidates=candidates)), 4)
        return rows, masked_logits(model, rows)

    (before, expected), (after, _) = (
        jax.tree.map(np.asarray, masked(i.candidates)) for i in (inputs, inputs_for(4, seed=2))
    )
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(axis=-1).all()
    grouped = before.reshape(R, C, T, D)[:, :, :4]
    np.testing.assert_array_equal(grouped, np.broadcast_to(grouped[:, :1], grouped.shape))
    np.testing.assert_allclose(jax.jit(lambda i: model(i).logits)(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "user", "flags"), CASES)
def test_two_phases_equal_a_masked_model_whose_users_never_see_candidates(name, user, flags):
    """User rows of the masked model are bit-equal for other candidates and for every candidate of a request, and their
    Jacobian with respect to candidates is exactly 0; its logits are those of the two phases."""
    model, inputs = make(name, user, **flags), inputs_for(user)

    @jax.jit
    def masked(candidates):
        """All rows, their logits, and a random combination of the rows of the user's Jacobian block."""

        def run(candidates):
            return MASKED[name](model, joined(inputs.replace(candidates=candidates)), user)

        rows, pull = jax.vjp(run, candidates)
        weights = jax.random.normal(jax.random.key(0), rows.shape)
        return rows, masked_logits(model, rows), pull(weights.at[:, user:].set(0.0))[0]

    before, expected, jacobian = jax.tree.map(np.asarray, masked(inputs.candidates))
    after = np.asarray(masked(inputs_for(user, seed=2).candidates)[0])
    np.testing.assert_array_equal(before[:, :user], after[:, :user])
    assert (before[:, user:] != after[:, user:]).any(axis=-1).all()
    grouped = before.reshape(R, C, T, D)[:, :, :user]
    np.testing.assert_array_equal(grouped, np.broadcast_to(grouped[:, :1], grouped.shape))
    for block in jax.tree.leaves(jacobian):
        np.testing.assert_array_equal(block, 0.0)
    np.testing.assert_allclose(jax.jit(lambda i: model(i).logits)(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@NAMED
def test_duplicated_users_and_flat_batches(name):
    """Encoding a user twice changes nothing, and a flat batch reads the state by request."""
    model, inputs = make(name, 4, compensation="per_token"), inputs_for(4)
    encode, score = jax.jit(lambda u: model.encode_user(u)), jax.jit(lambda s, c: model.score(s, c).logits)
    once = encode(inputs.user)
    twice = encode(jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs.user))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(np.concatenate([a, a]), b, rtol=1e-5, atol=1e-6)
    request_id = jnp.asarray([2, 0, 0, 1, 2])
    flat = jax.tree.map(lambda x: jnp.take(x, request_id, axis=0), once)
    rows = jax.tree.map(lambda x: x[request_id, jnp.asarray([0, 0, 1, 1, 1])][:, None], inputs.candidates)
    found = score(flat, rows)[:, 0]
    expected = score(once, inputs.candidates)[request_id, jnp.asarray([0, 0, 1, 1, 1])]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@NAMED
def test_nan_in_a_padded_candidate_stays_there(name):
    model, inputs = make(name, 4, compensation="mean"), inputs_for(4)
    run = jax.jit(lambda i: model(i).logits)
    plain = np.asarray(run(inputs))
    junk = jax.tree.map(lambda x: x.at[1, 0].set(jnp.nan), inputs.candidates)
    found = np.asarray(run(inputs.replace(candidates=junk)))
    touched = np.zeros((R, C), bool)
    touched[1, 0] = True
    assert np.isnan(found[touched]).all()
    np.testing.assert_array_equal(found[~touched], plain[~touched])


@pytest.mark.slow
@NAMED
@pytest.mark.parametrize("kind", ["mean", "per_token"])
def test_fresh_compensation_is_none_and_learns(name, kind):
    fresh, without = (make(name, 6, trained=False, compensation=c) for c in (kind, "none"))
    inputs = inputs_for(6)
    graph, params = nnx.split(fresh)

    def total(p):
        logits = nnx.merge(graph, p)(inputs).logits
        return (logits**2).sum(), logits

    grads, logits = jax.jit(jax.grad(total, has_aux=True))(params)
    np.testing.assert_allclose(logits, jax.jit(lambda i: without(i).logits)(inputs), rtol=1e-6, atol=1e-6)
    for i in range(L):
        assert jnp.abs(grads["blocks"][i]["compensation"]["kernel"][...]).max() > 0


@NAMED
def test_default_compensation_follows_the_users_share(name):
    kinds = {user: make(name, user).blocks[0].compensation for user in RATIOS}
    assert kinds[2] is None and kinds[4] is None and kinds[6].shares.shape == (2, 6)


@pytest.mark.slow
@NAMED
def test_candidates_read_the_user(name):
    """The user acts on the logit together with the candidate; with both directions cut the two only add."""

    def mixed_derivative(**flags):
        model, inputs = make(name, 4, **flags), inputs_for(4, 1, 1)

        def logit(a, b):
            user, candidates = inputs.user.fields | {"t1": a}, inputs.candidates.fields | {"t5": b}
            given = inputs.replace(
                user=inputs.user.replace(fields=user), candidates=inputs.candidates.replace(fields=candidates)
            )
            return model(given).logits.sum()

        a, b = inputs.user.fields["t1"], inputs.candidates.fields["t5"]
        return jnp.abs(jax.jit(jax.jacfwd(jax.grad(logit), argnums=1))(a, b)).max()

    assert mixed_derivative() > 1e-4
    assert mixed_derivative(user_to_candidate=False) == 0


def elements(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


PROJECTIONS = [(2, "none"), (4, "mean"), (6, "per_token")]


def projection(kind, rows, candidates, inputs):
    """Parameters, FLOPs per request and state of a compensation, as the file states them."""
    return {
        "none": (0, 0, 0),
        "mean": (inputs * D, 2 * inputs * D, D),
        "per_token": (
            inputs * D + candidates * rows,
            2 * rows * inputs * D + 2 * candidates * rows * D,
            candidates * D,
        ),
    }[kind]


@pytest.mark.parametrize(("user", "kind"), PROJECTIONS)
def test_closed_forms_of_rankmixer(user, kind):
    schema, values = token_schema(user), sizes("ug_rankmixer", compensation=kind)
    config, candidate = freeze_config("ug_rankmixer", values), T - user
    counted = count("ug_rankmixer", schema, values)
    plain = count("rankmixer", schema, {k: v for k, v in values.items() if k != "compensation"})
    extra, flops, kept = projection(kind, user, candidate, D)
    assert counted.forward_flops_user == L * (4 * D * F * user + flops)
    assert counted.forward_flops_candidate == L * 4 * D * F * candidate + 2 * D
    assert counted.dense_params == plain.dense_params + L * extra
    assert ug_sep.count_state(config, schema) == L * (user * candidate * D // T + kept) + D
    _programs_agree("ug_rankmixer", schema, values, counted)


@pytest.mark.parametrize(("user", "kind"), PROJECTIONS)
@pytest.mark.parametrize("heads", [8, 4])
def test_closed_forms_of_tokenmixer_large(user, kind, heads):
    schema, values = token_schema(user), sizes("ug_tokenmixer_large", compensation=kind, heads=heads)
    config, candidate = freeze_config("ug_tokenmixer_large", values), T - user
    counted = count("ug_tokenmixer_large", schema, values)
    plain = count("tokenmixer_large", schema, {k: v for k, v in values.items() if k != "compensation"})
    extra, _, kept = projection(kind, heads * user // T, candidate, user * D // heads)
    dropped = 3 * D * F * user * candidate // T
    assert counted.dense_params == plain.dense_params + L * (extra - dropped)
    assert ug_tokenmixer_large.count_state(config, schema) == L * (2 * user * candidate * D // T + kept) + D
    if kind == "none":
        blocks = counted.forward_flops_user + counted.forward_flops_candidate - 2 * D
        assert blocks == L * 2 * (3 * T * D * (F + F + 1) - dropped)
    _programs_agree("ug_tokenmixer_large", schema, values, counted)


def _programs_agree(name, schema, values, counted):
    graph, params = nnx.split(nnx.eval_shape(lambda: build(name, schema, values, rngs=nnx.Rngs(0))))
    assert elements(params) == counted.dense_params + counted.training_only_params
    inputs = random_inputs(schema, R, C)

    def encode(p, user):
        return nnx.merge(graph, p).encode_user(user)

    def score(p, state, candidates):
        return nnx.merge(graph, p).score(state, candidates).logits

    state = jax.eval_shape(encode, params, inputs.user)
    assert elements(state) == R * MODULES[name].count_state(freeze_config(name, values), schema)
    assert count_flops(encode, params, inputs.user) == R * counted.forward_flops_user
    assert count_flops(score, params, state, inputs.candidates) == R * C * counted.forward_flops_candidate


@pytest.mark.slow
@NAMED
@pytest.mark.parametrize("options", [dict(tokens=6, global_token="split"), dict(tokens=4, global_token=True)], ids=str)
def test_global_tokens_are_separable(name, options, schema):
    """The split one adds a user token; what the other keeps of the user is in the state."""
    values = sizes(name) | dict(width=12, tokenizer="cut") | options
    _programs_agree(name, schema, values, count(name, schema, values))
    model, inputs = build(name, schema, values, rngs=nnx.Rngs(0)), random_inputs(schema, R, C)
    other = inputs.replace(candidates=random_inputs(schema, R, C, seed=5).candidates)
    run = jax.jit(lambda i: model(i).logits)
    assert (np.asarray(run(inputs)) != np.asarray(run(other))).all()


FLAGS = [
    dict(separated_residual=True),
    dict(separated_residual=True, user_to_candidate=False),
    dict(separated_residual=True, norm_place="pre"),
    dict(ffn="shared"),
    dict(residual=False),
    dict(norm="none"),
    dict(norm="rms"),
    dict(norm_place="pre"),
    dict(norm_per_token=True),
    dict(norm_affine=False),
    dict(tower=(6,)),
    dict(user_to_candidate=False),
]


MIXED_FLAGS = [
    dict(norm_per_token=True),
    dict(final_norm=False),
    dict(inter_residual_every=0),
    dict(drop_dead=False),
    dict(user_to_candidate=False),
    dict(user_to_candidate=False, drop_dead=False),
    dict(aux_weight=0.1, aux_layers=(1, 2)),
]
FLAGS += [dict(compensation="per_token"), dict(compensation="mean")]
MIXED_FLAGS += [dict(compensation="per_token"), dict(compensation="mean")]
ALL_FLAGS = [(NAMES[0], flags) for flags in FLAGS] + [(NAMES[1], flags) for flags in MIXED_FLAGS]


@pytest.mark.parametrize(("name", "flags"), ALL_FLAGS, ids=str)
@pytest.mark.slow
def test_every_flag_builds_and_counts(name, flags, axes_have_rules):
    schema, values = token_schema(4), sizes(name, **flags)
    axes_have_rules(nnx.state(nnx.eval_shape(lambda: build(name, schema, values, rngs=nnx.Rngs(0)))))
    _programs_agree(name, schema, values, count(name, schema, values))


@pytest.mark.parametrize("user", [2, 6])
def test_dropped_slices_are_those_without_a_gradient(user):
    """With full matrices the gradient of F1 is 0 exactly where drop_dead allocates nothing."""
    model, inputs = make("ug_tokenmixer_large", user, drop_dead=False), inputs_for(user)
    live = make("ug_tokenmixer_large", user).blocks[0].cut
    graph, params = nnx.split(model)
    grads = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(inputs).logits ** 2).sum()))(params)
    for block in (grads["blocks"][i] for i in range(L)):
        for layer in ("up", "gate", "out"):
            own, other = (np.asarray(block[side][layer]["kernel"][...]) for side in ("user_mixed", "candidate_mixed"))
            ends = (live.user_out, live.candidate_out) if layer == "out" else (live.user_in, live.candidate_in)
            assert (own[:, : ends[0]] != 0).all() and (own[:, ends[0] :] == 0).all()
            dead = other.shape[1] - ends[1]
            assert (other[:, dead:] != 0).all() and (other[:, :dead] == 0).all()
    assert (live.user_in, live.user_out, live.candidate_in, live.candidate_out) == (2 * user, 16, 16, 2 * (T - user))


@pytest.mark.slow
def test_auxiliary_heads_leave_the_logits_alone():
    """Bit for bit; in training they add their losses, as TokenMixer-Large's do."""
    plain, with_heads = (make("ug_tokenmixer_large", 4, trained=False, aux_weight=w) for w in (0.0, 0.1))
    inputs = inputs_for(4)
    np.testing.assert_array_equal(plain(inputs).logits, with_heads(inputs).logits)
    output = with_heads(inputs, key=jax.random.key(0))
    assert set(output.loss_logits) == {"main", "auxiliary_1"} and not with_heads(inputs).loss_logits
    np.testing.assert_array_equal(output.logits, plain(inputs).logits)
    assert output.loss_logits["auxiliary_1"][1].shape == output.logits.shape


def test_a_block_in_two_phases_keeps_what_candidates_read():
    without = RankMixerSeparation(compensation="none")
    block = SeparatedRankMixerBlock(3, 1, 8, 5, separation=without, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 8)), jnp.float32)
    _, kept = block.encode_user(x)
    assert isinstance(kept, Kept) and kept.compensation is None
    np.testing.assert_array_equal(kept.heads[:, 0], x[..., 6:].swapaxes(0, 1).reshape(2, 6))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ug_rankmixer", dict(mixer="none"), "mixer is 'none'"),
        ("ug_rankmixer", dict(dropout=0.1), "dropout is 0.1"),
        ("ug_rankmixer", dict(user_to_candidate=False, compensation="mean"), "user_to_candidate=False cuts"),
        ("ug_rankmixer", dict(separated_residual=True, residual=False), "residual must be True"),
        ("ug_rankmixer", dict(compensation="full"), "expected 'none', 'mean', 'per_token' or None"),
        ("ug_rankmixer", dict(width=12), "does not divide into 8 heads"),
        ("ug_tokenmixer_large", dict(residual_style="B"), "residual_style is 'B'"),
        ("ug_tokenmixer_large", dict(experts=8, hidden=16, mixed_hidden=16), "experts is 8"),
        ("ug_tokenmixer_large", dict(width=11), "mix in a single head"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(name, flags, message):
    width = flags.get("width", D)
    with pytest.raises(ValueError, match=message):
        build(name, token_schema(4, width=width), sizes(name, **flags), rngs=nnx.Rngs(0))


@NAMED
def test_a_schema_without_users_is_refused(name):
    with pytest.raises(ValueError, match="nothing to separate"):
        build(name, token_schema(0), sizes(name), rngs=nnx.Rngs(0))


def test_sizes_make_room_for_the_compensation():
    base = dict(compensation="per_token")
    for target in (3e4, 1e6):
        offer = next(iter(size_space("ug_rankmixer", reference_schema(), base, target)))
        assert abs(count("ug_rankmixer", reference_schema(), base | offer).dense_params / target - 1) < 0.05
