"""WSD programs: branches from one trunk, decays that end at zero, bad settings named."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.counts import Count, Flops, Params
from recscale.scaling.training.schedule import NEVER, Segment, program, rate_factor, train_flops_per_row


def test_branches_leave_one_trunk():
    assert program([100, 200], "wsd", 0.2, 10) == [
        Segment(0, 80),
        Segment(80, 100, 100),
        Segment(80, 160),
        Segment(160, 200, 200),
    ]


def test_six_horizons_cost_what_the_closed_form_says():
    horizons = [64 * 2**i for i in range(6)]
    steps = sum(segment.steps for segment in program(horizons, "wsd", 0.25, 1))
    longest = horizons[-1]
    assert steps == 0.75 * longest + 0.25 * sum(horizons)


def test_cosine_is_a_branch_from_the_end_of_warmup_and_constant_never_decays():
    assert program([100], "cosine", 0.2, 10) == [Segment(0, 10), Segment(10, 100, 100)]
    assert program([100], "constant", 0.2, 10) == [Segment(0, 100), Segment(100, 100, 100)]


def test_rate_warms_up_stays_and_decays_to_zero():
    steps = jnp.arange(100)
    trunk = rate_factor(steps, jnp.int32(NEVER), jnp.int32(1), 10, "linear")
    np.testing.assert_allclose(trunk[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_array_equal(trunk[10:], np.ones(90))
    done = np.arange(1, 21) / 21
    expected = {"linear": 1 - done, "sqrt": 1 - np.sqrt(done), "cosine": 0.5 + 0.5 * np.cos(np.pi * done)}
    for shape in ("linear", "sqrt", "cosine"):
        branch = np.asarray(rate_factor(steps, jnp.int32(80), jnp.int32(20), 10, shape))
        assert (np.diff(branch[80:]) < 0).all() and 0 < branch[99] < 0.06
        np.testing.assert_array_equal(branch[:80], trunk[:80])
        np.testing.assert_allclose(branch[80:], expected[shape], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_a_rate_is_whole_before_its_decay_and_none_behind_it(shape):
    found = rate_factor(jnp.arange(5), jnp.int32(2), jnp.int32(1), 0, shape)
    half = {"linear": 0.5, "sqrt": 1 - 0.5**0.5, "cosine": 0.5}[shape]
    np.testing.assert_allclose(found, [1, 1, half, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        rate_factor(jnp.arange(3), jnp.int32(2), jnp.int32(1), 4, shape), [0.25, 0.5, 0.75 * half]
    )


@pytest.mark.parametrize("candidates", [1, 4])
def test_a_row_pays_its_share_of_the_request_and_all_of_its_own(candidates):
    counts = Count.of(Params(10, 2, 1, 0, 4), Flops(user=60, candidate=80), 50)
    assert (counts.train_flops_user, counts.train_flops_candidate) == (180, 240)
    source = types.SimpleNamespace(candidates=candidates)
    assert train_flops_per_row(counts, source) == 180 / candidates + 240


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([100], "step", 0.2, 1), "training.schedule is 'step'"),
        (([100], "wsd", 1.5, 1), "training.decay_fraction is 1.5"),
        (([0], "wsd", 0.2, 1), "at least one step"),
    ],
)
def test_bad_settings_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        program(*arguments)
