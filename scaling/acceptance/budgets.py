"""Two stages against training by the decision, on a trial whose every counterfactual is known: exact regret.

The same network is trained on the same rows in the same order: prediction alone ("two_stage"), or after a warm start
with one of the estimators of the decision's gradient ("nes" is a reconstruction of arXiv 2302.04477). Every policy
truly spends the same budget; its regret is what the best affordable choice would have brought more, per row. Rows are
hidden features: the fewer, the better the predictor is specified, and the less there is to gain.

    recscale bench budgets
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy import stats

from recscale.models.domains.budget import (
    DecisionOptions,
    Response,
    ResponseHeads,
    Trial,
    decision_loss,
    prediction_loss,
)
from recscale.models.domains.knapsack import aucc, solve_mckp, spend_up_to
from recscale.scaling.data.budget_trial import BudgetTrial, BudgetTrialConfig, Scaling, draw_trial

ESTIMATORS = ("two_stage", "nes", "margin", "softmax")
TRAIN_ROWS, TEST_ROWS, BATCH = 20_000, 20_000, 500
# Of what it would cost to give everybody the dearest arm.
BUDGET_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class PolicyTraining:
    """widths of the trunk, none for a linear model; epochs, of which the first `warm` train prediction alone; rate of
    Adam."""

    widths: tuple[int, ...] = ()
    epochs: int = 30
    warm: int = 20
    rate: float = 3e-3


def train_policy(
    trial: BudgetTrial,
    scaling: Scaling,
    spend: np.ndarray,
    options: DecisionOptions,
    training: PolicyTraining,
    seed: int,
) -> ResponseHeads:
    """A network trained on a trial; equal arguments give equal networks."""
    rows, batch = len(trial.arm), min(BATCH, len(trial.arm))
    x, price = jnp.asarray(scaling(trial.x)), jnp.asarray(spend, jnp.float32)
    arm, reward, cost = map(jnp.asarray, (trial.arm, trial.reward, trial.cost))
    propensity = jnp.asarray(trial.propensity, jnp.float32)
    graph, params = nnx.split(ResponseHeads(x.shape[1], len(spend), training.widths, rngs=nnx.Rngs(seed)))
    optimizer, steps = optax.adam(training.rate), rows // batch

    def loss(params: Any, index: jax.Array, key: jax.Array, decides: jax.Array) -> jax.Array:
        model, own = nnx.merge(graph, params), Trial(arm[index], reward[index], cost[index], propensity)
        total = prediction_loss(model(x[index]), own, price)
        if options.estimator is None:
            return total
        return total + decides * decision_loss(model.response(x[index], price), own, options, key)

    def epoch(state: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], None]:
        key = jax.random.fold_in(jax.random.key(seed), number)
        order = jax.random.permutation(key, rows)[: steps * batch].reshape(steps, batch)

        def step(state: tuple[Any, Any], given: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], None]:
            (params, moments), (index, k) = state, given
            grads = jax.grad(loss)(params, index, jax.random.fold_in(key, k), number >= training.warm)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), None

        return jax.lax.scan(step, state, (order, jnp.arange(steps)))[0], None

    run = jax.jit(lambda state: jax.lax.scan(epoch, state, jnp.arange(training.epochs))[0])
    params, _ = run((params, optimizer.init(params)))
    return nnx.merge(graph, params)


def judge(response: Response, trial: BudgetTrial, budget: float) -> dict[str, float]:
    """Regret per row at a true spend of `budget`, the share of the attainable gain that is lost, and the area under the
    cost curve of the dearest arm against none."""
    reward, cost = (np.asarray(x, np.float64) for x in response)
    arms = spend_up_to(reward, cost, trial.true_cost, budget)
    rows = np.arange(len(arms))
    value, best = trial.true_reward[rows, arms].sum(), solve_mckp(trial.true_reward, trial.true_cost, budget).value
    nothing = trial.true_reward[:, 0].sum()
    two = np.isin(trial.arm, (0, reward.shape[1] - 1))
    score = (reward[:, -1] - reward[:, 0]) / np.maximum(cost[:, -1] - cost[:, 0], 1e-6)
    return {
        "regret": float(best - value) / len(arms),
        "lost_share": float((best - value) / (best - nothing)),
        "aucc": aucc(score[two], trial.reward[two], trial.cost[two], trial.arm[two] > 0),
    }


def compare_budgets(
    *,
    seeds: int = 5,
    hidden: Sequence[int] = (0, 4),
    train_rows: int = TRAIN_ROWS,
    test_rows: int = TEST_ROWS,
    alpha: float = 1.0,
    training: PolicyTraining = PolicyTraining(),  # noqa: B008
) -> dict[str, Any]:
    """A row for every number of hidden features and estimator: means over seeds, and the paired difference of regret to
    two stages with its 95 % interval. An ordering holds where the interval excludes 0.

    Raises:
        ValueError: fewer than two seeds, which have no interval.
    """
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}; a paired difference needs 2 or more for its interval")
    rows = []
    for count in hidden:
        config, runs = BudgetTrialConfig(hidden=count), {name: [] for name in ESTIMATORS}
        for seed in range(seeds):
            train, test = draw_trial(config, train_rows, 2 * seed), draw_trial(config, test_rows, 2 * seed + 1)
            scaling, budget = Scaling.of(train.x), BUDGET_SHARE * float(test.true_cost[:, -1].sum())
            for name in ESTIMATORS:
                options = DecisionOptions(estimator=None if name == "two_stage" else name, alpha=alpha)
                model = train_policy(train, scaling, config.spend, options, training, seed)
                response = jax.device_get(model.response(jnp.asarray(scaling(test.x)), jnp.asarray(config.spend)))
                runs[name].append(judge(Response(*response), test, budget))
        rows += [{"hidden": count, "method": name} | _summary(runs, name) for name in ESTIMATORS]
    return {"seeds": seeds, "train_rows": train_rows, "budget_share": BUDGET_SHARE, "alpha": alpha, "rows": rows}


def _summary(runs: Mapping[str, Sequence[Mapping[str, float]]], name: str) -> dict[str, float]:
    found = {key: float(np.mean([run[key] for run in runs[name]])) for key in runs[name][0]}
    difference = np.asarray(
        [own["regret"] - two["regret"] for own, two in zip(runs[name], runs["two_stage"], strict=True)]
    )
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
    mean = float(difference.mean())
    return found | {"minus_two_stage": mean, "low": mean - float(half), "high": mean + float(half)}
