"""Training steps to be timed: the trainer's own, one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from recscale.models.inputs import Batch, Field, Schema
from recscale.scaling.data.source import Source
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a step on tokens given as dense input; the defaults are those every report uses."""

    rows: int = 1024
    tokens: int = 16
    width: int = 128
    hidden: int = 512
    layers: int = 2

    def schema(self) -> Schema:
        """T dense fields of width D, which the "identity" tokenizer takes as tokens."""
        return Schema(tuple(Field(f"token{t:02d}", "candidate", self.width) for t in range(self.tokens)))

    def model_config(self, **flags: Any) -> dict[str, Any]:
        """Settings of a mixer of these sizes, and further ones."""
        sizes = {"tokenizer": "identity", "width": self.width, "hidden": self.hidden, "layers": self.layers}
        return sizes | flags


def adam_config(model: str, **settings: Any) -> ConfigDict:
    """A run's configuration with Adam at a constant rate and these settings of the model."""
    config = get_config(model)
    config.model.update(settings)
    config.training.update({"optimizer": "adam", "schedule": "constant"})
    return config


class TrainingSteps:
    """The trainer's own steps with one replica, one after the other; called with n, it does n of them.

    Args:
        config: of the run; its schedule has no warm-up here.
        source: what the trainer is made for.
        batch: of every step; None where the source makes one inside the step.
        rate: peak learning rate.

    Attributes:
        trainer; state: before the next step.
    """

    def __init__(self, config: ConfigDict, source: Source, batch: Batch | None, rate: float = 1e-3):
        self.trainer = make_trainer(config, source, [(0, rate)], warmup=0)
        self.state = self.trainer.fresh_state()
        self._batch = batch

    def __call__(self, steps: int) -> float:
        """Does so many steps, waits for them, and returns the loss of the last one."""
        metrics = {}
        for _ in range(steps):
            self.state, metrics = self.trainer.step(self.state, self._batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"][0])
