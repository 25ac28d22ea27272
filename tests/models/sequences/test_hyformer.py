"""HyFormer: a dense reference for every flag, separate histories, staged queries, padding, state, golden counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled
from flax import nnx

from recscale.models import build, count, freeze_config
from recscale.models.inputs import Events, Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.mixing import mix
from recscale.models.sequences.hyformer import plan_hyformer
from recscale.scaling.counting.abstract import abstract_model, forward_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

R, C = 3, 2
LENGTHS = {"clicks": (0, 4, 6), "buys": (3, 0, 1)}
SMALL = dict(tokens=6, width=12, hidden=10, query_hidden=5, seq_hidden=7, keep=3, head_dim=4)


def stream(name, columns, width, timestamps=False):
    return Sequence(name, columns, (Field(f"{name}_id", "user", width, 50),), timestamps=timestamps)


def golden_schema(streams=3, user=0):
    """Five groups of width 9, the first `user` of them user-side."""
    sides = ["user"] * user + ["candidate"] * (5 - user)
    fields = tuple(Field(f"x{i}", side, 9, 50, group=str(i)) for i, side in enumerate(sides))
    return Schema(fields, tuple(stream(f"s{i}", n, 6) for i, n in enumerate((11, 7, 5)[:streams])))


def small_schema(columns=(6, 3)):
    fields = (Field("u", "user", 5, 50), Field("v", "user", 3, 50), Field("x", "candidate", 7, 50))
    streams = (stream("clicks", columns[0], 6, timestamps=True), stream("buys", columns[1], 4))
    return Schema((*fields, Field("y", "cross", 4)), streams)


@functools.cache
def model_of(schema=None, **config):
    """A model whose parameters are all random, biases and gains too; nothing is compiled for them."""
    schema = schema or small_schema()
    return filled(lambda: build("hyformer", schema, SMALL | config, rngs=nnx.Rngs(0)))


def with_lengths(inputs, extra=0, **lengths):
    """Histories of the given lengths and `extra` more columns; everything beyond a length is random."""
    made = {}
    for name, old in inputs.user.histories.items():
        length = np.asarray(lengths.get(name, LENGTHS[name]))
        columns = old.events.shape[1]
        valid = np.arange(columns + extra)[None] < length[:, None]
        real = np.random.default_rng(3).standard_normal(old.events.shape)
        junk = np.random.default_rng(9).standard_normal((R, columns + extra, old.events.shape[2]))
        events = np.where(valid[..., None], np.pad(real, [(0, 0), (0, extra), (0, 0)]), junk)
        ages = np.cumsum(np.full(valid.shape, 3000), axis=1)
        delta_s = None if old.delta_s is None else jnp.asarray(ages, jnp.int32)
        made[name] = Events(jnp.asarray(events, jnp.float32), jnp.asarray(length, jnp.int32), delta_s)
    return inputs.replace(user=inputs.user.replace(histories=made))


@pytest.fixture(scope="module")
def inputs():
    return with_lengths(random_inputs(small_schema(), R, C))


# ---- one dense reference: requests and candidates one by one, no mask but slices of the valid events


def rms(norm, x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm.gain[...].reshape((1,) * (x.ndim - 1) + (-1,))


def heads_of(x):
    return x.reshape(x.shape[0], -1, 4).swapaxes(0, 1)


def attention(q, k, v, seen):
    """q [n, D], k and v [m, D], seen [n, m] -> [n, D]; zeros for a row that sees nothing."""
    if not k.shape[0]:
        return jnp.zeros_like(q)
    scores = jnp.where(seen[None], jnp.einsum("hnd,hmd->hnm", heads_of(q), heads_of(k)) / 2.0, -1e30)
    return jnp.einsum("hnm,hmd->hnd", jax.nn.softmax(scores, axis=-1), heads_of(v)).swapaxes(0, 1).reshape(q.shape)


def encode(layer, config, h):
    """H_{l-1} of valid events [n, D] -> H_l."""
    if config.encoder == "swiglu":
        x = rms(layer.norm, h)
        return h + layer.encoder.out(layer.encoder.up(x) * jax.nn.silu(layer.encoder.gate(x)))
    block, x = layer.encoder, rms(layer.encoder.attention_norm, h)
    rows = h[: config.keep] if config.encoder == "longer" else h
    n, m = rows.shape[0], h.shape[0]
    seen = np.arange(m)[None] >= np.arange(n)[:, None] if config.encoder_causal else np.ones((n, m), bool)
    rows = rows + block.out(attention(block.query(x[:n]), block.key(x), block.value(x), seen))
    return rows + block.down(jax.nn.gelu(block.up(rms(block.ffn_norm, rows)), approximate=True))


def reference(model, config, inputs):
    """Logits [R, C, 1]."""
    tokens = model.tokenizer.encode_user(inputs.user)
    z_all = model.tokenizer.join(tokens, model.tokenizer.candidate_tokens(tokens, inputs.candidates))
    z_all = z_all.reshape(-1, R, C, config.width)
    views = [reader(inputs.user) for reader in model.readers]
    user_tokens = 0 if tokens.tokens is None else tokens.tokens.shape[0]
    rows = []
    for r in range(R):
        lengths = [LENGTHS[reader.plan.sequence][r] for reader in model.readers]
        raw = [p(view.events[r])[:n] for p, view, n in zip(model.events, views, lengths, strict=True)]
        pools = [h.sum(0) / max(len(h), 1) for h in raw]
        for c in range(C):
            z = z_all[:, r, c]
            q = queries(model, config, z, user_tokens, pools)
            rows.append(decode_and_boost(model, config, q, z, raw))
    return model.towers(jnp.stack(rows)).reshape(R, C, -1)


def queries(model, config, z, user_tokens, pools):
    made, generator = [], model.generator
    for i in range(len(pools) * config.queries):
        read = {"all": pools, "own": [pools[i // config.queries]], "none": []}[config.query_pools]
        sources = [*z[:user_tokens], *read] if config.query_sources == "all" else []
        info = jnp.concatenate([*sources, *z[user_tokens:]])
        hidden = jax.nn.silu(info @ generator.kernel[...][i] + generator.bias[...][i])
        made.append(hidden @ generator.out.kernel[...][i] + generator.out.bias[...][i])
    return jnp.stack(made)


def decode_and_boost(model, config, q, z, raw):
    first, hs = z, list(raw)
    for streams, boost in zip(model.streams, model.boosts, strict=True):
        decoded = []
        for j, layer in enumerate(streams):
            hs[j] = encode(layer, config, raw[j] if config.encoder_input == "raw" else hs[j])
            own, x = q[j * config.queries : (j + 1) * config.queries], rms(layer.history_norm, hs[j])
            seen = np.ones((own.shape[0], x.shape[0]), bool)
            found = attention(layer.query(rms(layer.query_norm, own)), layer.key(x), layer.value(x), seen)
            decoded.append(layer.out(found) + own * config.decode_residual)
        x = jnp.concatenate([*decoded, z if config.ns_flow == "updated" else first])
        x = x + boost.ffn(rms(boost.mixed_norm, mix(rms(boost.token_norm, x), x.shape[0]))[:, None])[:, 0]
        q, z = x[: q.shape[0]], x[q.shape[0] :]
    return rms(model.norm, q if config.readout == "queries" else x).reshape(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(encoder="full", encoder_causal=True, ns_flow="raw", decode_residual=False),
        dict(encoder="swiglu", split_info=False, queries=2, tokens=6, query_pools="own", readout="queries"),
        dict(encoder_input="raw", query_pools="none", encoder_causal=True),
        dict(encoder="full", query_sources="target", sequences=("buys",), tokens=4),
    ],
    ids=str,
)
def test_staged_model_equals_the_dense_reference(inputs, config):
    model, frozen = model_of(**config), freeze_config("hyformer", SMALL | config)
    staged = jax.jit(lambda i: model.score(model.encode_user(i.user), i.candidates).logits)(inputs)
    dense = reference(model, frozen, inputs)
    np.testing.assert_allclose(staged, dense, rtol=1e-5, atol=2e-5 * float(jnp.abs(dense).max()))


@pytest.mark.slow
def test_splitting_the_queries_inputs_is_exact(inputs):
    split, whole = model_of(), model_of(split_info=False)
    for a, b in zip(*(jax.tree.leaves(nnx.split(m)[1]) for m in (split, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    found, expected = (jax.jit(lambda i, m=m: m(i).logits)(inputs) for m in (split, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# ---- what depends on what


@pytest.mark.parametrize(
    ("config", "own", "other"),
    [(dict(), True, True), (dict(query_pools="own"), True, False), (dict(query_sources="target"), False, False)],
    ids=str,
)
def test_queries_read_the_histories_they_should(inputs, config, own, other):
    """Query j against history i at the start: through the pools alone."""
    model = model_of(**config)

    @jax.jit
    @jax.jacrev
    def first_queries(events):
        histories = {n: inputs.user.histories[n].replace(events=events[n]) for n in events}
        user = inputs.user.replace(histories=histories)
        state = model.encode_user(user)
        own = model.tokenizer.candidate_tokens(state.tokens, inputs.candidates)
        own = own.reshape(own.shape[0], R * C, -1).swapaxes(0, 1).reshape(R * C, -1)
        return model.generator(state.info, own, R).sum(axis=(1, 2))

    jacobian = first_queries({n: h.events for n, h in inputs.user.histories.items()})
    touched = np.stack([np.abs(jacobian[n]).max(axis=(1, 2, 3)) > 0 for n in ("clicks", "buys")])
    np.testing.assert_array_equal(touched, np.where(np.eye(2, dtype=bool), own, other))


def test_histories_are_encoded_apart(inputs):
    """Keys of one history never change with another; under encoder_causal row i sees no newer event."""
    model = model_of(encoder="full", encoder_causal=True)
    encode_keys = jax.jit(lambda i: model.encode_user(i.user).keys)
    full = with_lengths(inputs, clicks=(6, 6, 6), buys=(3, 3, 3))
    plain, histories = encode_keys(full), full.user.histories
    clicks = histories["clicks"].replace(events=histories["clicks"].events.at[:, 2].add(1.0))
    moved = encode_keys(full.replace(user=full.user.replace(histories={**histories, "clicks": clicks})))
    for before, after in zip(plain, moved, strict=True):
        np.testing.assert_array_equal(before[1].k, after[1].k)
        changed = np.abs(np.asarray(before[0].k - after[0].k)).max(axis=(0, 2, 3)) > 0
        np.testing.assert_array_equal(changed, np.arange(6) <= 2)


def test_longer_keeps_the_newest(inputs):
    model = model_of(layers=3)
    state = jax.eval_shape(model.encode_user, inputs.user)
    assert [[kv.k.shape[1] for kv in layer] for layer in state.keys] == [[3, 3]] * 3
    assert [
        [kv.k.shape[1] for kv in layer] for layer in jax.eval_shape(model_of(keep=4).encode_user, inputs.user).keys
    ] == [[4, 3]] * 2


# ---- lengths and padding


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["full", "longer"])
def test_columns_beyond_the_length_change_nothing(inputs, encoder):
    model = model_of(schema=small_schema((43, 40)), encoder=encoder)
    forward = jax.jit(lambda i: model(i).logits)
    for lengths in (dict(clicks=(0, 2, 3), buys=(0, 0, 3)), dict(clicks=(4, 5, 6), buys=(1, 2, 3))):
        plain = forward(with_lengths(inputs, **lengths))
        assert jnp.isfinite(plain).all()
        for extra in (1, 37):
            np.testing.assert_allclose(forward(with_lengths(inputs, extra, **lengths)), plain, rtol=1e-5, atol=1e-5)


# ---- reuse


def test_state_is_what_is_needed_and_can_be_stored(inputs, tmp_path):
    model = model_of()
    encode_user, score = jax.jit(model.encode_user), jax.jit(lambda s, c: model.score(s, c).logits)
    state = encode_user(inputs.user)
    leaves, tree = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *map(np.asarray, leaves))
    with np.load(tmp_path / "state.npz") as stored:
        again = jax.tree.unflatten(tree, [jnp.asarray(stored[name]) for name in stored.files])
    np.testing.assert_array_equal(score(again, inputs.candidates), score(state, inputs.candidates))
    D, L, J, K, T_u, F_q = 12, 2, 2, 3, 2, 5
    assert sum(leaf.size for leaf in leaves) == R * (2 * L * J * K * D + T_u * D + J * F_q + J)


def test_scoring_holds_no_history_per_candidate():
    """64 candidates over 512 events: temporaries of the compiled `score` stay below one array [R, C, S, D]."""
    schema, candidates = small_schema((512, 3)), 64
    model, made = abstract_model("hyformer", schema, SMALL | dict(encoder="full")), random_inputs(schema, 1, candidates)
    graph, params = nnx.split(model)
    state = jax.eval_shape(lambda p: nnx.merge(graph, p).encode_user(made.user), params)
    score = jax.jit(lambda p, s: nnx.merge(graph, p).score(s, made.candidates).logits)
    temporary = score.lower(params, state).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * candidates * 512 * 12


def test_a_candidate_costs_little_more_on_a_longer_history():
    short, long = (count("hyformer", golden_schema(), dict(keep=4, width=32, recent=n)) for n in (5, 11))
    assert short.forward_flops_candidate == long.forward_flops_candidate
    assert short.forward_flops_user < long.forward_flops_user


# ---- counts


@pytest.mark.parametrize(
    ("encoder", "params", "request_flops", "candidate_flops"),
    [
        ("full", 246_596, 1_377_664, 316_224),
        ("longer", 246_596, 759_936, 313_408),
        ("swiglu", 183_236, 373_888, 316_224),
    ],
)
def test_golden_integers(encoder, params, request_flops, candidate_flops):
    config = dict(width=32, tokenizer="group", keep=4, seq_hidden=20, query_hidden=12, encoder=encoder)
    schema, head = golden_schema(), 8 * 32
    for split in (False, True):
        counted = count("hyformer", schema, config | dict(split_info=split))
        moved = split * 2 * 3 * 3 * 32 * 12  # the pools' part of the queries
        assert counted.dense_params - counted.head_params == params
        assert counted.forward_flops_user == request_flops + moved
        assert counted.forward_flops_candidate == candidate_flops + 2 * head - moved
    function, arguments = forward_program("hyformer", schema, config, 2, 3)
    assert count_flops(function, *arguments) == 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate


@pytest.mark.parametrize(
    "config",
    [
        dict(encoder="full", queries=2, tokens=6, width=18, head_dim=None),
        dict(encoder_input="raw", tower=(4,), activation="gelu_erf", global_token=True),
        dict(query_pools="own", split_info=False, recent=2, time_feature="none"),
        dict(query_sources="target", ns_flow="raw", readout="queries", implementation="reference"),
        dict(encoder="swiglu", encoder_input="raw", decode_residual=False, sequences=("buys", "clicks")),
        dict(hidden=None, seq_hidden=None, query_hidden=None, layers=1, init="xavier_normal"),
    ],
    ids=str,
)
def test_every_flag_counts(config):
    schema, config = small_schema(), SMALL | config
    counted = count("hyformer", schema, config)
    assert tree_params(abstract_model("hyformer", schema, config)) == counted.dense_params
    function, arguments = forward_program("hyformer", schema, config, 2, 3)
    assert count_flops(function, *arguments) == 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate
    assert jax.eval_shape(function, *arguments).shape == (2, 3, 1)


def test_published_tokens_preset():
    groups = tuple(Field(f"g{i}", "user" if i < 6 else "candidate", 4, 50, group=str(i)) for i in range(13))
    schema = Schema(groups, tuple(stream(f"s{i}", n, 6) for i, n in enumerate((1000, 50, 50))))
    plan = plan_hyformer(freeze_config("hyformer_tokens"), schema)
    assert (plan.T, plan.fields.tokens, plan.Q) == (16, 13, 3)
    assert plan_hyformer(freeze_config("hyformer_tokens", dict(tokenizer="group")), schema).T == 16


@pytest.mark.parametrize("target", [3e4, 1e6, 1e8])
def test_sizes_near_a_target(target, small_config):
    schema = small_schema()
    config = small_config("hyformer", schema, target)
    assert set(config) == {"tokens", "width", "hidden"} and config["width"] % config["tokens"] == 0
    assert abs(count("hyformer", schema, config).dense_params / target - 1) < 0.1


# ---- what it refuses


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(head_dim=5), "width 12 is no multiple of head_dim 5"),
        (dict(tokens=None, tokenizer="field", width=16, head_dim=4), "T is 6 .4 field tokens, 2 queries.*width 16"),
        (dict(tokens=None, width=13, head_dim=13), "from 4 to 6, 2 queries included, divides width 13"),
        (dict(encoder="swiglu", encoder_causal=True), "has no attention"),
        (dict(sequences=("views",)), "'views', but the schema's histories are clicks, buys"),
        (dict(keep=0), "keep is 0"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(config, message):
    with pytest.raises(ValueError, match=message):
        count("hyformer", small_schema(), SMALL | config)


def test_it_needs_a_history_and_takes_no_encoder():
    with pytest.raises(ValueError, match="no sequences"):
        count("hyformer", dataclasses.replace(small_schema(), sequences=()))
    with pytest.raises(ValueError, match="hyformer reads the histories itself, so nothing goes in front of it"):
        count("longer+hyformer", small_schema())
    one = dataclasses.replace(small_schema(), sequences=small_schema().sequences[:1])
    assert count("hyformer", one, dict(width=120)).dense_params > 0
