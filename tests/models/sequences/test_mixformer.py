"""MixFormer and UI-MixFormer: a dense reference, the mask of the user heads, two exact orders, state, golden counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled
from flax import nnx

from recscale.models import build, count, freeze_config, get_config
from recscale.models.inputs import Events, Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.mixing import mix
from recscale.scaling.counting.abstract import abstract_model, forward_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

R, C, S = 3, 4, 6
SMALL = dict(tokens=4, width=8, hidden=12, seq_hidden=10, layers=2, tower=(5,))


def golden_schema(user=0):
    fields = (Field("x", "candidate", 20 - user, 50),)
    return Schema(((Field("u", "user", user, 50),) if user else ()) + fields, (_clicks(11, 6),))


def _clicks(length, width, timestamps=False):
    return Sequence("clicks", length, (Field("e", "user", width, 50),), timestamps=timestamps)


def small_schema(columns=S):
    fields = (Field("u", "user", 5, 50), Field("v", "user", 3, 50), Field("x", "candidate", 7, 50))
    return Schema((*fields, Field("y", "cross", 4)), (_clicks(columns, 6, timestamps=True),))


@functools.cache
def model_of(schema=None, **config):
    """A model whose parameters are all random, gains too; nothing is compiled for them."""
    schema = schema or small_schema()
    return filled(lambda: build("mixformer", schema, SMALL | config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def inputs():
    made = random_inputs(small_schema(), R, C)
    return with_length(made, [0, 2, S])


def with_length(inputs, length, extra=0):
    """The inputs with `extra` more columns, everything beyond the length random."""
    old, rng = inputs.user.histories["clicks"], np.random.default_rng(9)
    junk = rng.standard_normal((R, old.events.shape[1] + extra, old.events.shape[2]))
    events = np.concatenate([old.events, junk[:, : junk.shape[1] - old.events.shape[1]]], axis=1)
    valid = np.arange(events.shape[1])[None] < np.asarray(length)[:, None]
    real = np.random.default_rng(3).standard_normal(old.events.shape)
    real = np.pad(real, [(0, 0), (0, extra), (0, 0)])
    events = np.where(valid[..., None], real, junk)
    ages = np.cumsum(np.full(events.shape[:2], 3000), axis=1)
    made = Events(jnp.asarray(events, jnp.float32), jnp.asarray(length, jnp.int32), jnp.asarray(ages, jnp.int32))
    return inputs.replace(user=inputs.user.replace(histories={"clicks": made}))


# ---- one dense reference: every head for every candidate, the mask as a matrix


def groups_of(block):
    return [group for group in (block.user, block.item) if group is not None]


def normed(norms, x):
    """RMS or layer norm of x [R, n, T, D] with gains of all heads; x itself without a norm."""
    if norms[0] is None:
        return x
    if norms[0].kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x = x * jnp.concatenate([jnp.atleast_2d(n.gain[...]) for n in norms])[None, None]
    return x if norms[0].bias is None else x + jnp.concatenate([jnp.atleast_2d(n.bias[...]) for n in norms])[None, None]


def per_head(weights, x):
    """x [R, n, T, D] times the matrices [t, D, E] of the groups of heads."""
    return jnp.einsum("rntd,tde->rnte", x, jnp.concatenate(weights))


def swiglu(ffns, x):
    parts = [[getattr(ffn, name).kernel[...] for ffn in ffns] for name in ("up", "gate", "out")]
    if parts[0][0].ndim == 2:  # one network for all heads
        return (x @ parts[0][0] * jax.nn.silu(x @ parts[1][0])) @ parts[2][0]
    hidden = per_head(parts[0], x) * jax.nn.silu(per_head(parts[1], x))
    return per_head([w.swapaxes(1, 2) for w in parts[2]], hidden)


def dense_block(block, history, keep, x, s, seen):
    """Heads x [R, C, T, D] after a block; s [R, S, T*D], seen [R, S]."""
    groups, post, (T, D) = groups_of(block), block.item.post, x.shape[2:]

    def norms(name):
        return [getattr(group, name) for group in groups]

    def residual(name, ffn, x):
        norm = norms(name)
        return normed(norm, swiglu(ffn, x) + x) if post else swiglu(ffn, normed(norm, x)) + x

    mixed = mix(x if post else normed(norms("mixing_norm"), x), T)
    p = keep[None, None] * mixed + x
    q = residual("query_ffn_norm", norms("query_ffn"), normed(norms("mixing_norm"), p) if post else p)
    wide = s[:, :, None]
    h = swiglu([history.ffn], wide if post else normed([history.norm], wide)) + wide
    h = (normed([history.norm], h) if post else h).reshape(*s.shape[:2], T, D)
    h = normed(norms("history_norm"), h)
    k, v = (per_head([layer.kernel[...] for layer in norms(name)], h) for name in ("key", "value"))
    scores = jnp.einsum("rctd,rstd->rcts", normed(norms("query_norm"), q), k) / np.sqrt(D)
    visible = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1) * visible
    z = jnp.einsum("rcts,rstd->rctd", weights, v) + q
    return residual("output_norm", norms("output_ffn"), normed(norms("attention_norm"), z))


def reference(model, inputs, masked=True):
    """All heads after every layer, [R, C, T, D] each, and the logits; masked=False drops the mask of user heads."""
    wide = {n: jnp.broadcast_to(x[:, None], (R, C, x.shape[-1])) for n, x in inputs.user.fields.items()}
    fields = {**wide, **inputs.candidates.fields}
    cuts = [(model.user_cut, model.user_heads), (model.item_cut, model.item_heads)]
    cuts = [(cut, heads) for cut, heads in cuts if cut is not None]
    x = [jnp.einsum("trcp,tpd->rctd", cut(fields), heads.kernel[...]) for cut, heads in cuts]
    keep, x = np.ones((4, 8), np.float32), jnp.concatenate(x, axis=2)
    if model.user_cut is not None and masked:
        keep[: model.user_cut.heads, model.user_cut.heads * 8 // 4 :] = 0
    view, layers = model.reader(inputs.user), []
    for i, block in enumerate(model.blocks):
        history = model.histories[i % len(model.histories)]
        x = dense_block(block, history, keep, x, view.events @ model.events.kernel[...], view.valid)
        layers.append(x)
    return layers, model.towers(x.reshape(R * C, -1)).reshape(R, C, -1)


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(kv="materialised", norms="equations"),
        dict(norms="post", history_ffn="shared"),
        dict(ui=True),
        dict(ui=True, user_heads=1, kv="materialised", norms="post"),
    ],
    ids=str,
)
def test_staged_model_equals_the_dense_reference(inputs, config):
    model = model_of(**config)
    staged = jax.jit(lambda i: model.score(model.encode_user(i.user), i.candidates).logits)(inputs)
    dense = jax.jit(lambda i: reference(model, i)[1])(inputs)
    np.testing.assert_allclose(staged, dense, rtol=1e-5, atol=1e-5 * float(jnp.abs(dense).max()))


def test_user_heads_never_see_a_candidate(inputs):
    model = model_of(ui=True, layers=3)

    @functools.partial(jax.jit, static_argnums=2)
    def sums(fields, user_fields, masked):
        made = inputs.replace(
            candidates=inputs.candidates.replace(fields=fields), user=inputs.user.replace(fields=user_fields)
        )
        weights = jnp.asarray(np.random.default_rng(0).standard_normal((R, C, 4, 8)), jnp.float32)
        layers = reference(model, made, masked)[0]
        return [jnp.stack([(x * weights)[:, :, :2].sum(), (x * weights)[:, :, 2:].sum()]) for x in layers]

    arguments = (inputs.candidates.fields, inputs.user.fields)
    jacobian = jax.tree.map(
        lambda j: np.abs(j).max(axis=tuple(range(1, j.ndim))), jax.jacrev(sums, (0, 1))(*arguments, True)
    )
    for item, user in jacobian:  # per layer, per field: the gradient's size for (user heads, item heads)
        for size in item.values():
            assert size[0] == 0.0 and size[1] > 0
        for size in user.values():
            assert (size > 0).all()
    unmasked = jax.jacrev(sums)(*arguments, False)
    assert all(np.abs(layer["x"][0]).max() > 0 for layer in unmasked)


def test_owner_of_every_channel():
    """Labels instead of numbers: which head a channel of the mixed user rows came from."""
    for T, user in ((4, 2), (8, 3)):
        D = 2 * T
        owners = mix(jnp.broadcast_to(jnp.arange(T, dtype=jnp.float32)[:, None], (T, D)), T)
        kept = np.asarray(owners)[:user, : user * D // T]
        assert kept.max() == user - 1 and set(np.asarray(owners)[:user, user * D // T :].ravel()) == set(range(user, T))
        interleaved = np.asarray(owners).reshape(T, T, D // T).swapaxes(1, 2).reshape(T, D)
        assert interleaved[:user, : user * D // T].max() >= user  # any other order of channels would leak


def test_both_orders_of_the_attention_agree(inputs):
    graph, state = nnx.split(model_of(ui=True, kv="reordered", layers=1))
    other = nnx.split(nnx.eval_shape(lambda: model_of(ui=True, kv="materialised", layers=1)))[0]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((R, C, 1)), jnp.float32)

    def run(graph):
        def loss(state, events):
            user = inputs.user.replace(histories={"clicks": inputs.user.histories["clicks"].replace(events=events)})
            logits = nnx.merge(graph, state)(inputs.replace(user=user)).logits
            return (logits * weights).sum(), logits

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(state, inputs.user.histories["clicks"].events)

    found, expected = jax.tree.leaves(run(graph)), jax.tree.leaves(run(other))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)


def test_order_is_chosen_by_the_expected_candidates():
    costs = [count("mixformer", golden_schema(), SMALL | dict(candidates=n)) for n in (1, 10, 11, 500)]
    reordered, materialised = (
        count("mixformer", golden_schema(), SMALL | dict(kv=k)) for k in ("reordered", "materialised")
    )
    assert costs == [reordered, reordered, materialised, materialised]
    # Equal at C = S = 11.
    at = [k.forward_flops_user + 11 * k.forward_flops_candidate for k in (reordered, materialised)]
    assert at[0] == at[1]


# ---- lengths and padding


@pytest.mark.parametrize("ui", [False, True])
def test_columns_beyond_the_length_change_nothing(inputs, ui):
    model = model_of(schema=small_schema(columns=S + 37), ui=ui)
    forward = jax.jit(lambda i: model(i).logits)
    for lengths in ([0, 1, S - 1], [S, 2, 3]):
        plain = forward(with_length(inputs, lengths))
        assert jnp.isfinite(plain).all()
        for extra in (1, 37):
            more = forward(with_length(inputs, lengths, extra))
            np.testing.assert_allclose(more, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_empty_history_is_no_attention(inputs):
    model = model_of(ui=True, layers=1)
    graph, state = nnx.split(model)
    silent = nnx.merge(graph, state)
    for block in silent.blocks:
        for group in (block.user, block.item):
            group.value.kernel[...] = jnp.zeros_like(group.value.kernel[...])
    forward = jax.jit(lambda s, i: nnx.merge(graph, s)(i).logits)
    empty = with_length(inputs, [0, 0, 0])
    np.testing.assert_allclose(forward(state, empty), forward(nnx.split(silent)[1], inputs), rtol=1e-6, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda s: forward(s, empty).sum()))(state)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# ---- reuse


@pytest.mark.parametrize("config", [dict(), dict(kv="materialised"), dict(ui=True)], ids=str)
def test_state_is_what_is_needed_and_can_be_stored(inputs, config, tmp_path):
    model = model_of(**config)
    encode, score = jax.jit(model.encode_user), jax.jit(lambda s, c: model.score(s, c).logits)
    state = encode(inputs.user)
    leaves, tree = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *map(np.asarray, leaves))
    with np.load(tmp_path / "state.npz") as stored:
        again = jax.tree.unflatten(tree, [jnp.asarray(stored[name]) for name in stored.files])
    np.testing.assert_array_equal(score(again, inputs.candidates), score(state, inputs.candidates))
    T, D, L, T_u = 4, 8, 2, 2 if config.get("ui") else 0
    histories = L * S * (T - T_u) * D * (2 if config.get("kv") else 1)
    user = 8 if not T_u else L * (T - T_u) * T_u * D // T + T_u * D
    assert sum(leaf.size for leaf in leaves) == R * (histories + user + 1)


def test_nothing_of_the_size_of_candidates_times_history_times_width():
    """Temporaries of the compiled `score` stay below a quarter of [R, C, S, T, D]; scores are [R, T/2, C, S]."""
    schema, candidates, columns = small_schema(columns=256), 64, 256
    model, made = abstract_model("mixformer", schema, SMALL | dict(ui=True)), random_inputs(schema, 1, candidates)
    graph, params = nnx.split(model)
    state = jax.eval_shape(lambda p: nnx.merge(graph, p).encode_user(made.user), params)
    score = jax.jit(lambda p, s: nnx.merge(graph, p).score(s, made.candidates).logits)
    temporary = score.lower(params, state).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * candidates * columns * 4 * 8 / 4


@pytest.mark.slow
def test_gradients_of_a_request_are_those_of_its_rows(inputs):
    graph, state = nnx.split(model_of(ui=True, layers=1))
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 2, (R, C, 1)), jnp.float32)
    rows = inputs.replace(
        user=jax.tree.map(lambda x: jnp.repeat(x, C, axis=0), inputs.user),
        candidates=jax.tree.map(lambda x: x.reshape(R * C, 1, *x.shape[2:]), inputs.candidates),
    )

    def loss(state, inputs, labels):
        logits = nnx.merge(graph, state)(inputs).logits
        return (jnp.logaddexp(0.0, logits) - labels * logits).sum()

    step = jax.jit(jax.value_and_grad(loss))
    found, expected = step(state, inputs, labels), step(state, rows, labels.reshape(R * C, 1, 1))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6)


# ---- counts


@pytest.mark.parametrize(
    ("user", "config", "params", "request_flops", "candidate_flops"),
    [
        (0, dict(), 19_168, 67_584, 35_264),
        (0, dict(norms="equations"), 18_976, 67_584, 35_264),
        (0, dict(kv="materialised"), 19_168, 101_376, 32_192),
        (10, dict(ui=True), 19_168, 85_216, 17_632),
    ],
    ids=str,
)
def test_golden_integers(user, config, params, request_flops, candidate_flops):
    schema = golden_schema(user)
    config = dict(tokens=4, width=8, layers=3, hidden=24, seq_hidden=10, tower=()) | config
    counted = count("mixformer", schema, config)
    assert counted.dense_params - counted.head_params == params
    assert counted.forward_flops_user == request_flops
    assert counted.forward_flops_candidate - 2 * 4 * 8 == candidate_flops
    function, arguments = forward_program("mixformer", schema, config, 2, 3)
    assert count_flops(function, *arguments) == 2 * request_flops + 3 * 2 * (candidate_flops + 64)


@pytest.mark.parametrize(
    "config",
    [
        dict(query_mixer="none", ui=True),
        dict(query_mixer="self_attention"),
        dict(query_ffn=False, recent=4),
        dict(history_ffn="shared", tower=None),
        dict(output_ffn="shared", ui=True, user_heads="width"),
        dict(norms="post", kv="materialised", time_feature="none", implementation="reference"),
    ],
    ids=str,
)
def test_every_flag_counts(config):
    schema, config = small_schema(), SMALL | config
    counted = count("mixformer", schema, config)
    assert tree_params(abstract_model("mixformer", schema, config)) == counted.dense_params
    function, arguments = forward_program("mixformer", schema, config, 2, 3)
    expected = 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate
    assert count_flops(function, *arguments) == expected
    assert jax.eval_shape(function, *arguments).shape == (2, 3, 1)


@pytest.mark.parametrize(("preset", "millions"), [("mixformer_small", 282), ("mixformer_medium", 1226)])
def test_presets_meet_the_printed_parameters(preset, millions):
    config, counted = freeze_config(preset), count(preset, small_schema(columns=512))
    T, D = 16, config.width
    blocks = 4 * (6 * T * D * 4 * D + 2 * T * D * D + 3 * T * D * 2 * D + 6 * T * D)
    assert counted.dense_params - counted.tokenizer_params - counted.head_params == blocks
    assert 0.98 < blocks / 1e6 / millions < 1  # the rest are inputs, whose widths are not disclosed


@pytest.mark.parametrize("target", [1e4, 1e5, 1e7])
@pytest.mark.parametrize("name", ["mixformer", "ui_mixformer"])
def test_sizes_near_a_target(name, target, full_schema, small_config):
    schema = full_schema(events=50)
    config = small_config(name, schema, target)
    assert set(config) == {"tokens", "width", "hidden"} and config["width"] % config["tokens"] == 0
    assert abs(count(name, schema, config).dense_params / target - 1) < 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(width=10), "width 10 does not divide into 4 heads; the nearest that does is 8"),
        (dict(ui=True, query_mixer="self_attention"), "has no such mask"),
        (dict(ui=True, user_heads=4), "user_heads is 4, expected 1 to 3"),
        (dict(user_heads=2), "user_heads has no effect"),
        (dict(tokens=64, width=64), "width 19 cannot be cut into 64 heads"),
        (dict(sequence="views"), "'views', but the schema's histories are clicks"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(config, message):
    with pytest.raises(ValueError, match=message):
        count("mixformer", small_schema(), SMALL | config)


def test_schemas_it_cannot_read_are_refused_by_name():
    plain = small_schema()
    with pytest.raises(ValueError, match="no sequences"):
        count("mixformer", dataclasses.replace(plain, sequences=()))
    two = dataclasses.replace(plain, sequences=(*plain.sequences, Sequence("views", 3, plain.sequences[0].fields)))
    with pytest.raises(ValueError, match="several histories .clicks, views.; set `sequence`"):
        count("mixformer", two)
    assert count("mixformer", two, dict(sequence="views")).dense_params > 0
    with pytest.raises(ValueError, match="needs both"):
        count("ui_mixformer", golden_schema())
    assert get_config("ui_mixformer").ui and not get_config("mixformer").ui
