"""The numbers a training step is compiled with, from the section `training` of a configuration."""

from __future__ import annotations

import dataclasses
from typing import get_args

import optax
from ml_collections import ConfigDict

from . import optimizers, schedule
from .config import require_word
from .rematerialisation import Remat
from .rows import memory_rows, row_updates


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Numbers the step is compiled with."""

    optimizer: optax.GradientTransformation
    embedding_optimizer: row_updates.RowOptimizer
    embedding_rate: float
    embedding_eps: float
    embedding_init_std: float
    embedding_l2: float
    warmup: int
    decay_shape: schedule.DecayShape
    suffix: tuple[float, float] | None = None
    values: memory_rows.ValueOptions = memory_rows.ValueOptions()
    remat: Remat = "none"
    accumulate: int = 1

    def __post_init__(self) -> None:
        known = get_args(row_updates.RowOptimizer)
        require_word("training.embedding_optimizer", self.embedding_optimizer, known)
        require_word("training.decay_shape", self.decay_shape, get_args(schedule.DecayShape))
        require_word("training.remat", self.remat, get_args(Remat))


def step_options(t: ConfigDict, batch_rows: int, warmup: int) -> StepOptions:
    """The numbers a `training` section gives a step of `batch_rows` rows.

    Raises:
        ValueError: a word that is not known, or settings that contradict each other.
    """
    return StepOptions(
        optimizer=optimizers.dense_optimizer(
            t.optimizer, b1=t.b1, b2=t.b2, eps=t.eps, weight_decay=t.weight_decay, clip_norm=t.clip_norm
        ),
        embedding_optimizer=t.embedding_optimizer,
        embedding_rate=t.embedding_lr,
        embedding_eps=t.embedding_eps,
        embedding_init_std=t.embedding_init_std,
        embedding_l2=t.embedding_l2,
        warmup=warmup,
        decay_shape="cosine" if t.schedule == "cosine" else t.decay_shape,
        suffix=_suffix(t),
        values=memory_rows.value_options(t, batch_rows),
        remat=t.get("remat", "none"),
        accumulate=t.get("accumulate", 1),
    )


def _suffix(training: ConfigDict) -> tuple[float, float] | None:
    alpha, beta = training.suffix_alpha, training.suffix_beta
    if (alpha > 0) != (beta > 0) or min(alpha, beta) < 0:
        raise ValueError(
            f"training.suffix_alpha is {alpha} and suffix_beta {beta}; set both above 0, or both 0 for off"
        )
    return (alpha, beta) if alpha > 0 else None
