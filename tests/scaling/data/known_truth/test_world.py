"""The constants of a known-truth log: codes, matrices, terms, coefficients, popularity, configuration and schema."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import zeta

from recscale.scaling.data.known_truth import PRESETS, build_world, make_schema, popularity, preset
from recscale.scaling.data.known_truth.config import BLOCK, CROSS_FIELDS
from recscale.scaling.data.known_truth.exact import order_variances
from recscale.scaling.data.known_truth.terms import plan_terms
from recscale.scaling.data.known_truth.words import threefry
from recscale.scaling.data.known_truth.world import bias_scores, code_words, history_word, scale_bits, signs

SMALL = dict(history_max=16, quanta=300, blocks=8, clusters=16, pair_items=64)


def signs_of_block(block_signs):
    values = np.asarray(block_signs, np.int64)
    return values.sum(axis=0), values.T @ values / len(values)


@pytest.mark.parametrize("code_bits", [8, 31])
def test_code_signs_are_centred_and_orthonormal_in_every_block(code_bits):
    world = build_world(preset("base", code_bits=code_bits, **SMALL))
    ids = np.arange(world.config.vocabulary, dtype=np.int32)
    for field in range(len(CROSS_FIELDS)):
        word = code_words(world, field, ids[None])[0]
        for block in np.asarray(signs(word, code_bits, 1)).reshape(-1, BLOCK, code_bits):
            total, covariance = signs_of_block(block)
            assert (total == 0).all()
            assert (covariance == np.eye(code_bits)).all()


@pytest.mark.parametrize("width", [8, 16])
def test_history_signs_are_centred_and_orthonormal_in_every_block(width):
    world = build_world(preset("base", code_width=width, **SMALL))
    word = history_word(world, np.arange(world.config.vocabulary, dtype=np.int32))
    for block in np.asarray(signs(word, width, 0)).reshape(-1, BLOCK, width):
        total, covariance = signs_of_block(block)
        assert (total == 0).all()
        assert (covariance == np.eye(width)).all()


def test_matrices_are_hadamard_and_scores_standardised():
    world = build_world(preset("base", tasks=2, **SMALL))
    for matrix in world.matrix.astype(np.int64):
        assert (matrix @ matrix.T == world.config.code_width * np.eye(world.config.code_width)).all()
    assert (world.matrix[0] != world.matrix[1]).any()
    assert abs(bias_scores().mean()) < 1e-6
    assert abs(bias_scores().var() - 1.0) < 1e-6
    tau2 = world.config.c_b / 2
    assert np.mean(np.square(world.bias_scores / world.scale)) == pytest.approx(tau2, rel=1e-5)
    assert world.bias_scores.sum() == 0


@pytest.mark.parametrize("nested", [True, False])
def test_terms_are_distinct_with_distinct_fields_and_the_target_shares(nested):
    config = preset("base", nested=nested)
    plan = plan_terms(config)
    terms = plan.terms[0][0]
    assert len(set(terms)) == config.quanta
    for k, term in enumerate(terms):
        fields = [CROSS_FIELDS[field] for field, _ in term]
        assert len(set(fields)) == len(fields) == plan.order[k]
        assert all(1 <= bit <= 31 for _, bit in term)
        if len(term) == 1:
            assert fields[0] not in ("user", "item")
        if nested and plan.parent[k] >= 0:
            assert plan.parent[k] < k
            assert set(terms[plan.parent[k]]) < set(term)
            assert len(terms[plan.parent[k]]) == len(term) - 1
    orphans = [k for k in range(config.quanta) if plan.order[k] > 1 and plan.parent[k] < 0]
    assert len(orphans) <= 3 if nested else len(orphans) > 1000
    variance = config.quanta_variances()
    share = np.bincount(plan.order, weights=variance, minlength=5)[1:] / variance.sum()
    assert np.abs(share - config.order_shares).max() < 0.01


def test_private_and_own_terms_keep_order_and_side():
    config = preset("smoke", domains=3, tasks=2, quanta=120)
    plan = plan_terms(config)
    request = {CROSS_FIELDS.index(name) for name in ("user", "u1", "u2", "c1", "c2")}
    for task in range(2):
        for domain in range(3):
            terms = plan.terms[task][domain]
            assert len(set(terms)) == config.quanta
            for k, term in enumerate(terms):
                assert len(term) == plan.order[k]
                assert all(field in request for field, _ in term) == plan.request_only[k]
                same = term == plan.terms[0][0][k]
                expected = (plan.shared[k] or domain == 0) and (plan.common[k] or task == 0)
                assert same == expected
    variance = config.quanta_variances()
    assert variance[plan.shared].sum() / variance.sum() == pytest.approx(config.domain_shared, abs=0.01)
    assert variance[plan.common].sum() / variance.sum() == pytest.approx(config.task_common, abs=0.01)


def test_too_many_terms_is_an_error():
    config = preset("dense", code_bits=1, quanta=100)
    with pytest.raises(ValueError, match="quanta is 100"):
        build_world(config)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_coefficients_telescope_after_rounding(name):
    config = preset(name)
    world = build_world(config)
    squares = np.square(world.terms[0].coefficient / world.scale)
    assert squares.sum() == pytest.approx(config.c_n * (1 - (config.quanta + 1) ** -config.alpha), rel=1e-5)
    if config.has_l:
        kappa = world.event_weight[0] / world.scale * config.code_width / config.match_groups**0.5
        expected = config.c_l * (1 - (config.history_max + 1) ** -config.lam)
        assert np.square(kappa).sum() == pytest.approx(expected, rel=1e-5)
    by_order = order_variances(world)
    assert sum(by_order[f"N{order}"] for order in range(1, 5)) == pytest.approx(squares.sum(), rel=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"signal": 60.0}, {"tasks": 2, "domains": 3, "drift": 4}])
@pytest.mark.parametrize("name", ["base", "long"])
def test_no_integer_sum_can_overflow(name, overrides):
    config = preset(name, **overrides)
    world = build_world(config)
    worst = 0
    for task in range(config.tasks):
        terms = world.terms[task]
        bound = np.abs(terms.coefficient.astype(np.int64)[terms.domain <= 0]).sum() + world.pair_amplitude
        bound += np.abs(world.event_weight[task].astype(np.int64)).sum() * config.code_width**1.5
        bound += 2 * np.abs(world.bias_scores).max() + abs(int(world.task_bias[task]))
        bound += np.abs(world.domain_bias).max() + np.abs(world.drift_weight).sum()
        worst = max(worst, bound)
    assert worst < 2**31
    assert (world.scale_bits < 22) == (overrides.get("signal", 0) == 60.0)
    assert scale_bits(config) == world.scale_bits


def test_popularity_is_the_rounded_zipf_law():
    world = build_world(preset("base"))
    law = popularity(world, "item")
    zipf = np.arange(1, 65) ** -world.config.zipf
    assert law.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.abs(law - zipf / zipf.sum()).max() < 64 / 4096 / 64
    with pytest.raises(ValueError, match="cross fields are"):
        popularity(world, "mem_i")


def test_closed_forms():
    """Noise variance, fresh mass and pair law against direct evaluation."""
    config = preset("base")
    assert config.noise_variance() == pytest.approx(0.48 * 2049**-0.35 + 0.36 * 257**-0.3, rel=1e-12)
    tail = 1 - np.sum(np.arange(1.0, 2**14 + 1) ** -1.35) / zeta(1.35)
    assert config.fresh_share() == pytest.approx(tail, abs=1e-6)
    assert preset("smoke").noise_variance() == pytest.approx(0.2035, abs=5e-5)
    assert preset("smoke").fresh_share() == pytest.approx(0.1185, abs=5e-5)
    ragged = preset("smoke", ragged=True)
    assert ragged.length_law().sum() == 1.0
    assert ragged.length_law().min() > 0.9 / 33


def test_threefry_known_answers():
    """Random123's published vectors for threefry2x32, 20 rounds, traced and not."""
    for word, expected in ((0, (0x6B200159, 0x99BA4EFE)), (0xFFFFFFFF, (0x1CB996FC, 0xBB002BE7))):
        array = jnp.full(1, word, jnp.uint32)
        for hashed in (threefry, jax.jit(threefry)):
            x, y = hashed((array, array), (array, array))
            assert (int(x[0]), int(y[0])) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"shares": (0.5, 0.2, 0.2, 0.2)}, "shares"),
        ({"blocks": 48}, "blocks"),
        ({"a": 1.0}, "exponent above 1"),
        ({"code_bits": 32}, "code_bits"),
        ({"cascade": True}, "cascade"),
        ({"codes": "none"}, "unless N has no share"),
        ({"quantas": 3}, "unknown fields quantas; did you mean 'quanta'"),
        ({"quanta": 2.5}, r"quanta is 2.5 \(float\), expected int"),
        ({"history_max": "64"}, "history_max is '64'"),
        ({"shares": (1, "0", 0, 0)}, "expected a tuple of float"),
        ({"soft_labels": True, "drift": 2}, "soft_labels"),
        ({"pair_field": True, "clusters": 2**16, "pair_items": 2**16}, "more than int32 holds"),
    ],
)
def test_configuration_errors_name_the_field(override, message):
    with pytest.raises(ValueError, match=message):
        preset("base", **override)
    with pytest.raises(ValueError, match="smoke"):
        preset("tiny")


def test_what_short_histories_miss_is_the_sum_of_their_own_events():
    for ragged in (False, True):
        config = preset("smoke", ragged=ragged, tasks=2)
        for task in range(2):
            kappa, law = config.history_variances(task), config.length_law()
            for seen in (0, 3, 32):
                whole = kappa[seen:].sum() + config.history_tail(task)
                short = sum(law[m] * kappa[min(seen, m) : m].sum() for m in range(config.history_max))
                assert config.missing_history(seen, task) == pytest.approx(short + law[-1] * whole, rel=1e-12)
            assert config.missing_history(np.inf, task) == 0.0
        assert config.missing_history([1, 2, 4]).shape == (3,)


def test_hashes_tell_truth_from_inputs():
    base = preset("base")
    assert hash(base) == hash(preset("base", shares=[0.4, 0.3, 0.2, 0.1]))
    wider = dataclasses.replace(base, embedding_width=4)
    assert wider.hash != base.hash
    assert wider.truth_hash == base.truth_hash
    assert dataclasses.replace(base, world_seed=1).truth_hash != base.truth_hash


def test_schema_follows_the_parts():
    base = make_schema(preset("base"))
    names = [field.name for field in base.fields]
    assert names == [*CROSS_FIELDS, "cat", "mem_u", "mem_i"]
    assert base.tables()["item"] == (32 * 64, 16)
    assert base.sequences[0].length == 256
    assert [field.name for field in base.sequences[0].fields] == ["item", "cat"]
    dense = make_schema(preset("dense"))
    assert [(f.name, f.width, f.side) for f in dense.fields] == [
        (f"{name}_code", 31, "user" if name[0] in "uc" else "candidate") for name in CROSS_FIELDS
    ]
    assert not dense.sequences
    assert not dense.tables()
    both = make_schema(preset("base", codes="oracle"))
    assert {"user", "item", "item_code"} <= {field.name for field in both.fields}
    assert "u1" not in {field.name for field in both.fields}
    signs = make_schema(preset("base", codes="oracle_history", shares=(0.0, 1.0, 0.0, 0.0)))
    assert {field.name: field.width for field in signs.sequences[0].fields} == {"history_code": 16, "cat": 16}
    assert "history_code" in {field.name for field in signs.candidate_fields} and list(signs.tables()) == ["cat"]
    pair = make_schema(preset("base", pair_field=True, clusters=16, memory_embedding_width=2))
    assert pair.tables()["pair"] == (4 * 16 * 2**14 + 1, 2)
    assert not {"mem_u", "mem_i"} & {field.name for field in pair.fields}
    alone = make_schema(preset("memory", codes="none", shares=(0.0, 0.0, 1.0, 0.0)))
    assert [field.name for field in alone.fields] == ["mem_u", "mem_i"] and not alone.sequences
    many = make_schema(preset("smoke", domains=3, tasks=2))
    assert many.domains == 3
    assert [task.name for task in many.tasks] == ["click", "convert"]
    assert "cat" not in {field.name for field in many.fields}


def test_disjoint_pairs_use_every_sign_equally_often():
    config = preset("dense")
    terms = plan_terms(config).terms[0][0]
    assert len(set(terms)) == config.quanta == 1024
    assert all(len(term) == 2 and term[0][0] != term[1][0] for term in terms)
    signs = len(CROSS_FIELDS) * config.code_bits
    for start in range(0, config.quanta - signs // 2, signs // 2):
        used = [sign for term in terms[start : start + signs // 2] for sign in term]
        assert len(set(used)) == signs  # a perfect matching
    assert plan_terms(preset("dense", world_seed=1)).terms[0][0] != terms


@pytest.mark.parametrize(
    ("override", "message"),
    [({"order_shares": (0.1, 0.9)}, "order_shares"), ({"nested": True}, "nested"), ({"tasks": 2}, "disjoint")],
)
def test_disjoint_pairs_are_pairs_and_nothing_else(override, message):
    with pytest.raises(ValueError, match=message):
        preset("dense", **override)


def test_logs_made_before_a_field_existed_keep_their_identity():
    assert preset("base").hash == "6d3aebfd6186c44b"
