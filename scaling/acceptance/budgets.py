"""Two stages against training by the decision, on a trial whose every counterfactual is known: exact regret.

The same network is trained on the same rows in the same order: prediction alone ("two_stage"), or from the same warm
start on with one of the estimators of the decision's gradient ("nes" is a reconstruction of arXiv 2302.04477). Its
weight alpha is the one of the highest policy value on a trial of its own, without counterfactuals. Every policy truly
spends the same budget; its regret is what the best affordable choice would have brought more, per row. The network is
linear, and the truth bends by the trial's curvature: at 0 the predictor is well specified.

    recscale bench budgets
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx
from jaxtyping import Array

from recscale.models.domains.budget import (
    DecisionOptions,
    Response,
    ResponseHeads,
    Trial,
    decision_loss,
    policy_value,
    prediction_loss,
)
from recscale.models.domains.knapsack import aucc, aucc_interval, solve_mckp, spend_up_to
from recscale.scaling.data.budget_trial import BudgetTrial, BudgetTrialConfig, Scaling, draw_trial

from .paired import paired_differences, require_pairs, study

METHODS = {
    "two_stage": DecisionOptions(estimator=None),
    "nes": DecisionOptions(estimator="nes", draws=4),
    "margin": DecisionOptions(estimator="margin"),
    "softmax": DecisionOptions(estimator="softmax"),
    "softmax, tau": DecisionOptions(estimator="softmax", tau=0.1),
}
ALPHAS = (0.1, 1.0, 5.0)
# How wrong the network must be: (curvature, hidden features).
TRUTHS = ((0.0, 0), (1.0, 0), (2.0, 0))
TRAIN_ROWS, CHOICE_ROWS, TEST_ROWS, BATCH = 40_000, 60_000, 20_000, 1000
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


class Rows(NamedTuple):
    """Scaled features x [N, d], and what was drawn."""

    x: Array
    trial: Trial


def rows_of(trial: BudgetTrial, scaling: Scaling) -> Rows:
    """A trial as a network reads it; scaling: that of training rows."""
    arm, reward, cost = map(jnp.asarray, (trial.arm, trial.reward, trial.cost))
    return Rows(jnp.asarray(scaling(trial.x)), Trial(arm, reward, cost, jnp.asarray(trial.propensity, jnp.float32)))


class Policies:
    """Networks of several seeds, trained together on trials of their own. P seeds, A weights alpha.

    Equal arguments give equal networks.
    """

    def __init__(self, rows: Sequence[Rows], spend: np.ndarray, training: PolicyTraining, seeds: Sequence[int]):
        self.rows = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        self.price, self.training, self.seeds = jnp.asarray(spend, jnp.float32), training, jnp.asarray(seeds)
        self.optimizer = optax.adam(training.rate)
        sizes = self.rows.x.shape[-1], len(spend), training.widths

        def network(seed: Any) -> ResponseHeads:
            return ResponseHeads(*sizes, rngs=nnx.Rngs(params=jax.random.key(seed)))

        self.graph = nnx.split(nnx.eval_shape(lambda: network(0)))[0]
        params = jax.vmap(lambda seed: nnx.split(network(seed))[1])(self.seeds)
        start = params, jax.vmap(self.optimizer.init)(params)
        self.warm = self._trained(start, METHODS["two_stage"], (0.0,), 0, training.warm)

    def train(self, options: DecisionOptions, alphas: Sequence[float]) -> Any:
        """Parameters [A, P, ...] after the remaining epochs by an objective."""
        state = jax.tree.map(lambda x: x[0], self.warm)
        return self._trained(state, options, alphas, self.training.warm, self.training.epochs)[0]

    def responses(self, params: Any, rows: Rows) -> tuple[Array, Response]:
        """Of stacked networks to rows [P, ...]: prediction loss [A, P] and response [A, P, N, J]."""

        def one(params: Any, rows: Rows) -> tuple[Array, Response]:
            model = nnx.merge(self.graph, params)
            return prediction_loss(model(rows.x), rows.trial, self.price), model.response(rows.x, self.price)

        return jax.jit(jax.vmap(jax.vmap(one), in_axes=(0, None)))(params, rows)

    def _trained(self, state: Any, options: DecisionOptions, alphas: Sequence[float], first: int, last: int) -> Any:
        count = self.rows.x.shape[1]
        batch = min(BATCH, count)
        steps = count // batch

        def loss(params: Any, rows: Rows, key: Array, alpha: Array) -> Array:
            model = nnx.merge(self.graph, params)
            total = prediction_loss(model(rows.x), rows.trial, self.price)
            if options.estimator is None:
                return total
            return total + alpha * decision_loss(model.response(rows.x, self.price), rows.trial, options, key)

        def one(state: Any, rows: Rows, seed: Array, alpha: Array) -> Any:
            def part(index: Array) -> Rows:
                arm, reward, cost = (x[index] for x in rows.trial[:3])
                return Rows(rows.x[index], Trial(arm, reward, cost, rows.trial.propensity))

            def epoch(state: Any, number: Array) -> tuple[Any, None]:
                key = jax.random.fold_in(jax.random.key(seed), number)
                order = jax.random.permutation(key, count)[: steps * batch].reshape(steps, batch)

                def step(state: Any, given: tuple[Array, Array]) -> tuple[Any, None]:
                    (params, moments), (index, k) = state, given
                    grads = jax.grad(loss)(params, part(index), jax.random.fold_in(key, k), alpha)
                    updates, moments = self.optimizer.update(grads, moments)
                    return (optax.apply_updates(params, updates), moments), None

                return jax.lax.scan(step, state, (order, jnp.arange(steps)))[0], None

            return jax.lax.scan(epoch, state, jnp.arange(first, last))[0]

        seeds = jax.vmap(one, in_axes=(0, 0, 0, None))
        run = jax.jit(jax.vmap(seeds, in_axes=(None, None, None, 0)))
        return run(state, self.rows, self.seeds, jnp.asarray(alphas, jnp.float32))


def judge(response: Response, trial: BudgetTrial, budget: float, best: float | None = None) -> dict[str, float]:
    """Regret per row at a true spend of `budget`, the share of the attainable gain that is lost, and the area under the
    cost curve of the dearest arm against none, with its interval over rows. best: what the best choice brings."""
    reward, cost = (np.asarray(x, np.float64) for x in response)
    arms = spend_up_to(reward, cost, trial.true_cost, budget)
    rows = np.arange(len(arms))
    if best is None:
        best = solve_mckp(trial.true_reward, trial.true_cost, budget).value
    value, nothing = trial.true_reward[rows, arms].sum(), trial.true_reward[:, 0].sum()
    two = np.isin(trial.arm, (0, reward.shape[1] - 1))
    score = (reward[:, -1] - reward[:, 0]) / np.maximum(cost[:, -1] - cost[:, 0], 1e-6)
    columns = score[two], trial.reward[two], trial.cost[two], trial.arm[two] > 0
    low, high = aucc_interval(*columns, draws=50)
    return {
        "regret": float(best - value) / len(arms),
        "lost_share": float((best - value) / (best - nothing)),
        "aucc": aucc(*columns),
        "aucc_low": low,
        "aucc_high": high,
    }


def compare_budgets(
    *,
    seeds: int = 5,
    truths: Sequence[tuple[float, int]] = TRUTHS,
    train_rows: int = TRAIN_ROWS,
    choice_rows: int = CHOICE_ROWS,
    test_rows: int = TEST_ROWS,
    alphas: Sequence[float] = ALPHAS,
    training: PolicyTraining = PolicyTraining(),  # noqa: B008
    save: str | Path | None = None,
) -> dict[str, Any]:
    """A row for every truth and method: means over seeds, and the regret saved on two stages with the 95 % interval of
    the paired difference. "Decision-focused below two stages" is confirmed where the interval lies above 0, refuted
    where it lies below, and otherwise not resolved. save: a parquet file for the rows of every seed.

    Raises:
        ValueError: fewer than two seeds, which have no interval.
    """
    require_pairs(seeds)
    runs = []
    for curvature, hidden in truths:
        config = BudgetTrialConfig(curvature=curvature, hidden=hidden)
        found = _one_truth(config, range(seeds), (train_rows, test_rows, choice_rows), alphas, training)
        runs += [{"curvature": curvature, "hidden": hidden} | run for run in found]
    about = {"seeds": seeds, "train_rows": train_rows, "choice_rows": choice_rows, "test_rows": test_rows}
    about |= {"budget_share": BUDGET_SHARE}
    return study(about | {"alphas": list(alphas)}, pd.DataFrame(runs), summarise, save)


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `compare_budgets` from those of every seed."""
    return paired_differences(runs, "regret", "two_stage", ("curvature", "hidden"))


def _one_truth(
    config: BudgetTrialConfig,
    seeds: Sequence[int],
    sizes: tuple[int, int, int],
    alphas: Sequence[float],
    training: PolicyTraining,
) -> list[dict[str, Any]]:
    """What every seed's test says of every method; sizes: rows of training, of the test, of the choice of alpha."""
    train, test, choice = ([draw_trial(config, n, 3 * seed + k) for seed in seeds] for k, n in enumerate(sizes))
    scalings = [Scaling.of(trial.x) for trial in train]

    def stacked(trials: Sequence[BudgetTrial]) -> Rows:
        return jax.tree.map(lambda *x: jnp.stack(x), *map(rows_of, trials, scalings))

    policies = Policies(list(map(rows_of, train, scalings)), config.spend, training, seeds)
    judged, chosen_on = stacked(test), stacked(choice)
    budgets = [BUDGET_SHARE * float(trial.true_cost[:, -1].sum()) for trial in test]
    best = [solve_mckp(t.true_reward, t.true_cost, b).value for t, b in zip(test, budgets, strict=True)]
    runs: list[dict[str, Any]] = []
    for name, options in METHODS.items():
        tried = (0.0,) if options.estimator is None else alphas
        params = policies.train(options, tried)
        values = _values(policies.responses(params, chosen_on)[1], chosen_on.trial, options.lams)
        losses, responses = jax.device_get(policies.responses(params, judged))
        for seed, trial in enumerate(test):
            a = int(np.argmax(values[:, seed]))
            own = Response(*(x[a, seed] for x in responses))
            found = {"method": name, "seed": seed, "logloss": float(losses[a, seed]), "alpha": tried[a]}
            runs.append(found | judge(own, trial, budgets[seed], best[seed]))
    return runs


def _values(response: Response, trial: Trial, lams: Sequence[float]) -> np.ndarray:
    """Mean policy value over the prices on trials: [A, P]."""

    def one(response: Response, trial: Trial) -> Array:
        return jnp.stack([policy_value(response, trial, lam) for lam in lams]).mean()

    return np.asarray(jax.jit(jax.vmap(jax.vmap(one), in_axes=(0, None)))(response, trial))
