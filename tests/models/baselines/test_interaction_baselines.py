"""Wukong, HiFormer, AutoInt, DHEN-lite and MMoE: equations in NumPy, counts of every variant, identities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx

from recscale.models import build, count
from recscale.models.baselines.autoint import AutoIntConfig, InteractingLayer
from recscale.models.baselines.dhen_lite import DHENLayer, DHENLiteConfig
from recscale.models.baselines.hiformer import HiFormerConfig, HiFormerLayer
from recscale.models.baselines.wukong import FMBlock, WukongConfig, WukongLayer
from recscale.models.inputs import Field, Schema, reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.scaling.counting.abstract import train_program
from recscale.scaling.counting.jaxpr_flops import count_flops

T, B, D = 5, 3, 4


def scramble(module):
    """Every parameter drawn anew, so that zero biases and unit gains hide nothing; returns NumPy values by path."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    leaves = [normal(*leaf.shape, seed=i) / math.sqrt(max(leaf.shape[-2:])) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def run(module, *arguments):
    graph, state = nnx.split(module)
    return jax.tree.map(np.asarray, jax.jit(lambda s, *a: nnx.merge(graph, s)(*a))(state, *arguments))


def value(variable):
    return np.asarray(variable[...], np.float64)


def dense(x, layer):
    return x @ value(layer.kernel) + (0 if layer.bias is None else value(layer.bias))


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * value(norm.gain) + value(norm.bias)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(q, k, v, heads, scale):
    """q [B, Q, H*d], k [B, T, H*d], v [B, T, H*e] -> [B, Q, H*e], head by head."""
    split = [np.split(x, heads, axis=-1) for x in (q, k, v)]
    return np.concatenate([softmax(scale * a @ b.swapaxes(1, 2)) @ c for a, b, c in zip(*split, strict=True)], axis=-1)


def close(found, expected):
    """found is token-major, expected row-major."""
    np.testing.assert_allclose(found.swapaxes(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def x():
    """Tokens [T, B, D], and the same row-major in float64."""
    tokens = normal(T, B, D, seed=99)
    return tokens, np.asarray(tokens, np.float64).swapaxes(0, 1)


def token_schema(tokens, width, vocabulary=None):
    """Every field is a token."""
    fields = (Field(f"t{i}", "user" if i < 2 else "candidate", width, vocabulary) for i in range(tokens))
    return Schema(tuple(fields))


# --- one layer of each, transcribed


@pytest.mark.parametrize("attentive", [False, True])
@pytest.mark.parametrize("fm_tokens", [2, 3])
def test_wukong_layer(x, fm_tokens, attentive):
    """The residual is projected for T' = 4 and plain for T' = 5 = T; the machine multiplies in the other order."""
    tokens, X = x
    sizes = dict(fm_tokens=fm_tokens, linear_tokens=2, rank=3, hidden=6, hidden_layers=2)
    layer = scramble(WukongLayer(T, WukongConfig(width=D, **sizes, attentive=attentive), rngs=nnx.Rngs(0)))
    assert (layer.residual is None) == (fm_tokens == 3)
    fm = layer.fm
    P = value(fm.projection.kernel)
    if attentive:
        h = np.maximum(dense((X.swapaxes(1, 2) @ P).swapaxes(1, 2).reshape(B, -1), fm.attention.up), 0)
        P = dense(h, fm.attention.down).reshape(B, T, 3)
    z = layer_norm(((X @ X.swapaxes(1, 2)) @ P).reshape(B, -1), fm.norm)
    for part in fm.mlp.layers:
        z = np.maximum(dense(z, part), 0)
    linear = value(layer.linear.kernel).T @ X
    residual = X if layer.residual is None else value(layer.residual.kernel).T @ X
    y = np.concatenate([dense(z, fm.out).reshape(B, fm_tokens, D), linear], axis=1)
    close(run(layer, tokens), layer_norm(y + residual, layer.norm))


def test_wukong_never_forms_the_gram_matrix(x):
    block = FMBlock(T, WukongConfig(width=D, fm_tokens=2, rank=3, hidden=6), rngs=nnx.Rngs(0))
    graph, state = nnx.split(block)
    text = str(jax.make_jaxpr(lambda s, t: nnx.merge(graph, s)(t))(state, x[0]))
    assert f"f32[{B},{T},{T}]" not in text and f"f32[{B},{T},3]" in text


@pytest.mark.parametrize("scaled", [False, True])
def test_autoint_layer(x, scaled):
    tokens, X = x
    layer = scramble(InteractingLayer(D, AutoIntConfig(attention=6, scale_logits=scaled), rngs=nnx.Rngs(0)))
    q, k, v = (dense(X, part) for part in (layer.query, layer.key, layer.value))
    mixed = attention(q, k, v, 2, 3**-0.5 if scaled else 1.0)
    close(run(layer, tokens), np.maximum(mixed + dense(X, layer.residual), 0))


@pytest.mark.parametrize("modules", [("linear",), ("attention",), ("cross",), ("fm",), None], ids=str)
def test_dhen_layer(x, modules):
    tokens, X = x
    modules = modules or ("linear", "attention", "cross", "fm")
    ensemble = "weighted" if len(modules) > 1 else "sum"
    config = DHENLiteConfig(width=D, modules=modules, ensemble=ensemble, heads=2, rank=3, projections=2)
    layer = scramble(DHENLayer(T, config, rngs=nnx.Rngs(0)))
    flat, made = X.reshape(B, -1), []
    for name, module in zip(modules, layer.modules, strict=True):
        if name == "linear":
            made.append(value(module.kernel).T @ X)
        elif name == "attention":
            q, k, v = (dense(X, part) for part in (module.query, module.key, module.value))
            made.append(dense(attention(q, k, v, 2, 2**-0.5), module.out))
        elif name == "cross":
            made.append((flat * dense(dense(flat, module.inward), module.outward)).reshape(B, T, D))
        else:
            z = X @ (X.swapaxes(1, 2) @ value(module.projection.kernel))
            made.append(dense(z.reshape(B, -1), module.out).reshape(B, T, D))
    factors = value(layer.factors) if ensemble == "weighted" else [1.0]
    close(run(layer, tokens), layer_norm(X + sum(f * y for f, y in zip(factors, made, strict=True)), layer.norm))


def hiformer_layer(queries, norm_place="post"):
    sizes = dict(heads=2, key_width=3, value_width=2, key_rank=4, value_rank=6)
    config = HiFormerConfig(width=D, hidden=7, norm_place=norm_place, **sizes)
    return HiFormerLayer(T, queries, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("norm_place", ["post", "pre"])
@pytest.mark.parametrize("queries", [2, T])
def test_hiformer_layer(x, queries, norm_place):
    tokens, X = x
    layer = scramble(hiformer_layer(queries, norm_place))
    pre, part = norm_place == "pre", layer.attention
    seen = layer_norm(X, layer.attention_norm) if pre else X
    q, k, v = np.split(dense(seen.reshape(B, -1), part.compress), [4, 8], axis=-1)
    q, k, v = (
        dense(code, p).reshape(B, -1, n) for code, p, n in ((q, part.query, 6), (k, part.key, 6), (v, part.value, 4))
    )
    o = attention(q, k, v, 2, 3**-0.5)
    s = np.einsum("bqe,qed->bqd", o, value(part.out.kernel)) + X[:, T - queries :]
    s = s if pre else layer_norm(s, layer.attention_norm)
    h = layer_norm(s, layer.ffn_norm) if pre else s
    h = gelu(np.einsum("bqd,qdf->bqf", h, value(layer.ffn.up.kernel)) + value(layer.ffn.up.bias))
    y = np.einsum("bqf,qdf->bqd", h, value(layer.ffn.down.kernel)) + value(layer.ffn.down.bias) + s
    close(run(layer, tokens), y if pre else layer_norm(y, layer.ffn_norm))


def flat_rows(schema, inputs):
    """x [R*C, d_in], user fields first."""
    rows = inputs.candidates.fields[schema.candidate_fields[0].name].shape[:2]
    user = [np.repeat(np.asarray(inputs.user.fields[f.name]), rows[1], 0) for f in schema.user_fields]
    own = [np.asarray(inputs.candidates.fields[f.name]).reshape(rows[0] * rows[1], -1) for f in schema.candidate_fields]
    return np.concatenate([*user, *own], axis=-1).astype(np.float64)


def test_mmoe(schema):
    E, F1, F2, Y = 3, 5, 4, 2
    config = dict(experts=E, hidden=F1, expert_width=F2, tower=(6,))
    model = scramble(build("mmoe", schema, config, rngs=nnx.Rngs(0)))
    inputs = random_inputs(schema, 2, 3)
    rows = flat_rows(schema, inputs)
    first, second = value(model.first.kernel), value(model.second)
    experts = []
    for i in range(E):
        h = np.maximum(rows @ first[:, i * F1 : (i + 1) * F1] + value(model.first.bias)[i * F1 : (i + 1) * F1], 0)
        experts.append(np.maximum(h @ second[i] + value(model.bias)[i], 0))
    gates = (rows @ value(model.gate.kernel)).reshape(-1, Y, E)
    (up, down), (a, b) = (map(value, model.towers.kernels)), (map(value, model.towers.biases))
    for y in range(Y):
        mixed = sum(softmax(gates[:, y])[:, i : i + 1] * experts[i] for i in range(E))
        logit = np.maximum(mixed @ up[y] + a[y], 0) @ down[y] + b[y]
        np.testing.assert_allclose(run(model, inputs).logits[..., y].reshape(-1, 1), logit, rtol=1e-4, atol=1e-5)


# --- counts


VARIANTS = [
    ("wukong", dict(width=6, fm_tokens=3, linear_tokens=4, rank=2, hidden=9)),
    ("wukong", dict(width=5, layers=3, fm_tokens=2, linear_tokens=5, rank=3, hidden=7, hidden_layers=3)),
    ("wukong", dict(width=4, layers=1, attentive=True, hidden=7, head_mlp=(6, 5), tower=(3,))),
    ("autoint", dict(width=5, attention=6, layers=1)),
    ("autoint", dict(width=6, attention=9, heads=3, layers=3, scale_logits=True, tower=(4,))),
    ("autoint", dict(width=5, attention=6, tokenizer="cut", tokens=5)),
    ("dhen_lite", dict(width=6, layers=3, heads=2, rank=3, projections=2)),
    ("dhen_lite", dict(width=5, modules=("fm", "linear"), projections=3, ensemble="weighted", tower=(4,))),
    ("dhen_lite", dict(width=6, heads=3, modules=("cross", "attention"), rank=5, global_token=True)),
    ("hiformer", dict(width=6, layers=3, heads=2, key_width=3, value_width=2, key_rank=4, value_rank=5, hidden=7)),
    ("hiformer", dict(width=5, layers=1, heads=1, norm_place="pre", hidden=3, activation="relu", tower=(4,))),
    ("mmoe", dict(experts=1, hidden=3, expert_width=4, tower=())),
    ("mmoe", dict(experts=3, hidden=5, expert_width=4, tower=(6, 5), activation="gelu")),
]


@pytest.mark.parametrize("name, config", VARIANTS, ids=str)
@pytest.mark.slow
def test_every_variant_builds_counts_and_runs(schema, check_variant, name, config):
    check_variant(name, schema, config)


@pytest.mark.parametrize("name", ["wukong", "autoint", "dhen_lite", "hiformer"])
def test_gradients_of_raw_tokens_are_not_counted(name):
    """Raw numbers that are tokens as they are need no gradient, so the first layer's products cost less."""
    schema, sizes = token_schema(4, 6), dict(width=6, tokenizer="identity")
    counted = count(name, schema, sizes)
    function, arguments = train_program(name, schema, sizes, 1, 1)
    assert count_flops(function, *arguments) == counted.train_flops_per_row
    assert (counted.train_flops_per_row < 3 * counted.forward_flops_per_row) == (name != "hiformer")


def wukong_form(T, D, L, n, rank, F, m):
    params = flops = 0
    for t in [T, *[2 * n] * (L - 1)]:
        mlp = t * rank * F + (m - 1) * F * F + F * n * D
        params += 3 * t * rank + mlp + m * F + n * D + n * t + (t != 2 * n) * 2 * n * t + 2 * D
        flops += 4 * t * D * rank + 2 * mlp + 2 * n * t * D + (t != 2 * n) * 4 * n * t * D
    return params + 2 * n * D + 1, flops + 4 * n * D


def autoint_form(T, D, A, L):
    return 4 * D * A + 4 * (L - 1) * A * A + T * A + 1, 8 * T * A * (D + (L - 1) * A) + 4 * L * T * T * A + 2 * T * A


def hiformer_form(T, D, L, keys, values, rk, rv, F):
    T, params, flops = T + 1, 2 * D + 1, 2 * D
    for Q in [T] * (L - 1) + [1]:
        composite = rk * (2 * T * D + Q * keys + T * keys) + rv * (T * D + T * values)
        params += composite + Q * values * D + Q * (2 * D * F + F + D) + 4 * D
        flops += 2 * composite + 2 * Q * T * (keys + values) + 2 * Q * values * D + 4 * Q * D * F
    return params, flops


def dhen_form(T, D, L, rank, p):
    params = T * T + 4 * D * D + (2 * T * D * rank + T * D) + (T * p + T * p * T * D + T * D) + 2 * D
    flops = 2 * T * T * D + 8 * T * D * D + 4 * T * T * D + 4 * T * D * rank + 4 * T * D * p + 2 * T * p * T * D
    return L * params + T * D + 1, L * flops + 2 * T * D


@pytest.mark.parametrize(
    ("name", "config", "form"),
    [
        (
            "wukong",
            dict(width=16, layers=3, fm_tokens=4, linear_tokens=4, rank=5, hidden=24, hidden_layers=2),
            wukong_form(32, 16, 3, 4, 5, 24, 2),
        ),
        ("autoint", dict(width=24, attention=40, layers=3), autoint_form(32, 24, 40, 3)),
        (
            "hiformer",
            dict(width=16, layers=3, heads=4, key_width=2, value_width=8, key_rank=6, value_rank=20, hidden=9),
            hiformer_form(32, 16, 3, 8, 32, 6, 20, 9),
        ),
        ("dhen_lite", dict(width=24, layers=2, rank=10, projections=3), dhen_form(32, 24, 2, 10, 3)),
    ],
    ids=["wukong", "autoint", "hiformer", "dhen_lite"],
)
def test_closed_forms_of_token_models(name, config, form):
    counted = count(name, reference_schema(), config)
    width = config["width"]
    projection = 0 if width == 16 else 32 * 16 * width
    assert counted.tokenizer_params == (projection and projection + 32 * width)
    assert counted.dense_params - counted.tokenizer_params == form[0]
    assert counted.forward_flops_per_row - 2 * projection == form[1]


def test_closed_form_of_mmoe():
    E, F1, F2, F3, Y, d = 3, 20, 12, 7, 2, 512
    counted = count("mmoe", reference_schema(tasks=Y), dict(experts=E, hidden=F1, expert_width=F2, tower=(F3,)))
    experts = E * (d * F1 + F1 + F1 * F2 + F2)
    assert counted.dense_params == experts + Y * d * E + Y * (F2 * F3 + 2 * F3 + 1)
    gates = 2 * Y * d * E + 2 * Y * E * F2
    assert counted.forward_flops_per_row == 2 * E * (d * F1 + F1 * F2) + gates + 2 * Y * (F2 * F3 + F3)
    assert counted.active_params == counted.dense_params


# --- identities


def test_hiformer_last_layer_is_the_full_layer_restricted_to_the_task_tokens(x):
    tokens, _ = x
    full, pruned = scramble(hiformer_layer(T)), scramble(hiformer_layer(2))
    cut = lambda array: array[-2:]  # noqa: E731
    part, whole = pruned.attention, full.attention
    part.compress.kernel[...] = whole.compress.kernel[...]
    part.query.kernel[...] = whole.query.kernel[...].reshape(4, T, -1)[:, -2:].reshape(4, -1)
    part.key.kernel[...], part.value.kernel[...] = whole.key.kernel[...], whole.value.kernel[...]
    part.out.kernel[...] = cut(whole.out.kernel[...])
    for name in ("up", "down"):
        mine, theirs = getattr(pruned.ffn, name), getattr(full.ffn, name)
        mine.kernel[...], mine.bias[...] = cut(theirs.kernel[...]), cut(theirs.bias[...])
    for name in ("attention_norm", "ffn_norm"):
        mine, theirs = getattr(pruned, name), getattr(full, name)
        mine.gain[...], mine.bias[...] = theirs.gain[...], theirs.bias[...]
    np.testing.assert_allclose(run(pruned, tokens), run(full, tokens)[-2:], rtol=1e-5, atol=1e-6)


ORDER = np.asarray([0, 1, 4, 2, 3])  # user tokens stay user tokens


def permuted(array, axes, width=None):
    """The token axes of a weight in the new order; an axis of T*width entries is permuted in blocks."""
    array = np.asarray(array[...])
    for axis in axes:
        size = array.shape[axis] // T
        array = array.take((ORDER[:, None] * size + np.arange(size)).reshape(-1), axis=axis)
    return jnp.asarray(array)


@pytest.mark.parametrize("name", ["autoint", "dhen_lite"])
def test_permuting_tokens_with_their_weights_leaves_the_logit(name):
    schema = token_schema(T, D)
    sizes = dict(attention=6) if name == "autoint" else dict(rank=3, projections=2)
    model = scramble(build(name, schema, dict(width=D, tokenizer="identity") | sizes, rngs=nnx.Rngs(0)))
    inputs = random_inputs(schema, 2, 3)
    plain = run(model, inputs).logits
    own = {f"t{i}": inputs.candidates.fields[f"t{j}"] for i, j in enumerate(ORDER) if i >= 2}
    turned = inputs.replace(candidates=inputs.candidates.replace(fields=own))
    assert np.abs(run(model, turned).logits - plain).max() > 1e-3
    model.towers.kernels[0][...] = permuted(model.towers.kernels[0], [1])
    for block in model.blocks if name == "dhen_lite" else ():
        linear, _, cross, fm = block.modules
        axes = [
            (linear.kernel, [0, 1]),
            (cross.inward.kernel, [0]),
            (cross.outward.kernel, [1]),
            (cross.outward.bias, [0]),
            (fm.projection.kernel, [0]),
            (fm.out.kernel, [0, 1]),
            (fm.out.bias, [0]),
        ]
        for weight, where in axes:
            weight[...] = permuted(weight, where)
    np.testing.assert_allclose(run(model, turned).logits, plain, rtol=1e-4, atol=1e-5)


def test_mmoe_with_one_expert_is_an_mlp(schema):
    one = dict(experts=1, hidden=5, expert_width=4, tower=(3,))
    moe = scramble(build("mmoe", schema, one, rngs=nnx.Rngs(0)))
    mlp = scramble(build("dlrm_mlp", schema, dict(widths=(5, 4), tower=(3,)), rngs=nnx.Rngs(1)))
    mlp.first, mlp.towers = moe.first, moe.towers
    mlp.rest.layers[0].kernel[...], mlp.rest.layers[0].bias[...] = moe.second[...][0], moe.bias[...][0]
    inputs = random_inputs(schema, 2, 3)
    np.testing.assert_allclose(run(moe, inputs).logits, run(mlp, inputs).logits, rtol=1e-5, atol=1e-5)


def test_fields_are_projected_only_where_they_are_not_tokens_already():
    for vocabulary, tokenizer in ((40, 0), (None, 4 * (6 * 6 + 6))):
        assert count("autoint", token_schema(4, 6, vocabulary), dict(width=6)).tokenizer_params == tokenizer
    assert count("autoint", token_schema(4, 6, 40), dict(width=8)).tokenizer_params == 4 * (6 * 8 + 8)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("wukong", dict(rank=0), "rank is 0"),
        ("wukong", dict(head_mlp=(4, 0)), r"head_mlp is \(4, 0\)"),
        ("mmoe", dict(tower=(0,)), "tower is"),
        ("autoint", dict(attention=7), "attention=7 does not divide into 2 heads"),
        ("dhen_lite", dict(modules=("linear", "convolution")), "expected one or more of linear, attention, cross, fm"),
        ("dhen_lite", dict(modules=()), "expected one or more"),
        ("dhen_lite", dict(width=5, heads=2), "width 5 does not divide into 2"),
        ("hiformer", dict(key_rank=0), "key_rank is 0"),
        ("mmoe", dict(experts=0), "experts is 0"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(schema, name, config, message):
    with pytest.raises(ValueError, match=message):
        build(name, schema, config, rngs=nnx.Rngs(0))
