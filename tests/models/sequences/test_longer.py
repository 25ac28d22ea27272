"""LONGER: its mask against a dense one-shot model, candidate independence, counts, sampling, padding, memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled, history_of
from flax import nnx

from recscale.models import count
from recscale.models.inputs import Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.history_attention import block_flops, block_params
from recscale.models.registry import freeze_config
from recscale.models.sequences import longer
from recscale.models.sequences.longer import LONGER, LongerConfig, sample_positions
from recscale.scaling.counting.abstract import train_program
from recscale.scaling.counting.jaxpr_flops import count_flops

# Two heads of inner blocks and of layers, a group size that no length below divides into, three merged rows.
SMALL = dict(event_width=4, merge=3, inner_heads=2, head_dim=6, queries=3, layers=2)


def golden_schema(length=23, user=(12, 12)):
    def field(name, side, width):
        return Field(name, side, width, vocabulary=50)

    users = tuple(field(f"u{i}", "user", width) for i, width in enumerate(user))
    return Schema((*users, field("x", "candidate", 12)), (Sequence("h", length, (field("e", "user", 10),)),))


def build_of(schema, **config):
    return LONGER.build(freeze_config("longer", dict(encoder=config))[0], schema, rngs=nnx.Rngs(0))


def encoder_of(schema, **config):
    """An encoder whose parameters are all random, biases and gains too; nothing is compiled for them."""
    return filled(lambda: build_of(schema, **config))


# ---- the mask, against one dense model over the whole index space


def dense_mask(index, keys, n_valid, m):
    """bool [R, rows, keys]: key j visible to row i iff j >= i and, for an event, it is valid. index [R, rows]."""
    j = np.arange(keys)
    valid = (j < m)[None] | (j[None] - m < np.asarray(n_valid)[:, None])
    return (j[None, None] >= index[:, :, None]) & valid[:, None]


def dense_rows(encoder, inputs, config):
    """Every row of every layer, [R, C, m + K, D], from one-shot attention with an explicit mask; and the last norm."""
    user, fields = inputs.user, inputs.candidates.fields
    h, _ = encoder.front(encoder.reader(user))
    R, C = next(iter(fields.values())).shape[:2]
    ((_, history),) = user.histories.items()
    lengths = -(-np.asarray(history.length) // config.merge)
    candidate = encoder.candidate_globals(fields, (R, C))
    users = jnp.broadcast_to(encoder.user_globals(user.fields, (R,))[:, None], (R, C, 3, h.shape[-1]))
    order = [users, candidate] if config.globals_order == "user_first" else [candidate, users]
    m, K = users.shape[2] + candidate.shape[2], min(config.queries, h.shape[1])
    with jax.ensure_compile_time_eval():
        position = np.asarray(sample_positions(config.query_strategy, K, jnp.asarray(lengths)))
    keys = jnp.concatenate([*order, jnp.broadcast_to(h[:, None], (R, C, *h.shape[1:]))], axis=2)
    index = np.concatenate([np.broadcast_to(np.arange(m), (R, m)), m + position], axis=1)
    rows = jnp.stack([keys[r][:, np.minimum(index[r], keys.shape[2] - 1)] for r in range(R)])
    masks = [dense_mask(index, keys.shape[2], lengths, m)]
    later = dense_mask(np.broadcast_to(np.arange(m + K), (R, m + K)), m + K, np.minimum(lengths, K), m)
    masks += [later] * (len(encoder.blocks) - 1)
    if config.seq_sees_user_globals:
        first = m - users.shape[2]
        for mask in masks:
            mask[:, m:, first:m] = True
    every = []
    for block, mask in zip(encoder.blocks, masks, strict=True):
        rows = dense_block(block, rows, keys, jnp.asarray(mask)[:, None, None])
        keys = rows
        every.append(rows)
    return every, encoder.final_norm(rows)


def dense_block(block, rows, keys, mask):
    split = lambda x: x.reshape(*x.shape[:-1], block.heads, -1)  # noqa: E731
    q = split(block.query(block.attention_norm(rows)))
    k, v = (split(f(block.attention_norm(keys))) for f in (block.key, block.value))
    scores = jnp.einsum("rcihd,rcjhd->rchij", q, k) * q.shape[-1] ** -0.5
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), 0.0)
    o = jnp.einsum("rchij,rcjhd->rcihd", weights, v)
    read = block.out(o.reshape(*o.shape[:3], -1))
    x = rows + (read if block.output_norm is None else block.output_norm(read))
    return x + block.down(jax.nn.gelu(block.up(block.ffn_norm(x))))


CASES = {
    "recent": dict(),
    "uniform": dict(query_strategy="uniform", n_global=(2, 3)),
    "half": dict(query_strategy="recent_uniform", layers=3, inner=0),
    "user first": dict(globals_order="user_first"),
    "events see users": dict(seq_sees_user_globals=True, norm="rms", use_bias=False),
    "newest row": dict(readout="globals_newest", output_norm=True, query_strategy="uniform"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_staged_is_the_dense_model(full_schema, case):
    schema = full_schema(events=14)
    config = LongerConfig(**{**SMALL, **CASES[case]})
    encoder = encoder_of(schema, **{**SMALL, **CASES[case]})
    inputs = history_of(random_inputs(schema, 4, 2), (0, 4, 9, 14))
    m_c, first_user = config.n_global[0], config.globals_order == "user_first"
    m = m_c + 3

    def squares(fields, first, end):
        """Sum of squares of the rows first..end of all layers; the staged tokens and the dense model's last rows."""
        given = inputs.replace(candidates=inputs.candidates.replace(fields=fields))
        every, last = dense_rows(encoder, given, config)
        return sum(jnp.sum(rows[:, :, first:end] ** 2) for rows in every), (encoder(given), last)

    graded = jax.jit(jax.grad(squares, has_aux=True), static_argnums=(1, 2))
    kept_rows = m if first_user else m_c
    grads, (tokens, last) = graded(inputs.candidates.fields, kept_rows, None)
    events = last[:, 0, m:]
    kept = np.minimum(-(-np.asarray([0, 4, 9, 14]) // 3), 1 if config.readout == "globals_newest" else 3)
    mean = np.stack([np.asarray(events[r, :n]).sum(0) / max(n, 1) for r, n in enumerate(kept)])
    np.testing.assert_allclose(tokens.user[:, -1], mean, rtol=1e-4, atol=1e-5)
    if first_user:
        np.testing.assert_allclose(tokens.candidate, last[:, :, :m], rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(tokens.candidate, last[:, :, :m_c], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(tokens.user[:, :-1], last[:, 0, m_c:m], rtol=1e-4, atol=1e-5)

    # In the dense model, where candidates share an index space with everything, they still change no cached row.
    assert all((np.asarray(g) == 0.0).all() for g in jax.tree.leaves(grads))
    if first_user:
        users, _ = graded(inputs.candidates.fields, 0, 3)
        assert all((np.asarray(g) != 0.0).any() for g in jax.tree.leaves(users))


@pytest.mark.slow
def test_worked_mask_table():
    """m = 3 globals, 5 merged events, K = 2: 30 visible pairs of 40 at 5 valid events, 25 at 4; 15 of 25 later."""
    index = np.asarray([[0, 1, 2, 3, 4]])
    assert dense_mask(index, 8, [5], 3).sum() == 30
    assert dense_mask(index, 8, [4], 3).sum() == 25
    assert dense_mask(index, 5, [2], 3).sum() == 15
    # The same counts from the model: which input of layer 1 acts on which of its rows.
    schema = golden_schema(length=5, user=(12,))
    config = dict(merge=1, event_width=4, inner=0, layers=1, queries=2, n_global=(1, 2), readout="flatten_all")
    encoder = encoder_of(schema, **config)
    graph, params = nnx.split(encoder)
    for length, pairs in ((5, 30), (4, 25)):
        inputs = history_of(random_inputs(schema, 1, 1), (length,))

        def rows(values, inputs=inputs):
            events, free, user, candidate = values
            model = nnx.merge(graph, params, copy=True)
            model.user_globals.free[1][...] = free
            history = inputs.user.histories["h"].replace(events=events)
            tokens = model.encode_user(inputs.user.replace(histories={"h": history}, fields={"u0": user}))
            own = model.candidate_tokens(tokens.cache, inputs.candidates.replace(fields={"x": candidate}))
            return jnp.concatenate([own[0, 0], tokens.tokens[0]])

        values = (
            inputs.user.histories["h"].events,
            encoder.user_globals.free[1][...],
            inputs.user.fields["u0"],
            inputs.candidates.fields["x"],
        )
        events, free, user, candidate = jax.jit(jax.jacrev(rows))(values)
        acts = [np.abs(np.asarray(g)).reshape(5, -1).max(1) > 0 for g in (candidate, user, free)]
        acts += list((np.abs(np.asarray(events)).max(axis=(1, 4)) > 0)[:, 0].T)
        assert np.stack(acts).sum() == pairs


def test_inner_blocks_may_start_as_nothing(full_schema):
    schema = full_schema(events=14)
    reader, h = build_of(schema, **SMALL).reader, []
    inputs = history_of(random_inputs(schema, 2, 1), (4, 14))
    for change in (dict(inner=0), dict(inner_init=0.0), dict(inner_init=0.1)):
        h.append(build_of(schema, **SMALL, **change).front(reader(inputs.user))[0])
    np.testing.assert_array_equal(h[0], h[1])
    assert 0 < np.abs(h[2] - h[0]).max() < 0.3


# ---- sampling


def test_sampled_positions():
    lengths = jnp.asarray([0, 2, 4, 5, 10], jnp.int32)
    np.testing.assert_array_equal(sample_positions("uniform", 4, lengths)[3:], [[0, 1, 2, 3], [0, 2, 5, 7]])
    np.testing.assert_array_equal(sample_positions("recent_uniform", 4, lengths)[4], [0, 1, 2, 6])
    for strategy in ("recent", "uniform", "recent_uniform"):
        found = np.asarray(sample_positions(strategy, 4, lengths))
        np.testing.assert_array_equal(found[:3], np.broadcast_to(np.arange(4), (3, 4)))  # all there is
        assert (np.diff(found, axis=1) > 0).all() and (found[3:] < np.asarray(lengths)[3:, None]).all()


# ---- counts


def test_golden_integers():
    config = dict(event_width=8, merge=4, max_length=64, n_global=(1, 2), queries=3, layers=3, cls=False, head_dim=8)
    frozen = LongerConfig(**config)
    flops = longer.count_flops(frozen, golden_schema())
    assert longer.count_params(frozen, golden_schema()).dense == 41_096
    assert (flops.user, flops.candidate) == (438_240, 77_184)
    assert mono(frozen, golden_schema()) == 519_648


def mono(config, schema):
    """FLOPs of one row when nothing is reused (the dense model of the test above)."""
    plan = longer.plan_longer(config, schema)
    events, candidate, user, merged, K = plan.events, plan.candidate, plan.user, plan.merged, plan.queries
    D, N, m = config.width, sum(config.n_global) + merged, sum(config.n_global)
    q = m + K
    fields = sum(field.width for fields in (*candidate, *user) for field in fields)
    first = 20 * q * D**2 + 4 * N * D**2 + 4 * q * N * D
    later = (config.layers - 1) * (24 * q * D**2 + 4 * q * q * D)
    return longer.front_flops(config, events) + 2 * fields * D + first + later


@pytest.mark.parametrize("length, queries, n_global", [(23, 3, (1, 3)), (40, 7, (2, 3)), (5, 9, (1, 1))])
def test_reuse_saves_exactly_the_hidden_blocks(full_schema, length, queries, n_global):
    schema, config = full_schema(events=length), LongerConfig(**{**SMALL, "queries": queries}, n_global=n_global)
    flops = longer.count_flops(config, schema)
    K, (m_c, m_u) = longer.plan_longer(config, schema).queries, n_global
    hidden = 4 * config.width * config.layers * (m_c * (m_u + K) + m_u * K)
    assert mono(config, schema) == flops.user + flops.candidate + hidden


def test_published_cost_of_merging():
    def layer(length, width):
        return block_flops(width, length, length, length * length)

    S, A, P = 2048, 32, 4
    assert (layer(S, A), layer(S // P, P * A)) == (587_202_560, 335_544_320)
    assert block_params(A) == 12 * A**2 + 13 * A and block_params(A, norm="rms", use_bias=False) == 12 * A**2 + 2 * A
    for S, A, P in itertools.product((512, 2048), (8, 32), (2, 4, 8)):
        assert layer(S // P, P * A) * (6 * A + S) * P == layer(S, A) * (6 * A * P + S // P) * P


FLAGS = [
    dict(n_global=(2, 3), inner=2, inner_extra_residual=True),
    dict(n_global=(1, 0), readout="globals", cls=False),
    dict(n_global=(2, 5), query_strategy="learnable", readout="flatten_all"),
    dict(globals_order="user_first", time_feature="none", merge=1, inner=0),
    dict(seq_sees_user_globals=True, norm="rms", use_bias=False, activation="silu"),
    dict(queries=None, query_share=1.0, max_length=11, remat=True, init="xavier_normal", layers=1),
    dict(recent=6, readout="globals", layers=1, implementation="reference"),
    dict(readout="globals_newest", output_norm=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag_counts(full_schema, flags):
    # Raw numbers instead of looked-up fields wherever candidates are one global: their gradients are not needed.
    schema, config = full_schema(events=13, dense="n_global" not in flags), {**SMALL, **flags}
    frozen = LongerConfig(**config)
    graph, state = nnx.split(nnx.eval_shape(lambda: build_of(schema, **config)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == longer.count_params(frozen, schema).dense
    inputs, flops = random_inputs(schema, 2, 3), longer.count_flops(frozen, schema)
    cached = lambda s, u: nnx.merge(graph, s).encode_user(u)  # noqa: E731
    assert count_flops(cached, state, inputs.user) == 2 * flops.user
    assert count_flops(lambda s, i: nnx.merge(graph, s)(i), state, inputs) == 2 * flops.user + 6 * flops.candidate
    tokens = jax.eval_shape(lambda s, i: nnx.merge(graph, s)(i), state, inputs)
    shape = longer.token_shape(frozen, schema)
    for found, expected in ((tokens.user, shape.user), (tokens.candidate, shape.candidate)):
        assert (0 if found is None else found.shape[-2]) == expected
        assert found is None or found.shape[-1] == shape.width
    both = dict(encoder=config, backbone=dict(widths=(4,)))
    function, arguments = train_program("longer", schema, both, 1, 1)
    assert count_flops(function, *arguments) == count("longer", schema, both).train_flops_per_row


@pytest.mark.slow
def test_readouts_are_finite(full_schema):
    schema = full_schema(events=13)
    inputs = history_of(random_inputs(schema, 3, 2), (0, 5, 13))
    for flags in FLAGS[1:4]:
        tokens = jax.jit(encoder_of(schema, **{**SMALL, **flags}).__call__)(inputs)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tokens))


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(full_schema):
    schema = full_schema(events=13)
    inputs = history_of(random_inputs(schema, 2, 2), (5, 13))
    found = []
    for remat in (False, True):
        graph, state = nnx.split(encoder_of(schema, **SMALL, remat=remat))
        total = lambda s, g=graph: sum(jnp.sum(x**2) for x in nnx.merge(g, s)(inputs))  # noqa: E731
        found.append(jax.jit(jax.grad(total))(state))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# ---- padding and order


@pytest.mark.slow
@pytest.mark.parametrize("strategy, extras", [("recent", (1, 3, 37)), ("uniform", (37,))])
def test_padding_is_invisible(full_schema, strategy, extras):
    """Random columns beyond the length change nothing, at lengths around every multiple of P and K*P."""
    P, K, S = 3, 3, 13
    encoder = encoder_of(full_schema(events=S + 37), **{**SMALL, "query_strategy": strategy})
    lengths = (0, 1, P - 1, P, P + 1, K * P - 1, K * P, K * P + 1, S - 1, S)
    inputs = history_of(random_inputs(full_schema(events=S), len(lengths), 2), lengths)
    run = jax.jit(lambda i: encoder(i))
    expected = run(inputs)
    for extra in extras:
        wide = history_of(inputs, lengths, S + extra, seed=extra)
        ((name, old),) = inputs.user.histories.items()
        new = wide.user.histories[name]
        new = new.replace(events=new.events.at[:, :S].set(old.events), delta_s=new.delta_s.at[:, :S].set(old.delta_s))
        found = run(inputs.replace(user=inputs.user.replace(histories={name: new})))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_empty_history_has_finite_gradients(full_schema):
    schema = full_schema(events=13)
    inputs = history_of(random_inputs(schema, 2, 2), (0, 0))
    graph, state = nnx.split(encoder_of(schema, **SMALL))
    grads = jax.jit(jax.grad(lambda s: sum(jnp.sum(x**2) for x in nnx.merge(graph, s)(inputs))))(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_order_matters_and_groups_hang_on_the_newest_event(full_schema):
    schema = full_schema(events=12, timestamps=False)
    encoder = encoder_of(schema, **SMALL)
    inputs = history_of(random_inputs(schema, 1, 1), (12,))
    ((name, old),) = inputs.user.histories.items()
    turned = inputs.replace(user=inputs.user.replace(histories={name: old.replace(events=old.events[:, ::-1])}))
    run = jax.jit(lambda i: (encoder(i), *encoder.front(encoder.reader(i.user))))
    tokens, h, _ = run(inputs)
    assert float(jnp.abs(run(turned)[0].candidate - tokens.candidate).max()) > 1e-3
    shorter = old.replace(length=jnp.asarray([7], jnp.int32))
    _, cut, valid = run(inputs.replace(user=inputs.user.replace(histories={name: shorter})))
    np.testing.assert_allclose(cut[:, :2], h[:, :2], rtol=1e-5, atol=1e-5)
    assert int(valid[0]) == 3 and (np.asarray(cut[0, 3]) == 0).all()


# ---- scale


def test_scoring_holds_no_history_per_candidate(full_schema):
    """64 candidates over 1,024 events: temporaries stay below one array [R, C, S_m, D]."""
    schema = full_schema(events=1024)
    config = dict(event_width=8, merge=4, queries=16)
    graph, state = nnx.split(nnx.eval_shape(lambda: build_of(schema, **config)))
    inputs = random_inputs(schema, 2, 64)
    cache = jax.eval_shape(lambda s, u: nnx.merge(graph, s).encode_user(u).cache, state, inputs.user)
    score = jax.jit(lambda s, cache, c: nnx.merge(graph, s).candidate_tokens(cache, c))
    compiled = score.lower(state, cache, inputs.candidates).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * 64 * 256 * 32 / 2


def test_cost_is_linear_in_length_at_fixed_queries(full_schema):
    config = LongerConfig(event_width=8, merge=4, queries=16)
    costs = [longer.count_flops(config, full_schema(events=S)) for S in (512, 1024, 2048, 4096, 8192)]
    for name in ("user", "candidate"):
        steps = np.diff([getattr(cost, name) for cost in costs])
        np.testing.assert_array_equal(steps[1:], 2 * steps[:-1])


@pytest.mark.slow
def test_training_on_ten_thousand_events_fits():
    """One training step of 8 requests at the paper's width, 10,000 events, stays below 4 GB."""
    schema = golden_schema(length=10_000)
    config = dict(encoder=dict(event_width=32, merge=4, queries=1000, layers=2), backbone=dict(widths=(64,)))
    function, arguments = train_program("longer", schema, config, 8, 1)
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4e9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(n_global=(3, 1)), "m_c 1 or 2"),
        (dict(query_share=0.0), "expected a share"),
        (dict(merge=0), "merge is 0"),
        (dict(seq_sees_user_globals=True, n_global=(1, 0)), "has no effect without user globals"),
        (dict(max_length=0), "max_length is 0"),
        (dict(inner_init=-1.0), "inner_init is -1"),
        (dict(readout="globals_newest", query_strategy="learnable"), "no learnable query is one"),
        (dict(seq_sees_user_globals=True, globals_order="user_first"), "candidate_first"),
    ],
)
def test_configs_that_contradict_themselves(config, message):
    with pytest.raises(ValueError, match=message):
        LongerConfig(**config)


def test_schemas_that_do_not_fit():
    schema = golden_schema()
    with pytest.raises(ValueError, match="needs candidate and cross fields"):
        encoder_of(schema, n_global=(2, 1))
    with pytest.raises(ValueError, match="the schema has 2 user fields"):
        encoder_of(schema, n_global=(1, 3), cls=False)
    with pytest.raises(ValueError, match="does not divide into 4 attention heads"):
        encoder_of(schema, event_width=6)
    assert count("longer_paper", golden_schema(2000)).dense_params > 1.6e6


def test_counts_name_the_parts_of_a_composed_model():
    schema = golden_schema()
    both, alone = count("longer+rankmixer", schema), count("rankmixer", schema)
    encoder = freeze_config("longer+rankmixer")[0]
    assert both.encoder_params == longer.count_params(encoder, schema).dense and alone.encoder_params is None
    assert both.position_params == 23 * 10 < both.encoder_params < both.dense_params
    wider = count("longer+rankmixer", schema, {"encoder": {"max_length": 46}})
    assert wider.position_params == 2 * both.position_params
    assert wider.dense_params - wider.position_params == both.dense_params - both.position_params
