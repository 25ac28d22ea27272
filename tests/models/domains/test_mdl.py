"""MDL: what reads what, which state is shared, scenarios that are not a row's, and the heads it stands beside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled
from flax import nnx
from in_float64 import in_float64
from tiny_models import VARIANTS

from recscale.models import build, count
from recscale.models.domains.domain_tokens import DomainTokens, plan_domain_tokens
from recscale.models.domains.mdl import MDLBlock, MDLConfig, Tokens, mean_of_active
from recscale.models.inputs import Field
from recscale.models.inputs.examples import random_inputs
from recscale.scaling.counting.jaxpr_flops import count_flops

T, B, D, G, Y = 4, 3, 8, 3, 2
SMALL = dict(tokens=T, width=D, hidden=6)
# Rows of scenario 0, of two scenarios at once, and of none; the last token is the global one.
MASK = jnp.asarray([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]], bool)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def blocks_of(**flags):
    options = MDLConfig(**SMALL | dict(layers=3) | flags)
    return [MDLBlock(T, G + 1, Y, options, layer, rngs=nnx.Rngs(layer)) for layer in range(options.layers)]


def first_tokens():
    return normal(T, B, D), normal(G + 1, B, D, seed=1), normal(Y, B, D, seed=2)


def run(blocks, f, s, t, mask=MASK):
    """[(f', s', t', m) of every block], coupled tokens."""
    found, s, t = [], Tokens(s, s), Tokens(t, t)
    for block in blocks:
        f, s, t, m = block(f, s, t, mask)
        found.append((f, s.state, t.state, m))
    return found


def test_what_reads_what_in_every_layer():
    blocks = blocks_of()
    jacobians = in_float64(jax.jacrev(lambda s, t: [(f, s1, t1) for f, s1, t1, _ in run(blocks, normal(T, B, D), s, t)],
                                   argnums=(0, 1)))(*first_tokens()[1:])  # fmt: skip
    for f_by, s_by, t_by in jacobians:
        assert not any(jnp.abs(each).max() for each in f_by)  # features read no domain token
        assert not jnp.abs(s_by[1]).max()  # scenarios read no task
        by_scenario = np.abs(s_by[0]).max(axis=(1, 2, 4, 5)) > 0
        np.testing.assert_array_equal(by_scenario, np.eye(G + 1, dtype=bool))  # nor each other
        by_task = np.abs(t_by[1]).max(axis=(1, 2, 4, 5)) > 0
        np.testing.assert_array_equal(by_task, np.eye(Y, dtype=bool))
        read = np.abs(t_by[0]).max(axis=(0, 2, 5))  # [row, scenario, row]
        for row in range(B):
            np.testing.assert_array_equal(read[row, :, row] > 0, MASK[:, row])


def test_the_shared_state_stands_before_the_networks_of_scenarios():
    (block, *_), (f, s, t) = blocks_of(), first_tokens()
    _, before, task, m = run([block], f, s, t)[0]
    block.scenario.ffn.down.kernel[...] *= 0
    block.scenario.ffn.down.bias[...] *= 0
    _, after, same, again = run([block], f, s, t)[0]
    np.testing.assert_array_equal(same, task)
    np.testing.assert_array_equal(again, m)
    keys = block.scenario_keys(block.features(f))
    np.testing.assert_array_equal(after, block.scenario.read(Tokens(s, s), keys))
    assert jnp.abs(after - before).max() > 1e-3


def test_the_mean_is_over_active_scenarios_and_the_global_token():
    x = normal(G + 1, B, D)
    m = mean_of_active(x, MASK)
    expected = (x[0, 0] + x[3, 0]) / 2, (x[0, 1] + x[2, 1] + x[3, 1]) / 3, x[3, 2]
    np.testing.assert_allclose(m, jnp.stack(expected), rtol=1e-6)
    np.testing.assert_array_equal(mean_of_active(x[:G], MASK[:G])[2], jnp.zeros(D))


@pytest.fixture(scope="module")
def domain_schema(full_schema):
    """Three domains, extra tables, and statistics that belong to one scenario, to the global token or to one task."""
    schema = dataclasses.replace(full_schema(), domains=G).with_extra_tables(("user", "item"))
    own = (
        Field("seen", "user", 3, group="scenario1"),
        Field("rate", "candidate", 2, group="scenario2"),
        Field("total", "user", 2, 30, group="scenario_global"),
        Field("bought", "candidate", 2, group="task1"),
    )
    return dataclasses.replace(schema, fields=schema.fields + own)


def split_model(schema, **flags):
    return nnx.split(filled(lambda: build("mdl", schema, SMALL | flags, rngs=nnx.Rngs(0))))


def inputs_in(schema, domains, seed=1):
    inputs = random_inputs(schema, len(domains), 2, seed=seed)
    return inputs.replace(user=inputs.user.replace(domain=jnp.asarray(domains, jnp.int32)))


def test_other_scenarios_change_nothing(domain_schema):
    graph, state = split_model(domain_schema)
    inputs = inputs_in(domain_schema, [0, 2, 0, 2])

    def loss(state, inputs):
        return jnp.square(nnx.merge(graph, state)(inputs).logits)

    total = in_float64(lambda s, i: (loss(s, i), jax.grad(lambda s: loss(s, i).sum())(s)))
    logits, grads = total(state, inputs)
    user = inputs.user.fields | {"seen": 7 + inputs.user.fields["seen"]}
    moved, _ = total(state, inputs.replace(user=inputs.user.replace(fields=user)))
    np.testing.assert_array_equal(moved, logits)
    candidate = inputs.candidates.fields | {"rate": 7 + inputs.candidates.fields["rate"]}
    moved, _ = total(state, inputs.replace(candidates=inputs.candidates.replace(fields=candidate)))
    np.testing.assert_array_equal(np.abs(moved - logits).max(axis=(1, 2)) > 0, [False, True, False, True])
    reader = grads["blocks"][0]["scenario"]
    for leaf in jax.tree.leaves(reader):
        used = np.abs(leaf).reshape(G + 1, -1).max(axis=1) > 0
        np.testing.assert_array_equal(used, [True, False, True, True])
    first = grads["initialiser"]["important"]["kernel"][...].reshape(-1, G + 1 + Y, D)
    assert (np.abs(first).max(axis=(0, 2)) > 0).tolist() == [True, False, True, True, True, True]
    assert not np.abs(jax.tree.leaves(grads["initialiser"]["user_priors"]["1"])[0]).max()


def test_domain_tokens_against_their_equation(domain_schema):
    """Two linear maps of what all tokens read, and before the first ReLU of what belongs to one of them."""
    plan, width, R = plan_domain_tokens(domain_schema, scenarios=True, has_global=True, tasks=True), 5, 2
    graph, state = nnx.split(filled(lambda: DomainTokens(plan, width, 2, rngs=nnx.Rngs(0))))
    inputs = inputs_in(domain_schema, [0, 2])

    def user(state, inputs):
        return nnx.merge(graph, state).encode_user(inputs.user)

    def whole(state, inputs):
        return nnx.merge(graph, state).score(user(state, inputs), inputs.candidates)

    found = in_float64(whole)(state, inputs)
    rows = {name: np.repeat(np.asarray(x), 2, axis=0) for name, x in inputs.user.fields.items()}
    rows |= {name: np.asarray(x).reshape(2 * R, -1) for name, x in inputs.candidates.fields.items()}
    extra = [field.name for field in domain_schema.fields if field.group == "extra"]
    model = nnx.merge(graph, state)
    first = np.concatenate([rows[name] for name in extra], axis=1) @ model.important.kernel[...]
    h = np.array(first + np.asarray(model.important.bias[...])[None], np.float64).reshape(2 * R, plan.tokens, width)
    # Tokens: scenarios 0 to 2, the global one, tasks 0 and 1.
    h[:, 1] += rows["seen"] @ model.user_priors["1"].kernel[...]
    h[:, 2] += rows["rate"] @ model.candidate_priors["2"].kernel[...]
    h[:, 3] += rows["total"] @ model.user_priors["3"].kernel[...]
    h[:, 5] += rows["bought"] @ model.candidate_priors["5"].kernel[...]
    for n, (kernel, bias) in enumerate(zip(model.more[0].kernel[...], model.more[0].bias[...], strict=True)):
        expected = np.maximum(np.maximum(h[:, n], 0) @ kernel + bias[None], 0)
        np.testing.assert_allclose(found[n], expected, rtol=1e-5, atol=1e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == plan.params(width, 2)
    flops = plan.flops(width, 2)
    assert count_flops(user, state, inputs) == R * flops.user > 0
    assert count_flops(whole, state, inputs) == R * flops.user + 2 * R * flops.candidate


@pytest.mark.parametrize("flags", [dict(), dict(global_scenario=False, out_proj=True, qkv_bias=True)], ids=str)
def test_active_scenarios_alone_give_the_same(domain_schema, flags):
    graphs, inputs = [], inputs_in(domain_schema, [0, 2, 2, 7, 0])
    for only in (False, True):
        graph, state = split_model(domain_schema, active_only=only, **flags)
        graphs.append(graph)

    def graded(graph):
        return in_float64(jax.value_and_grad(lambda s: jnp.square(nnx.merge(graph, s)(inputs).logits).sum()))(state)

    (dense, grads), (sparse, own_grads) = map(graded, graphs)
    np.testing.assert_allclose(sparse, dense, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(own_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * max(1.0, float(jnp.abs(b).max())))
    served = [count("mdl", domain_schema, SMALL | flags | dict(active_only=only)) for only in (False, True)]
    assert served[1].forward_flops_candidate < served[0].forward_flops_candidate
    assert served[1].dense_params == served[0].dense_params


@pytest.mark.parametrize("token_state", ["coupled", "split"])
def test_only_a_split_state_hides_the_initialiser(domain_schema, token_state):
    """Without values nothing is read: what still moves the logits came from the initialiser itself."""
    model = filled(lambda: build("mdl", domain_schema, SMALL | dict(token_state=token_state), rngs=nnx.Rngs(0)))
    for block in model.blocks:
        for keys in (block.scenario_keys, block.task_keys):
            keys.value.kernel[...] *= 0
    inputs = inputs_in(domain_schema, [0, 1, 2])
    served = in_float64(lambda m: m(inputs).logits)
    before = served(model)
    model.initialiser.important.kernel[...] *= 1.5
    moved = np.abs(served(model) - before).max()
    assert moved > 1e-4 if token_state == "coupled" else moved == 0


def test_one_domain_is_legal_and_a_missing_one_is_named(schema, domain_schema):
    model = filled(lambda: build("mdl", schema, SMALL, rngs=nnx.Rngs(0)))
    served = in_float64(lambda m, inputs: m(inputs).logits)
    assert model.domains.scenarios == 2 and np.isfinite(served(model, random_inputs(schema, 2, 2))).all()
    inputs = random_inputs(domain_schema, 2, 2)
    for name in ("mdl", "domain_heads"):
        with pytest.raises(ValueError, match="3 domains, and the inputs carry no domain"):
            served(
                filled(lambda name=name: build(name, domain_schema, SMALL, rngs=nnx.Rngs(0))),
                inputs.replace(user=inputs.user.replace(domain=None)),
            )


@pytest.mark.slow
@pytest.mark.parametrize("flags", VARIANTS["mdl"], ids=str)
def test_every_flag_builds_counts_and_runs(domain_schema, check_variant, flags):
    check_variant("mdl", domain_schema, SMALL | flags)


@pytest.mark.parametrize("head", ["mmoe", "private", "shared"])
def test_heads_build_count_and_run(domain_schema, check_variant, head):
    check_variant("domain_heads", domain_schema, SMALL | dict(head=head, tower=(5,)))


def test_private_heads_belong_to_their_domain(domain_schema):
    model = build("domain_heads", domain_schema, SMALL | dict(head="private"), rngs=nnx.Rngs(0))
    inputs = inputs_in(domain_schema, [0, 1, 2])
    before = model(inputs).logits
    model.towers.biases[0][...] += jnp.repeat(jnp.asarray([0.0, 1.0, 0.0]), Y)[:, None]
    np.testing.assert_allclose(model(inputs).logits - before, [[[0.0] * Y] * 2, [[1.0] * Y] * 2, [[0.0] * Y] * 2],
                               atol=1e-6)  # fmt: skip
    shared = build("domain_heads", domain_schema, SMALL | dict(head="shared"), rngs=nnx.Rngs(0))
    plain = build("rankmixer", domain_schema, SMALL, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(shared(inputs).logits, plain(inputs).logits)


def test_flags_that_contradict_each_other_are_named():
    for message, flags in (
        ("this is RankMixer", dict(scenario_tokens="none", task_tokens="none")),
        ("there are no scenario tokens", dict(scenario_tokens="none", active_only=True)),
        ("no block reads", dict(reads="none", task_hidden=4)),
        ("may not be 'plain'", dict(reads="none", task_tokens="plain")),
        ("no token attends", dict(scenario_tokens="plain", task_tokens="plain", heads=2)),
        ("one kind of token attends", dict(task_tokens="plain", share_kv=True)),
        ("would do nothing", dict(task_tokens="plain", token_state="split")),
    ):
        with pytest.raises(ValueError, match=message):
            MDLConfig(**flags)


def test_a_wrong_extra_table_is_named(schema):
    with pytest.raises(ValueError, match="asked for price, shopp; the id fields are user, hour, item, shop"):
        schema.with_extra_tables(("price", "shopp"))
    with pytest.raises(ValueError, match="no field of group 'extra' is the candidate's"):
        count("mdl", schema.with_extra_tables(("user",)), SMALL)
