"""The training step of RankMixer on this machine, beside the same model in PyTorch; and what tables and data add to it.

    T 16, D 128, F 512, L 2, 1,024 rows, float32, Adam, tokens given as dense input

Ours is the trainer's own step (`recscale.scaling.training.step`), with everything it does besides: metrics, a replica
axis, the check for a loss that is not finite. The rival is `torch_rankmixer` under `torch.compile`, in whichever of its
layouts is fastest here. Both run by turns in one process, on the same threads, from the same weights and batch; the
losses of their first steps are compared, so that two different models are never raced.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from recscale.models import count
from recscale.models.inputs import Batch, Field, Schema
from recscale.scaling.records.provenance import cores, environment
from recscale.scaling.training import get_config
from recscale.scaling.training.step import Trainer, make_trainer

from . import step_costs
from .fixed_batch import FixedBatch
from .timing import Rival, alternate, summary

# The same model from the same weights: float32 sums in another order.
_LOSS_TOLERANCE = 1e-4

TORCH_MISSING = 'PyTorch is not installed, so there is no comparison: pip install "recscale[bench]"'


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the measured step; the defaults are those every report uses."""

    rows: int = 1024
    tokens: int = 16
    width: int = 128
    hidden: int = 512
    layers: int = 2

    def schema(self) -> Schema:
        """T dense fields of width D, which the "identity" tokenizer takes as tokens."""
        return Schema(tuple(Field(f"token{t:02d}", "candidate", self.width) for t in range(self.tokens)))

    def model_config(self) -> dict[str, Any]:
        return {"tokenizer": "identity", "width": self.width, "hidden": self.hidden, "layers": self.layers}


def run(
    *,
    shape: Shape | None = None,
    rate: float = 1e-3,
    rounds: int = 8,
    per_round: int = 4,
    torch: bool = True,
    tables: bool = True,
    known_truth: bool = True,
) -> dict[str, Any]:
    """Measures and returns JSON-able figures.

    Args:
        shape: sizes. rate: learning rate of Adam.
        rounds, per_round: turns of each rival, and timed steps per turn.
        torch: race the PyTorch model if it is installed.
        tables, known_truth: also measure what large tables and on-device data cost (see `step_costs`).

    Returns:
        rows_per_s, torch_rows_per_s and ratio (ours over theirs, above 1 is faster; None without a rival), from
        median step times; `jax` and `torch` with times, FLOP/s and the chosen layout; `tables`; `known_truth`;
        `environment`.

    Raises:
        ValueError: the two models do not compute the same loss.
    """
    shape = shape or Shape()
    flops = shape.rows * count("rankmixer", shape.schema(), shape.model_config()).train_flops_per_row
    ours, weights, batch = jax_step(shape, rate)
    steps: dict[str, Rival] = {"jax": ours}
    result: dict[str, Any] = {"rows_per_s": None, "torch_rows_per_s": None, "ratio": None, "note": None}
    rival: dict[str, Any] = {}
    if torch:
        rival, result["note"] = _torch_step(shape, weights, batch, rate)
        if rival:
            steps["torch"] = rival.pop("step")
            rival["first_loss_difference"] = _same_loss(ours, rival["first_loss"])
    times = {name: summary(samples) for name, samples in alternate(steps, rounds=rounds, per_round=per_round).items()}
    for time in times.values():
        time["rows_per_s"] = 1e3 * shape.rows / time["median_ms"]
        time["flops_per_s"] = 1e3 * flops / time["median_ms"]
    result["rows_per_s"] = times["jax"]["rows_per_s"]
    if "torch" in times:
        result["torch_rows_per_s"] = times["torch"]["rows_per_s"]
        result["ratio"] = result["rows_per_s"] / result["torch_rows_per_s"]
    result |= {"jax": times["jax"], "torch": {**rival, **times["torch"]} if "torch" in times else None}
    result |= {"shape": dataclasses.asdict(shape), "train_flops_per_step": flops}
    result["tables"] = step_costs.table_rows(rounds=rounds, per_round=per_round) if tables else None
    result["known_truth"] = step_costs.generation(rounds=rounds, per_round=per_round) if known_truth else None
    return result | {"environment": environment()}


def jax_step(shape: Shape, rate: float = 1e-3) -> tuple[Callable[[int], float], dict[str, np.ndarray], Batch]:
    """A function that does n steps and returns the last loss; the initial weights by rival's name; the batch."""
    config: Any = get_config("rankmixer")
    config.model.update(shape.model_config())
    config.training.update({"optimizer": "adam", "schedule": "constant"})
    source = FixedBatch(shape.schema(), shape.rows)
    trainer = make_trainer(config, source, [(0, rate)], warmup=0)
    state = trainer.fresh_state()
    weights = weights_of(state.params)
    batch = source.batch(0)
    return stepper(trainer, state, batch), weights, batch


def stepper(trainer: Trainer, state: Any, batch: Batch | None) -> Callable[[int], float]:
    """A function that does n training steps of the only replica, waits for them, and returns the last one's loss."""
    held = [state]

    def run(steps: int) -> float:
        for _ in range(steps):
            held[0], metrics = trainer.step(held[0], batch)
        jax.block_until_ready(held[0])
        return float(metrics["loss"][0])

    return run


def weights_of(params: Any) -> dict[str, np.ndarray]:
    """Weights of replica 0 under the names `torch_rankmixer.RankMixer` gives them."""
    tree = nnx.to_pure_dict(params)
    weights = {}
    for i, block in tree["blocks"].items():
        ffn, name = block["ffn"], f"blocks.{i}"
        for layer in ("up", "down"):
            kernel = ffn[layer]["kernel"][0]
            weights[f"{name}.{layer}"] = kernel.swapaxes(1, 2) if layer == "down" else kernel  # stored [T, D, F]
            weights[f"{name}.{layer}_bias"] = ffn[layer]["bias"][0]
        for norm in ("mixing_norm", "ffn_norm"):
            weights[f"{name}.{norm}.weight"] = block[norm]["gain"][0]
            weights[f"{name}.{norm}.bias"] = block[norm]["bias"][0]
    weights["head.weight"] = tree["towers"]["kernels"][0][0, 0].T
    weights["head.bias"] = tree["towers"]["biases"][0][0, 0]
    return {name: np.array(value) for name, value in weights.items()}


def tokens_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(x [T, B, D], labels [B]) of a batch whose dense fields are tokens."""
    fields = [np.asarray(value)[:, 0] for value in batch.candidates.dense.values()]
    return np.stack(fields), np.asarray(batch.labels)[:, 0, 0]


def _torch_step(
    shape: Shape, weights: dict[str, np.ndarray], batch: Batch, rate: float
) -> tuple[dict[str, Any], str | None]:
    """The fastest layout of the rival with its facts, or {} and why there is none."""
    if importlib.util.find_spec("torch") is None:
        return {}, TORCH_MISSING
    import torch

    from . import torch_rankmixer

    torch.set_num_threads(len(cores()))
    x, labels = tokens_of(batch)
    steps, first = {}, {}
    for layout in torch_rankmixer.LAYOUTS:
        steps[layout], _ = torch_rankmixer.make_step(weights, x, labels, layers=shape.layers, layout=layout, rate=rate)
        first[layout] = steps[layout](1)  # compiles
    trial = alternate(steps, rounds=2, per_round=2)
    medians = {layout: summary(samples)["median_ms"] for layout, samples in trial.items()}
    fastest = min(medians, key=medians.__getitem__)
    facts = {"layout": fastest, "trial_ms": medians, "threads": torch.get_num_threads(), "first_loss": first[fastest]}
    return {"step": steps[fastest], **facts}, None


def _same_loss(ours: Callable[[int], float], theirs: float) -> float:
    """Difference of the losses of the first step; ValueError if the models are not the same."""
    difference = abs(ours(1) - theirs)
    if not difference < _LOSS_TOLERANCE:
        raise ValueError(
            f"the first losses differ by {difference:.2e}, expected below {_LOSS_TOLERANCE:g}: not the same model"
        )
    return difference
