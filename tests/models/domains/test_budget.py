"""Budgets: estimated gradients against what they estimate, the value of a policy, the knapsack, the cost curve."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64
from scipy.stats import norm

from recscale.models.domains.budget import (
    DecisionOptions,
    Response,
    ResponseHeads,
    Trial,
    decision_loss,
    margin_gradient,
    nes_gradient,
    policy_value,
    prediction_loss,
    response_flops,
    response_params,
)
from recscale.models.domains.knapsack import aucc, aucc_interval, decide, solve_mckp, spend_up_to
from recscale.scaling.counting.jaxpr_flops import count_flops

LAM = 0.5


def random_trial(rows, arms, seed=0):
    rng = np.random.default_rng(seed)
    arm = jnp.asarray(rng.integers(0, arms, rows), jnp.int32)
    reward, cost = (jnp.asarray(rng.uniform(size=rows), jnp.float32) for _ in range(2))
    return Trial(arm, reward, cost * (arm > 0), jnp.full(arms, 1.0 / arms))


def random_response(rows, arms, seed=1):
    rng = np.random.default_rng(seed)
    return Response(*(jnp.asarray(rng.uniform(size=(rows, arms)), jnp.float32) for _ in range(2)))


def heads(widths):
    """A network of 6 features and 4 arms with drawn parameters, and its graph."""
    graph, state = nnx.split(nnx.eval_shape(lambda: ResponseHeads(6, 4, widths, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(2)
    return graph, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), jnp.float32), state)


@pytest.mark.parametrize("widths", [(), (5,), (7, 3)])
def test_closed_forms_equal_the_network(widths):
    graph, state = heads(widths)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == response_params(6, 4, widths)
    x = jnp.ones((10, 6))
    assert count_flops(lambda s, x: nnx.merge(graph, s)(x), state, x) == 10 * response_flops(6, 4, widths)


@pytest.mark.parametrize("estimator", ["nes", "margin", "softmax"])
def test_a_golden_step(estimator):
    """Loss and gradient norm of one batch, made by this test on NumPy in float64; "nes" draws other noise there."""
    graph, state = heads((5,))
    x, trial = jnp.asarray(np.random.default_rng(3).standard_normal((40, 6)), jnp.float32), random_trial(40, 4)
    spend = jnp.asarray([0.0, 0.2, 0.5, 1.0])

    def loss(state):
        model = nnx.merge(graph, state)
        decision = decision_loss(model.response(x, spend), trial, DecisionOptions(estimator), jax.random.key(0))
        return prediction_loss(model(x), trial, spend) + decision

    value, grads = in_float64(jax.value_and_grad(loss))(state)
    norm_of_all = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
    assert (float(value), float(norm_of_all)) == pytest.approx(GOLDEN[estimator], rel=1e-6)


GOLDEN = {
    "nes": (1.0246649107, 0.4623657008),
    "margin": (-9.4410512099, 6.7350135565),
    "softmax": (0.8463076512, 0.3402247566),
}


def test_smoothed_gradient_has_its_closed_form():
    """Two arms, noise on both predictions of both: v phi(z) / s with s = sigma sqrt(2 (1 + lam^2))."""
    rows, sigma = 40_000, 0.3
    response = Response(jnp.tile(jnp.asarray([[0.2, 0.5]]), (rows, 1)), jnp.tile(jnp.asarray([[0.0, 0.4]]), (rows, 1)))
    trial = Trial(jnp.ones(rows, jnp.int32), jnp.ones(rows), jnp.full(rows, 0.4), jnp.full(2, 0.5))
    found = np.asarray(nes_gradient(response, trial, LAM, jax.random.key(0), sigma, draws=4).reward)
    s = sigma * np.sqrt(2 * (1 + LAM**2))
    expected = float(trial.value(LAM)[0]) * norm.pdf((0.5 - LAM * 0.4 - 0.2) / s) / s
    error = found.std(axis=0) / np.sqrt(rows)
    assert abs(found[:, 1].mean() - expected) < 4 * error[1] and error[1] < 0.02 * expected
    assert abs(found[:, 0].mean() + expected) < 4 * error[0]


def test_softmax_gradient_equals_finite_differences():
    trial, response = random_trial(5, 3), random_response(5, 3)
    options = DecisionOptions(estimator="softmax", lams=(0.1, 1.0), tau=0.5, alpha=2.0)

    def loss(response):
        return decision_loss(response, trial, options)

    loss = jax.jit(loss)
    gradient, step = jax.grad(loss)(response), 1e-2
    for which, (i, j) in itertools.product((0, 1), ((0, 0), (2, 1), (4, 2))):
        moved = [response._replace(**{response._fields[which]: response[which].at[i, j].add(s)}) for s in (step, -step)]
        numeric = float(loss(moved[0]) - loss(moved[1])) / (2 * step)
        assert gradient[which][i, j] == pytest.approx(numeric, abs=2e-4)
    through = jax.grad(lambda r: decision_loss(r, trial, DecisionOptions(estimator="softmax", through="reward")))
    assert not jnp.abs(through(response).cost).max()


def test_estimators_agree_in_sign_with_brute_force():
    """Raising the drawn arm's score can only raise the chance of v_i, whatever the estimator."""
    trial, response = random_trial(100, 3), random_response(100, 3)
    rows = np.arange(100)
    smooth = np.asarray(nes_gradient(response, trial, LAM, jax.random.key(1), 0.2, 1000).reward)[rows, trial.arm]
    value = np.asarray(trial.value(LAM))
    sure = np.abs(smooth) > 0.3 * np.abs(value)
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(np.sign(smooth[sure]), np.sign(value[sure]))
    margin = np.asarray(margin_gradient(response, trial, LAM, 0.3).reward)[rows, trial.arm]
    scores = np.asarray(response.scores(LAM))
    others = np.where(np.eye(3, dtype=bool)[trial.arm], -np.inf, scores).max(axis=1)
    near = np.abs(scores[rows, trial.arm] - others) < 0.3
    np.testing.assert_array_equal(np.sign(margin), np.sign(value) * near)
    exact = jax.grad(lambda r: decision_loss(r, trial, DecisionOptions(estimator="softmax", lams=(LAM,))))(response)
    np.testing.assert_array_equal(np.sign(-np.asarray(exact.reward)[rows, trial.arm]), np.sign(value))


@pytest.mark.parametrize("estimator", ["nes", "margin"])
def test_an_estimate_is_injected_as_the_gradient(estimator):
    trial, response, key = random_trial(6, 3), random_response(6, 3), jax.random.key(2)
    options = DecisionOptions(estimator=estimator, lams=(LAM,), alpha=3.0)
    found = jax.grad(lambda r: decision_loss(r, trial, options, key))(response)
    own = jax.random.fold_in(key, 0)
    g = nes_gradient(response, trial, LAM, own) if estimator == "nes" else margin_gradient(response, trial, LAM)
    for a, b in zip(found, g, strict=True):
        np.testing.assert_allclose(a, -3.0 / 6 * b, rtol=1e-5, atol=1e-7)
    if estimator == "nes":
        with pytest.raises(ValueError, match="give a key"):
            decision_loss(response, trial, options)


def test_the_value_on_a_trial_is_that_of_the_policy():
    rng, rows, arms = np.random.default_rng(0), 40_000, 3
    reward, cost = rng.uniform(size=(rows, arms)), rng.uniform(size=(rows, arms)) * np.arange(arms)
    propensity = np.asarray([0.5, 0.3, 0.2])
    arm = rng.choice(arms, rows, p=propensity)
    drawn = (rng.uniform(size=rows) < reward[np.arange(rows), arm]).astype(np.float32)
    trial = Trial(*(jnp.asarray(x) for x in (arm.astype(np.int32), drawn, cost[np.arange(rows), arm], propensity)))
    response = random_response(rows, arms)
    chosen = np.asarray(response.scores(LAM)).argmax(axis=1)
    true = (reward - LAM * cost)[np.arange(rows), chosen]
    each = np.where(chosen == arm, trial.value(LAM), 0.0)
    assert abs(float(policy_value(response, trial, LAM)) - true.mean()) < 3 * each.std() / np.sqrt(rows)


def enumerated(reward, cost, budget):
    rows, arms = reward.shape
    choices = np.asarray(list(itertools.product(range(arms), repeat=rows)))
    values = reward[np.arange(rows), choices].sum(axis=1)
    return values[cost[np.arange(rows), choices].sum(axis=1) <= budget + 1e-12].max()


def test_the_knapsack_against_enumeration():
    rng = np.random.default_rng(3)
    for _ in range(40):
        rows, arms = rng.integers(1, 7), rng.integers(2, 5)
        reward, cost = rng.uniform(size=(rows, arms)), rng.uniform(size=(rows, arms))
        cost[:, 0] = 0
        budget = rng.uniform() * cost.max(axis=1).sum()
        found, best = solve_mckp(reward, cost, budget), enumerated(reward, cost, budget)
        assert found.spent <= budget and best - reward.max() <= found.value <= best + 1e-9
        assert best <= found.upper_bound + 1e-9
        assert solve_mckp(reward, cost, budget, fill=False).value <= found.value
        prices = [solve_mckp(reward, cost, b).lam for b in (0.3 * budget, budget, 2 * budget)]
        assert prices == sorted(prices, reverse=True)
        assert not solve_mckp(reward, cost, 0.0).arms.any()
        np.testing.assert_array_equal(solve_mckp(reward, cost, np.inf).arms, reward.argmax(axis=1))
    with pytest.raises(ValueError, match="an arm 0 that is free"):
        solve_mckp(reward, cost + 1, 1.0)


def test_policies_are_compared_at_one_true_spend():
    rng = np.random.default_rng(4)
    reward, cost = rng.uniform(size=(200, 3)), np.sort(rng.uniform(size=(200, 3)), axis=1)
    cost[:, 0] = 0
    for error in (0.5, 2.0):
        arms = spend_up_to(reward, error * cost, cost, 20.0)
        assert 15 < cost[np.arange(200), arms].sum() <= 20
    np.testing.assert_array_equal(spend_up_to(reward, cost, cost, 1e9), decide(reward, cost, 0.0))


def test_area_under_the_cost_curve():
    rng, rows = np.random.default_rng(5), 60_000
    lift, price = rng.uniform(0.0, 0.4, rows), rng.uniform(0.2, 0.4, rows)
    treated = rng.uniform(size=rows) < 0.5
    reward = (rng.uniform(size=rows) < 0.2 + lift * treated).astype(float)
    cost = (rng.uniform(size=rows) < price * treated).astype(float)
    oracle = aucc(lift / price, reward, cost, treated)
    nothing = [aucc(rng.uniform(size=rows), reward, cost, treated) for _ in range(8)]
    assert abs(np.mean(nothing) - 0.5) < 0.02
    assert oracle > 0.6
    assert aucc(-lift / price, reward, cost, treated) == pytest.approx(1 - oracle, abs=0.02)
    assert aucc(np.exp(lift / price), reward, cost, treated) == oracle
    few = slice(4000)
    columns = [x[few] for x in (lift / price, reward, cost, treated)]
    low, high = aucc_interval(*columns, draws=40)
    wider = aucc_interval(*[x[:500] for x in columns], draws=40)
    assert low < aucc(*columns) < high < low + 0.3 and wider[1] - wider[0] > 1.5 * (high - low)
    assert aucc_interval(*columns, draws=40) == (low, high)


def test_the_knapsack_bound_and_what_it_leaves_over():
    reward = np.asarray([[0.0, 3.0, 4.0], [0.0, 0.5, 0.5], [0.0, 0.1, 0.0]])
    cost = np.asarray([[0.0, 1.0, 2.0], [0.0, 1.0, 3.0], [0.0, 0.5, 1.0]])
    # Below a price of .5 the second row would be paid for, which is too much; what is left is enough for the third.
    bare, full = solve_mckp(reward, cost, 2.5, fill=False), solve_mckp(reward, cost, 2.5)
    assert bare.arms.tolist() == [2, 0, 0] and (bare.spent, bare.value) == (2.0, 4.0)
    assert full.arms.tolist() == [2, 0, 1] and (full.spent, full.value) == (2.5, 4.1)
    assert bare.lam == full.lam == pytest.approx(0.5) and full.upper_bound == pytest.approx(3.0 + 0.5 * 2.5)
    # All that brings something costs 3.5 exactly; of equal rewards the cheapest.
    free = solve_mckp(reward, cost, 3.5)
    assert free.arms.tolist() == [2, 1, 1] and (free.lam, free.upper_bound) == (0.0, pytest.approx(4.6))
    for bad in (
        dict(budget=-0.5),
        dict(cost=np.where(cost == 3.0, -1.0, cost)),
        dict(cost=cost + [[0.5], [0.0], [0.0]]),
    ):
        with pytest.raises(ValueError, match="expected none negative"):
            solve_mckp(**dict(reward=reward, cost=cost, budget=1.0) | bad)
    with pytest.raises(ValueError, match="no price makes these decisions affordable"):
        spend_up_to(reward, 0.0 * cost, cost, 0.5)


def test_the_cost_curve_point_by_point():
    """Rows of both arms in a table of six, with a tie that keeps its order, and a cost curve that falls once."""
    score = np.asarray([0.9, 0.1, 0.5, 0.5, 0.7, 0.3])
    treated = np.asarray([True, True, False, True, False, False])
    reward = np.asarray([1.0, 0.0, 0.5, 1.0, 0.0, 1.0])
    cost = np.asarray([0.5, 1.0, 0.25, 1.0, 0.125, 0.0])
    gained, spent, highest = [0.0], [0.0], 0.0
    for depth in range(1, 7):
        first = [0, 4, 2, 3, 5, 1][:depth]
        rows = [(values[i] if treated[i] else -values[i]) / 3 for values in (reward, cost) for i in first]
        gained.append(sum(rows[:depth]))
        highest = max(highest, sum(rows[depth:]))
        spent.append(highest)
    assert spent[2] == spent[1] == 0.5 / 3  # one fell

    def height(x):
        right = next(k for k in range(7) if spent[k] > x or k == 6)
        share = (x - spent[right - 1]) / (spent[right] - spent[right - 1])
        return gained[right - 1] + share * (gained[right] - gained[right - 1])

    for steps, given in ((200, {}), (7, dict(steps=7))):
        area = sum(height(spent[-1] * k / steps) for k in range(steps + 1)) / (steps + 1)
        assert aucc(score, reward, cost, treated, **given) == pytest.approx(area / gained[-1], rel=1e-9)
    columns = [np.tile(x, 20) for x in (score, reward, cost, treated)]
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        rows = rng.integers(0, 120, 120)
        found.append(aucc(*[x[rows] for x in columns]))
    assert aucc_interval(*columns) == pytest.approx(np.quantile(found, [0.025, 0.975]), rel=1e-12)
    assert aucc_interval(*columns, level=0.5) == pytest.approx(np.quantile(found, [0.25, 0.75]), rel=1e-12)


def test_a_margin_counts_below_its_limit_and_a_tie_is_not_divided_by():
    response = Response(jnp.asarray([[0.5, 0.25], [0.5, 0.5], [0.25, 1.0]]), jnp.zeros((3, 2)))
    trial = Trial(jnp.zeros(3, jnp.int32), jnp.ones(3), jnp.zeros(3), jnp.full(2, 0.5))
    for most, expected in ((0.25, [0.0, 2e6, 0.0]), (0.5, [8.0, 2e6, 0.0]), (1.0, [8.0, 2e6, 2 / 0.75])):
        g = margin_gradient(response, trial, LAM, most)
        np.testing.assert_allclose(g.reward[:, 0], expected, rtol=1e-6)
        np.testing.assert_allclose(g.cost, -LAM * g.reward)


def test_options_that_mean_nothing_are_refused():
    assert DecisionOptions(lams=(0.0, 0.5), margin=0.01, sigma=5.0).lams == (0.0, 0.5)
    for bad in (dict(lams=()), dict(lams=(0.5, -0.1)), dict(sigma=0.0), dict(margin=0.0), dict(tau=0.0)):
        with pytest.raises(ValueError, match="at least one price, none negative"):
            DecisionOptions(**bad)
    with pytest.raises(ValueError, match="draws is 0"):
        DecisionOptions(draws=0)
    with pytest.raises(ValueError, match="estimator is 'finite'"):
        DecisionOptions(estimator="finite")
