"""Sequence baselines: golden counts, equations against plain NumPy, masks, order, selection, exact rearrangements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled, history_of
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count, freeze_config, registry
from recscale.models.baselines import hstu, onetrans_lite, sequence_transformer, stca, twin_lite
from recscale.models.inputs import Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.scaling.counting.abstract import train_program
from recscale.scaling.counting.jaxpr_flops import count_flops

NAMES = ("target_attention", "sequence_transformer", "sasrec", "hstu", "twin_lite", "stca")

# Small, with more than one head and layer.
SMALL = {
    "target_attention": dict(width=8),
    "sequence_transformer": dict(width=8),
    "sasrec": dict(width=8, heads=2),
    "hstu": dict(width=8, query_width=3, value_width=5, time_buckets=60),
    "twin_lite": dict(width=8, selected=3),
    "stca": dict(width=8),
}

FLAGS = [
    ("target_attention", dict(heads=4, recent=3, time_feature="none", implementation="reference")),
    ("sequence_transformer", dict(target_in_sequence=True, positions=False)),
    ("sequence_transformer", dict(causal=True, layers=3, max_length=20, remat=True)),
    ("sasrec", dict(layers=1, activation="gelu", max_length=20)),
    ("hstu", dict(layers=3, score_scale=None, time_buckets=0, max_length=20)),
    ("hstu", dict(query_width=None, value_width=None, time_feature="none", layers=1)),
    ("twin_lite", dict(values="all", heads=2, selected=100)),
    ("twin_lite", dict(recent=5)),
    ("stca", dict(kv="reordered", layers=3, ratio=1)),
    ("hstu", dict(interleave=True, actions=("action",))),
    ("twin_lite", dict(cross=("past_shop", "action"))),
]


def spec_of(name):
    return registry._load(name).spec


def frozen(name, **config):
    return freeze_config(name, dict(encoder={**SMALL[name], **config}))[0]


def encoder_of(name, schema, **config):
    """An encoder whose parameters are all random, biases and gains too; nothing is compiled for them."""
    spec, made = spec_of(name), frozen(name, **config)
    return filled(lambda: spec.build(made, schema, rngs=nnx.Rngs(0)))


def plain_schema(length, event, candidate):
    return Schema(
        (Field("x", "candidate", candidate, vocabulary=9),), (Sequence("h", length, (Field("e", "user", event, 9),)),)
    )


# ---- counts


def test_golden_integers_of_stca():
    schema = plain_schema(9, 5, 6)
    sizes = dict(width=8, heads=2, layers=3, ratio=2)
    assert stca.count_params(frozen("stca", **sizes), schema).dense == 4_232
    flops = stca.count_flops(frozen("stca", **sizes), schema)
    assert (flops.user, flops.candidate) == (28_368, 5_952)
    flops = stca.count_flops(frozen("stca", **sizes, kv="reordered"), schema)
    assert (flops.user, flops.candidate) == (21_456, 7_584)


def test_golden_integers_of_a_layer_of_hstu():
    schema = Schema(
        (Field("x", "candidate", 6, vocabulary=9),), (Sequence("h", 10, (Field("e", "user", 5, 9),), timestamps=True),)
    )
    sizes = dict(width=8, heads=2, query_width=3, value_width=4, max_length=64, time_buckets=16, time_feature="none")
    two, three = (frozen("hstu", **sizes, layers=n) for n in (2, 3))
    assert hstu.count_params(three, schema).dense - hstu.count_params(two, schema).dense == 437
    assert hstu.count_flops(three, schema).user - hstu.count_flops(two, schema).user == 8_560


@pytest.mark.parametrize(
    "name, flags, dense",
    [
        *((name, {}, True) for name in NAMES),
        *((*each, False) for each in FLAGS),
        *((*each, True) for each in FLAGS[-2:]),
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_flag_counts(full_schema, name, flags, dense):
    schema, made, spec = full_schema(events=13, dense=dense), frozen(name, **flags), spec_of(name)
    graph, state = nnx.split(nnx.eval_shape(lambda: spec.build(made, schema, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == spec.count_params(made, schema).dense
    inputs, flops = random_inputs(schema, 2, 3), spec.count_flops(made, schema)
    assert count_flops(lambda s, u: nnx.merge(graph, s).encode_user(u), state, inputs.user) == 2 * flops.user
    total = count_flops(lambda s, i: nnx.merge(graph, s)(i), state, inputs)
    assert total == 2 * flops.user + 6 * flops.candidate
    tokens, shape = jax.eval_shape(lambda s, i: nnx.merge(graph, s)(i), state, inputs), spec.token_shape(made, schema)
    for found, expected in ((tokens.user, shape.user), (tokens.candidate, shape.candidate)):
        assert (0 if found is None else found.shape[-2]) == expected
        assert found is None or found.shape[-1] == shape.width
    config = dict(encoder={**SMALL[name], **flags}, backbone=dict(widths=(4,)))
    function, arguments = train_program(name, schema, config, 1, 1)
    assert count_flops(function, *arguments) == count(name, schema, config).train_flops_per_row


# ---- padding, order, candidates


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_invisible(full_schema, name):
    lengths, S = (0, 1, 4, 12, 13), 13
    run = in_float64(encoder_of(name, full_schema(events=S + 37)).__call__)
    inputs = history_of(random_inputs(full_schema(events=S), len(lengths), 2), lengths)
    ((key, old),) = inputs.user.histories.items()
    new = history_of(inputs, lengths, S + 37, seed=8).user.histories[key]
    new = new.replace(events=new.events.at[:, :S].set(old.events), delta_s=new.delta_s.at[:, :S].set(old.delta_s))
    wide = inputs.replace(user=inputs.user.replace(histories={key: new}))
    for one, other in zip(run(inputs), run(wide), strict=True):
        if one is not None:
            assert np.isfinite(one).all()
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_which_encoders_see_the_order(full_schema, name):
    schema = full_schema(events=6, timestamps=False)
    flags = dict(positions=False) if name == "sequence_transformer" else {}
    run = in_float64(encoder_of(name, schema, **flags).__call__)
    inputs = history_of(random_inputs(schema, 2, 2), (6, 6))
    ((key, old),) = inputs.user.histories.items()
    turned = inputs.replace(user=inputs.user.replace(histories={key: old.replace(events=old.events[:, ::-1])}))
    one, other = ([np.asarray(x) for x in run(i) if x is not None][0] for i in (inputs, turned))
    assert (np.abs(one - other).max() > 1e-3) == (name in ("sasrec", "hstu"))


def test_an_empty_history_gives_finite_gradients(full_schema):
    schema = full_schema(events=5)
    inputs = history_of(random_inputs(schema, 2, 2), (0, 0))
    for name in ("sasrec", "hstu", "twin_lite"):
        graph, state = nnx.split(encoder_of(name, schema))

        def total(state, graph=graph):
            return sum(jnp.sum(x**2) for x in nnx.merge(graph, state)(inputs) if x is not None)

        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(in_float64(jax.grad(total))(state))), name


# ---- equations


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.gain[...]) + np.asarray(norm.bias[...])


def dense(layer, x):
    y = x @ np.asarray(layer.kernel[...], np.float64)
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def heads_of(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def candidate_vector(inputs, schema):
    fields = inputs.candidates.fields
    return np.concatenate([np.asarray(fields[f.name], np.float64) for f in schema.candidate_fields], axis=-1)


def multi_head(q, k, v, heads, bias=0.0):
    """q [D], k and v [n, D], bias [heads, n] of the scores -> [D]."""
    q, k, v = heads_of(q, heads), heads_of(k, heads), heads_of(v, heads)
    weights = softmax(np.einsum("hd,nhd->hn", q, k) * q.shape[-1] ** -0.5 + bias)
    return np.einsum("hn,nhd->hd", weights, v).reshape(-1)


@pytest.mark.parametrize("selected", [100, 3])
def test_target_attention_and_twin_follow_their_equations(full_schema, selected):
    """TWIN that keeps everything is target attention; else it is target attention over the K best."""
    schema = full_schema(events=6, timestamps=False)
    inputs = history_of(random_inputs(schema, 3, 2), (1, 4, 6))
    events = np.asarray(inputs.user.histories["clicks"].events, np.float64)
    twin = encoder_of("twin_lite", schema, heads=2, selected=selected)
    early = encoder_of("twin_lite", schema, heads=2, selected=selected, values="all")
    read = encoder_of("target_attention", schema)
    nnx.update(read.read, nnx.state((lambda t: nnx.Dict(query=t.query, key=t.key, value=t.value, out=t.out))(twin)))
    found = in_float64(twin.__call__)(inputs).candidate
    np.testing.assert_allclose(in_float64(early.__call__)(inputs).candidate, found, rtol=1e-5, atol=1e-5)
    if selected > 6:
        np.testing.assert_allclose(in_float64(read.__call__)(inputs).candidate, found, rtol=1e-4, atol=1e-5)
    x = candidate_vector(inputs, schema)
    for r, length in enumerate((1, 4, 6)):
        for c in range(2):
            e, q = events[r, :length], dense(twin.query, x[r, c])
            k, v = dense(twin.key, e), dense(twin.value, e)
            best = np.argsort(-(k @ q), kind="stable")[:selected]
            expected = dense(twin.out, multi_head(q, k[best], v[best], 2))
            np.testing.assert_allclose(found[r, c, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", ["selected", "all"])
def test_cross_features_of_twin_bias_every_head(full_schema, values):
    """Split off in front of the projections; they take part in the selection as well."""
    schema = full_schema(events=6, timestamps=False)
    inputs = history_of(random_inputs(schema, 3, 2), (2, 4, 6))
    encoder = encoder_of("twin_lite", schema, heads=2, values=values, cross=("past_shop", "action"))
    found = in_float64(encoder.__call__)(inputs).candidate
    x, every = candidate_vector(inputs, schema), np.asarray(inputs.user.histories["clicks"].events, np.float64)
    changed = 0
    for r, length in enumerate((2, 4, 6)):
        e, numbers = every[r, :length, :6], [every[r, :length, 6:10], every[r, :length, 10:]]
        numbers = np.concatenate([dense(w, part) for w, part in zip(encoder.numbers, numbers, strict=True)], axis=-1)
        bias = (numbers @ np.asarray(encoder.beta[...])).T
        k, v = dense(encoder.key, e), dense(encoder.value, e)
        for c in range(2):
            q = dense(encoder.query, x[r, c])
            alone = k @ q / 2
            best = np.argsort(-(alone + bias.sum(0)), kind="stable")[:3]
            changed += set(best) != set(np.argsort(-alone, kind="stable")[:3])
            expected = dense(encoder.out, multi_head(q, k[best], v[best], 2, bias[:, best]))
            np.testing.assert_allclose(found[r, c, 0], expected, rtol=1e-4, atol=1e-5)
    assert changed  # else the bias would be tested in the second stage only


def test_selection_takes_the_newer_of_equals_and_no_padding():
    scores = jnp.asarray([[[1.0, 5.0, 1.0, 5.0, 9.0]]])
    valid = jnp.asarray([[[True, True, True, True, False]]])
    np.testing.assert_array_equal(twin_lite.select_events(scores, valid, 3), [[[1, 3, 0]]])
    assert twin_lite.select_events(scores, valid, 9).shape == (1, 1, 5)


@pytest.mark.parametrize("interleave", [False, True])
def test_hstu_follows_its_equations(full_schema, interleave):
    """One dense model over [candidate ; events] with an explicit mask, pair by pair; events may be two rows each."""
    schema, S, n = full_schema(events=6), 6, 1 + interleave
    flags = dict(interleave=True, actions=("past_shop",)) if interleave else {}
    encoder = encoder_of("hstu", schema, time_feature="none", **flags)
    inputs = history_of(random_inputs(schema, 2, 2), (4, 6))
    history, found = inputs.user.histories["clicks"], in_float64(encoder.__call__)(inputs).candidate
    x = candidate_vector(inputs, schema)
    for r, length in enumerate((4, 6)):
        events = np.asarray(history.events)[r, :length]
        rows_of_events = dense(encoder.embed, events if not interleave else events[:, [*range(6), 10, 11]])
        if interleave:  # the newest event's action, then its item, ...
            rows_of_events = np.stack([dense(encoder.embed_action, events[:, 6:10]), rows_of_events], axis=1)
            rows_of_events = rows_of_events.reshape(2 * length, -1)
        ages = np.concatenate([[0], np.repeat(np.asarray(history.delta_s)[r, :length], n)])
        bucket = np.clip(np.floor(np.log(np.maximum(1, np.abs(ages[:, None] - ages[None]))) / 0.301), 0, 59).astype(int)
        place = np.arange(n * length + 1)
        distance, visible = np.abs(place[:, None] - place[None]), place[None] >= place[:, None]
        for c in range(2):
            rows = np.concatenate([dense(encoder.target, x[r, c])[None], rows_of_events])
            for block in encoder.blocks:
                flat = layer_norm(rows, block.norm) @ np.asarray(block.kernel[...]) + np.asarray(block.bias[...])
                u, v, q, k = np.split(flat / (1 + np.exp(-flat)), np.cumsum([10, 10, 6]), axis=-1)
                q, k, v = (heads_of(y, 2) for y in (q, k, v))
                scores = np.einsum("ihd,jhd->hij", q, k)
                scores = scores + np.asarray(block.position[...])[distance] + np.asarray(block.time[...])[bucket]
                weights = scores / (1 + np.exp(-scores)) / (n * S + 1) * visible
                mixed = np.einsum("hij,jhd->ihd", weights, v).reshape(n * length + 1, -1)
                rows = rows + dense(block.out, layer_norm(mixed, block.out_norm) * u)
            np.testing.assert_allclose(found[r, c, 0], rows[0], rtol=1e-3, atol=1e-4)


def test_hstu_time_buckets():
    seconds = jnp.asarray([0, 1, 2, 5, 86_400, 2**31 - 1], jnp.int32)
    exact = np.log(np.maximum(1, np.asarray(seconds, np.float64))) / 0.301
    np.testing.assert_array_equal(hstu.time_bucket(seconds, 128), np.clip(np.floor(exact), 0, 127))
    np.testing.assert_array_equal(hstu.time_bucket(seconds, 8), np.clip(np.floor(exact), 0, 7))


def test_reordered_stca_is_stca(full_schema):
    schema = full_schema(events=6)
    inputs = history_of(random_inputs(schema, 3, 2), (0, 4, 6))
    found = []
    for kv in ("materialised", "reordered"):
        graph, state = nnx.split(encoder_of("stca", schema, kv=kv))

        def total(state, events, graph=graph, kv=kv):
            history = inputs.user.histories["clicks"].replace(events=events)
            token = nnx.merge(graph, state)(inputs.replace(user=inputs.user.replace(histories={"clicks": history})))
            return jnp.sum(jnp.sin(token.candidate)), token.candidate

        graded = in_float64(jax.grad(total, argnums=(0, 1), has_aux=True))
        found.append(jax.tree.leaves(graded(state, inputs.user.histories["clicks"].events)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(jnp.abs(one).max()))


def test_sasrec_reads_the_newest_row_of_a_causal_encoder(full_schema):
    """The last layer computes row 0 alone; the whole causal encoder agrees."""
    schema = full_schema(events=6)
    encoder = encoder_of("sasrec", schema)
    inputs = history_of(random_inputs(schema, 3, 2), (1, 4, 6))

    def whole(user):
        view = encoder.reader(user)
        x = encoder.positions(view._replace(events=encoder.embed(view.events))).events
        for block in encoder.blocks:
            x = block(x, sequence_transformer.Visible(block.keys(x), view.length, "causal"))
        return encoder.final_norm(x)[:, :1]

    found, expected = in_float64(lambda i: (encoder(i).user, whole(i.user)))(inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---- OneTrans-lite


def oldest_first(model, inputs, heads):
    """The published order, [events oldest first ; user tokens ; candidate tokens], j <= i, one candidate at a time:
    logits of every row in NumPy. All tokens of a side in reverse, so that index spaces are exact mirrors."""
    state = model.tokenizer.encode_user(inputs.user)
    own = np.asarray(model.tokenizer.candidate_tokens(state, inputs.candidates), np.float64)
    view = model.reader(inputs.user)
    events, lengths = np.asarray(model.embed(view.events), np.float64), np.asarray(view.length)
    users = np.asarray(state.tokens, np.float64)
    T_c, R, C, D = own.shape
    hidden = model.candidate[0].up.kernel.shape[-1]
    rms = lambda x, norm: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.gain[...])  # noqa: E731
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    logits = np.zeros((R, C, 2))
    for r, c in np.ndindex(R, C):
        n = lengths[r]
        x = np.concatenate([events[r, :n][::-1], users[:, r][::-1], own[:, r, c][::-1]])
        kinds = ["e"] * n + [("u", t) for t in reversed(range(len(users)))] + [("c", t) for t in reversed(range(T_c))]
        for layer in range(len(model.rows) - 1):
            x, kinds = (z[max(0, n - model.rows[layer]) :] for z in (x, kinds))
            n = min(n, model.rows[layer])

            def apply(name, rows, layer=layer, kinds=kinds):
                made = []
                for kind, row in zip(kinds, rows, strict=True):
                    last = layer == len(model.events)
                    if kind == "e" and last:
                        w = {"key": model.last_key, "value": model.last_value}.get(name)
                        made.append(np.zeros(hidden if name == "up" else D) if w is None else dense(w, row))
                        continue
                    block = (
                        model.events[layer]
                        if kind == "e"
                        else getattr(model, {"u": "user", "c": "candidate"}[kind[0]])[layer]
                    )
                    kernel = np.asarray(getattr(block, name).kernel[...])
                    kernel = kernel if kind == "e" else kernel[kind[1]]
                    made.append(row @ (kernel.T if name == "down" and kind != "e" else kernel))
                return np.stack(made)

            def norm(name, rows, layer=layer, kinds=kinds):
                made = []
                for kind, row in zip(kinds, rows, strict=True):
                    if kind == "e":
                        own_norm = model.last_norm if layer == len(model.events) else getattr(model.events[layer], name)
                    else:
                        own_norm = getattr(getattr(model, {"u": "user", "c": "candidate"}[kind[0]])[layer], name)
                    made.append(rms(row, own_norm))
                return np.stack(made)

            y = norm("attention_norm", x)
            q, k, v = (heads_of(apply(name, y), heads) for name in ("query", "key", "value"))
            scores = np.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
            scores = np.where(np.arange(len(x))[None] <= np.arange(len(x))[:, None], scores, -np.inf)
            o = np.einsum("hij,jhd->ihd", softmax(scores), v).reshape(len(x), -1)
            x = x + apply("out", o)
            x = x + apply("down", gelu(apply("up", norm("ffn_norm", x))))
        mean = np.mean([rms(row, model.final_norm) for kind, row in zip(kinds, x, strict=True) if kind != "e"], axis=0)
        kernel, bias = np.asarray(model.towers.kernels[0][...]), np.asarray(model.towers.biases[0][...])
        logits[r, c] = [mean @ kernel[y, :, 0] + bias[y, 0] for y in range(2)]
    return logits


def one_trans(full_schema, **config):
    schema = full_schema(events=40)
    made = freeze_config("onetrans_lite", {**dict(tokens=4, width=8, layers=3), **config})
    return schema, made, lambda: onetrans_lite.build(made, schema, rngs=nnx.Rngs(0))


def test_onetrans_is_the_mirror_of_the_published_order(full_schema):
    schema, _, make = one_trans(full_schema)
    model = filled(make)
    assert model.rows == (40, 32, 32, 0)
    inputs = history_of(random_inputs(schema, 2, 2), (3, 40))
    found = in_float64(model.__call__)(inputs).logits
    np.testing.assert_allclose(found, oldest_first(model, inputs, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_padding_is_invisible_to_onetrans(full_schema):
    """37 random columns beyond the length, through layers that cut rows."""
    S, lengths = 40, (0, 1, 31, 33, 40)
    made = freeze_config("onetrans_lite", dict(tokens=4, width=8, layers=2))
    model = filled(lambda: onetrans_lite.build(made, full_schema(events=S + 37), rngs=nnx.Rngs(0)))
    run = in_float64(lambda i: model(i).logits)
    inputs = history_of(random_inputs(full_schema(events=S), len(lengths), 2), lengths)
    expected = run(inputs)
    assert jnp.isfinite(expected).all()
    old = inputs.user.histories["clicks"]
    new = history_of(inputs, lengths, S + 37, seed=8).user.histories["clicks"]
    new = new.replace(events=new.events.at[:, :S].set(old.events), delta_s=new.delta_s.at[:, :S].set(old.delta_s))
    found = run(inputs.replace(user=inputs.user.replace(histories={"clicks": new})))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "flags", [dict(pyramid=False, layers=1, hidden=12), dict(tokenizer="group", tokens=None, layers=2)]
)
def test_onetrans_counts(full_schema, flags):
    schema, made, make = one_trans(full_schema, **flags)
    graph, state = nnx.split(nnx.eval_shape(make))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == onetrans_lite.count_params(made, schema).dense
    inputs, flops = random_inputs(schema, 2, 3), onetrans_lite.count_flops(made, schema)
    assert count_flops(lambda s, u: nnx.merge(graph, s).encode_user(u).layers, state, inputs.user) == 2 * flops.user
    assert (
        count_flops(lambda s, i: nnx.merge(graph, s)(i).logits, state, inputs) == 2 * flops.user + 6 * flops.candidate
    )


def test_published_layer_of_onetrans():
    """(1 + T) weight sets of 12 D^2, and the printed FLOPs without reuse, for a layer that keeps its event rows."""
    schema = plain_schema(64, 5, 6)
    made = [freeze_config("onetrans_lite", dict(layers=n, pyramid=False, width=8, tokens=1)) for n in (2, 3)]
    two, three = (onetrans_lite.count_flops(config, schema) for config in made)
    S, T, D = 64, 1, 8
    both = 4 * (S + T) * D**2 + 20 * (S + T) * D**2 + 4 * (S + T) * (S + T) * D
    hidden = 4 * S * T * D  # events never see feature tokens, so those blocks are never computed
    assert (three.user + three.candidate) - (two.user + two.candidate) == both - hidden
    params = [onetrans_lite.count_params(config, schema).dense for config in made]
    assert params[1] - params[0] == (1 + T) * 12 * D**2 + 4 * D


def test_pyramid():
    assert onetrans_lite.pyramid_rows(1190, 12, 6) == (1190, 960, 736, 512, 256, 32)
    assert onetrans_lite.pyramid_rows(7, 16, 3) == (7, 7, 7)
    assert onetrans_lite.pyramid_rows(100, 4, 2, pyramid=False) == (100, 100)


# ---- what they refuse


def test_contradicting_configs():
    schema = plain_schema(9, 5, 6)
    with pytest.raises(ValueError, match="exclude each other"):
        frozen("sequence_transformer", causal=True, target_in_sequence=True)
    with pytest.raises(ValueError, match="max_length has no effect without positions"):
        frozen("sequence_transformer", max_length=9, positions=False)
    for name in ("hstu", "sasrec", "sequence_transformer"):
        for most in (0, 5):
            with pytest.raises(ValueError, match=f"max_length is {most}, but the history has 9 events"):
                spec_of(name).count_params(frozen(name, max_length=most), schema)
    with pytest.raises(ValueError, match="interleave=True needs the event fields"):
        frozen("hstu", interleave=True)
    with pytest.raises(ValueError, match="actions names every event field"):
        spec_of("hstu").count_params(frozen("hstu", interleave=True, actions=("e",)), schema)
    with pytest.raises(ValueError, match="actions names f; the event fields of 'h' are e"):
        spec_of("hstu").count_params(frozen("hstu", interleave=True, actions=("f",)), schema)
    with pytest.raises(ValueError, match="cross names f; the event fields of 'h' are e"):
        spec_of("twin_lite").count_params(frozen("twin_lite", cross=("f",)), schema)
    with pytest.raises(ValueError, match="one that is not among them"):
        spec_of("twin_lite").count_params(frozen("twin_lite", cross=("e",)), schema)
    with pytest.raises(ValueError, match="does not divide into 3 attention heads"):
        build("target_attention", schema, dict(encoder=dict(heads=3)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="recent is 0"):
        build("stca", schema, dict(encoder=dict(recent=0)), rngs=nnx.Rngs(0))
