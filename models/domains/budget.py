"""Marketing budgets: predict what each spend brings and costs, and train the prediction by what is decided with it.

A randomised trial gives rows (x_i, arm t_i, reward r_i, cost c_i), arms t in 0 ... J-1, arm 0 spending nothing, drawn
with propensity p_t. A network predicts reward[N,J] and cost[N,J]; a price lam >= 0 of money decides

    a_i = argmax_j reward_ij - lam cost_ij
    V(lam) = 1/N sum_i v_i [a_i = t_i],   v_i = (r_i - lam c_i) / p_{t_i}          unbiased, because t was drawn

Objective: prediction loss on the arm that was drawn - alpha * mean of V over some lam. V is piecewise constant in the
predictions, so its gradient g is estimated, and injected as that of -sum(stop_gradient(g) * prediction) / N:

    nes      antithetic normal noise of size sigma on every prediction, S draws; v_i depends on row i alone, so
             g_i = 1/(2 sigma S) sum_s eps_si (v_i(+) - v_i(-)), a factor N less variance than noise on all rows at once
    margin   g_i = v_i / |score_t - best other score| on the drawn arm, none beyond a margin h (DFCL, 2407.13664)
    softmax  -1/N sum_i v_i softmax_j((reward - lam cost)/tau)[t_i], differentiated exactly (2407.13664; tau = 1 is
             policy learning, others the entropy-regularised problem)

arXiv 2302.04477 states the claim and the outline; its method, baselines and numbers are undisclosed. "nes" is a
reconstruction of its likely method, to be held against the other two, whose equations are public.

Letters: N rows, J arms, d features, F hidden width, S draws of noise.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recscale.models.layers.dense import MLP, Dense, mlp_flops, mlp_params
from recscale.models.layers.losses import binary_cross_entropy
from recscale.models.options import Options, require_sizes


@dataclasses.dataclass(frozen=True)
class DecisionOptions(Options):
    """Flags of the decision loss.

    estimator: of the gradient, None for prediction alone; alpha: its weight; lams: prices it is averaged over;
    sigma, draws: of "nes"; margin: h; tau: of "softmax"; through: whether only rewards are moved, or costs too.
    """

    estimator: Literal["nes", "margin", "softmax"] | None = "nes"
    alpha: float = 1.0
    lams: tuple[float, ...] = (0.1, 0.5, 1.0)
    sigma: float = 0.1
    draws: int = 16
    margin: float = 0.3
    tau: float = 1.0
    through: Literal["both", "reward"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(draws=self.draws)
        if min(self.sigma, self.margin, self.tau) <= 0 or min(self.lams, default=-1.0) < 0:
            raise ValueError(
                f"sigma, margin, tau are {self.sigma}, {self.margin}, {self.tau} and lams {self.lams}; expected "
                "positive sizes and at least one price, none negative"
            )


class Trial(NamedTuple):
    """Rows of a randomised trial: arm int32 [N], reward and cost of that arm [N], propensity of every arm [J]."""

    arm: Int[Array, " N"]
    reward: Float[Array, " N"]
    cost: Float[Array, " N"]
    propensity: Float[Array, " J"]

    def value(self, lam: float | Float[Array, ""]) -> Float[Array, " N"]:
        """v_i."""
        return (self.reward - lam * self.cost) / jnp.take(self.propensity, self.arm)


class Response(NamedTuple):
    """reward and cost [N, J], predicted or true."""

    reward: Float[Array, "N J"]
    cost: Float[Array, "N J"]

    def scores(self, lam: float | Float[Array, ""]) -> Float[Array, "N J"]:
        return self.reward - lam * self.cost


class ResponseHeads(nnx.Module):
    """x [N, d] -> logits of reward and of uptake, [N, J] each, from one trunk; what an arm costs if it is taken up is
    known, `spend` [J], 0 for arm 0."""

    def __init__(
        self, features: int, arms: int, widths: tuple[int, ...], *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.trunk = MLP(features, widths, dtype=dtype, rngs=rngs)
        width = widths[-1] if widths else features
        self.reward, self.uptake = (
            Dense(width, arms, axes=("embed", "tasks"), dtype=dtype, rngs=rngs) for _ in range(2)
        )

    def __call__(self, x: Float[Array, "N d"]) -> tuple[Float[Array, "N J"], Float[Array, "N J"]]:
        h = self.trunk(x)
        return self.reward(h), self.uptake(h)

    def response(self, x: Float[Array, "N d"], spend: Float[Array, " J"]) -> Response:
        """Expected reward and cost of every arm."""
        reward, uptake = self(x)
        return Response(jax.nn.sigmoid(reward), jax.nn.sigmoid(uptake) * spend[None])


def response_params(features: int, arms: int, widths: tuple[int, ...]) -> int:
    """Parameters of `ResponseHeads`."""
    return mlp_params(features, widths) + 2 * mlp_params((features, *widths)[-1], (arms,))


def response_flops(features: int, arms: int, widths: tuple[int, ...]) -> int:
    """Forward FLOPs of `ResponseHeads` per row."""
    return mlp_flops(features, widths) + 2 * mlp_flops((features, *widths)[-1], (arms,))


def prediction_loss(
    logits: tuple[Float[Array, "N J"], Float[Array, "N J"]], trial: Trial, spend: Float[Array, " J"]
) -> Float[Array, ""]:
    """Mean logloss of reward and uptake on the arm that was drawn; arm 0 is never taken up."""
    reward, uptake = (jnp.take_along_axis(x, trial.arm[:, None], axis=1)[:, 0] for x in logits)
    taken = (trial.cost > 0).astype(jnp.float32)
    spends = jnp.take(spend, trial.arm) > 0
    costs = jnp.where(spends, binary_cross_entropy(uptake, taken), 0.0)
    return binary_cross_entropy(reward, trial.reward).mean() + costs.mean()


def policy_value(response: Response, trial: Trial, lam: float | Float[Array, ""]) -> Float[Array, ""]:
    """V(lam) of the policy that these predictions decide, on the rows of a trial."""
    chosen = jnp.argmax(response.scores(lam), axis=1) == trial.arm
    return jnp.where(chosen, trial.value(lam), 0.0).mean()


def decision_loss(
    response: Response, trial: Trial, options: DecisionOptions, key: Array | None = None
) -> Float[Array, ""]:
    """-alpha times the mean of V over the prices, or what has its estimated gradient; a key is needed by "nes"."""
    each = []
    for index, lam in enumerate(options.lams):
        if options.estimator == "softmax":
            each.append(_softmax_loss(response, trial, lam, options.tau, options.through))
            continue
        if options.estimator == "nes":
            if key is None:
                raise ValueError("estimator 'nes' draws noise: give a key")
            g = nes_gradient(response, trial, lam, jax.random.fold_in(key, index), options.sigma, options.draws)
        else:
            g = margin_gradient(response, trial, lam, options.margin)
        moved = (g.reward * response.reward).sum()
        moved += (g.cost * response.cost).sum() if options.through == "both" else 0.0
        each.append(-moved / trial.arm.shape[0])
    return options.alpha * sum(each, jnp.zeros(())) / len(options.lams)


def nes_gradient(
    response: Response, trial: Trial, lam: float, key: Array, sigma: float = 0.1, draws: int = 16
) -> Response:
    """Estimate of d v_i [a_i = t_i] / d prediction under noise, row by row; no gradient flows through it."""
    value = trial.value(lam)[:, None]

    def one(total: Response, key: Array) -> tuple[Response, None]:
        noise = Response(*jax.random.normal(key, (2, *response.reward.shape)))

        def gained(sign: float) -> Array:
            moved = Response(*(x + sign * sigma * e for x, e in zip(response, noise, strict=True)))
            return jnp.where(jnp.argmax(moved.scores(lam), axis=1)[:, None] == trial.arm[:, None], value, 0.0)

        difference = (gained(1.0) - gained(-1.0)) / (2 * sigma * draws)
        return Response(*(t + e * difference for t, e in zip(total, noise, strict=True))), None

    zero = Response(jnp.zeros_like(response.reward), jnp.zeros_like(response.cost))
    return jax.lax.stop_gradient(jax.lax.scan(one, zero, jax.random.split(key, draws))[0])


def margin_gradient(response: Response, trial: Trial, lam: float, most: float = 0.3) -> Response:
    """v_i over the smallest change of the drawn arm's score that flips the decision, where that is below `most`."""
    scores = jax.lax.stop_gradient(response.scores(lam))
    drawn = jax.nn.one_hot(trial.arm, scores.shape[1])
    own = (scores * drawn).sum(axis=1)
    margin = jnp.abs(own - jnp.where(drawn > 0, -jnp.inf, scores).max(axis=1))
    g = jnp.where(margin < most, trial.value(lam) / jnp.maximum(margin, 1e-6), 0.0)[:, None] * drawn
    return Response(g, -lam * g)


def _softmax_loss(response: Response, trial: Trial, lam: float, tau: float, through: str) -> Array:
    cost = response.cost if through == "both" else jax.lax.stop_gradient(response.cost)
    chance = jax.nn.softmax((response.reward - lam * cost) / tau, axis=1)
    return -(trial.value(lam) * jnp.take_along_axis(chance, trial.arm[:, None], axis=1)[:, 0]).mean()
