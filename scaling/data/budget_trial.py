"""A synthetic randomised trial of spends, with every counterfactual kept: the regret of a policy on it is exact.

    P(reward | x, j)  = sigmoid(a x + a_0 + (f(b x) + b_0) sqrt(j / (J - 1)))  concave in the arm, steeper for some rows
    P(uptake | x, j)  = sigmoid(f(c x) + c_0)                                  of an arm that spends
    cost of an arm    = uptake * spend_j,   spend_j = (j / (J - 1))^2          convex in the arm, 0 for arm 0
    f(t)              = t + curvature sd(t) ((t / sd(t))^2 - 1) / sqrt 2       t itself without curvature

x is standard normal, arms are drawn with equal chances. Two things set by how much a model that is linear in what it is
shown must be wrong: `curvature`, and `hidden` features, the last ones, which are not shown. The second takes knowledge
away and hardly bends anything: a sigmoid averaged over normal features is nearly one of the others. Letters: N rows,
J arms, d features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.special import expit

from recscale.models.options import require_sizes

# Columns that public trials carry and that happen after the treatment: no feature of a policy.
POST_TREATMENT = ("exposure", "visit", "conversion")


@dataclasses.dataclass(frozen=True)
class BudgetTrialConfig:
    """features d, of which the last `hidden` are not shown; arms J; strength: size of what depends on x; curvature: of
    what rewards and uptakes do with it."""

    features: int = 8
    hidden: int = 0
    arms: int = 4
    strength: float = 1.0
    curvature: float = 0.0
    world_seed: int = 0

    def __post_init__(self):
        require_sizes(features=self.features)
        if not 0 <= self.hidden < self.features or self.arms < 2:
            raise ValueError(
                f"{self.hidden} of {self.features} features are hidden, {self.arms} arms; expected a shown "
                "feature and two arms"
            )

    @property
    def spend(self) -> Float64[np.ndarray, " J"]:
        """What each arm costs where it is taken up."""
        return (np.arange(self.arms) / (self.arms - 1)) ** 2


@dataclasses.dataclass(frozen=True)
class BudgetTrial:
    """N rows: shown features x, the arm drawn, its reward and cost; and of every arm the chance of a reward and the
    expected cost, [N, J]."""

    x: Float[np.ndarray, "N d"]
    arm: Int[np.ndarray, " N"]
    reward: Float[np.ndarray, " N"]
    cost: Float[np.ndarray, " N"]
    true_reward: Float64[np.ndarray, "N J"]
    true_cost: Float64[np.ndarray, "N J"]

    @property
    def propensity(self) -> Float64[np.ndarray, " J"]:
        """Share of each arm."""
        arms = self.true_reward.shape[1]
        return np.bincount(self.arm, minlength=arms) / len(self.arm)


def draw_trial(config: BudgetTrialConfig, rows: int, seed: int) -> BudgetTrial:
    """Rows of the trial: a pure function of its arguments. The world, its coefficients, is that of `world_seed`."""
    world, rng = np.random.default_rng(config.world_seed), np.random.default_rng([config.world_seed, 1 + seed])
    d, J, spend = config.features, config.arms, config.spend
    a, b, c = config.strength * world.standard_normal((3, d)) / np.sqrt(d)
    x = rng.standard_normal((rows, d))

    def bent(weights: np.ndarray) -> np.ndarray:
        t, sd = x @ weights, np.linalg.norm(weights)
        return t + config.curvature * sd * ((t / sd) ** 2 - 1) / np.sqrt(2)

    level = np.sqrt(np.arange(J) / (J - 1))
    reward = expit((x @ a - 2.0)[:, None] + (bent(b) + 1.0)[:, None] * level)
    uptake = np.broadcast_to(expit(bent(c))[:, None], (rows, J)) * (spend > 0)
    arm = rng.integers(0, J, rows)
    own = np.arange(rows), arm
    return BudgetTrial(
        x=x[:, : d - config.hidden].astype(np.float32),
        arm=arm.astype(np.int32),
        reward=(rng.uniform(size=rows) < reward[own]).astype(np.float32),
        cost=((rng.uniform(size=rows) < uptake[own]) * spend[arm]).astype(np.float32),
        true_reward=reward,
        true_cost=uptake * spend,
    )


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation of features, those of training rows."""

    mean: Float64[np.ndarray, " d"]
    std: Float64[np.ndarray, " d"]

    @classmethod
    def of(cls, train: Float[np.ndarray, "N d"]) -> Scaling:
        """Statistics of training rows, and of them alone: scaling over rows that are tested on would leak them."""
        std = np.asarray(train, np.float64).std(axis=0)
        return cls(np.asarray(train, np.float64).mean(axis=0), np.where(std > 0, std, 1.0))

    def __call__(self, x: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N d"]:
        """Scaled features, float32."""
        return ((x - self.mean) / self.std).astype(np.float32)


def feature_columns(columns: Iterable[str], asked: Sequence[str] | None = None) -> list[str]:
    """Which columns of a trial's table are features: those asked for, or all that nothing says against.

    Raises:
        ValueError: a column is asked for that happens after the treatment, or that is not there.
    """
    known = list(columns)
    if asked is None:
        return [name for name in known if name not in (*POST_TREATMENT, "treatment")]
    late = [name for name in asked if name in POST_TREATMENT]
    if late:
        raise ValueError(
            f"{', '.join(late)} happens after the treatment: a policy that reads it could not be applied; leave it out"
        )
    missing = [name for name in asked if name not in known]
    if missing:
        raise ValueError(f"the trial has no column {', '.join(missing)}; it has {', '.join(known)}")
    return list(asked)
