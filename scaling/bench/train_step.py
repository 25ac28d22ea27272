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
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from recscale.models import count, get_config
from recscale.models.inputs import Batch
from recscale.scaling.records.provenance import cores

from . import step_costs
from .fixed_batch import FixedBatch
from .timing import Rival, race
from .training_steps import Shape, TrainingSteps, adam_config

# The same model from the same weights: float32 sums in another order, or bfloat16 operands.
_LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}

TORCH_MISSING = 'PyTorch is not installed, so there is no comparison: pip install "recscale[bench]"'


def measure_train_step(
    *, rounds: int = 8, per_round: int = 4, torch: bool = True, tables: bool = True, known_truth: bool = True
) -> dict[str, Any]:
    """The race with PyTorch, and what large tables and on-device data add to a step, as JSON-able figures.

    Args:
        rounds, per_round: turns of each rival, and timed steps per turn.
        torch: race the PyTorch model if it is installed.
        tables, known_truth: also measure `step_costs.table_rows`, `step_costs.generation`.

    Returns:
        those of `race_torch`; `tables`; `known_truth`.
    """
    return {
        **race_torch(Shape(), rounds=rounds, per_round=per_round, torch=torch),
        "tables": step_costs.table_rows(rounds=rounds, per_round=per_round) if tables else None,
        "known_truth": step_costs.generation(rounds=rounds, per_round=per_round) if known_truth else None,
    }


def race_torch(
    shape: Shape, *, rounds: int, per_round: int, torch: bool = True, rate: float = 1e-3, device: str = "cpu"
) -> dict[str, Any]:
    """Our step and PyTorch's by turns, as JSON-able figures; ours alone without PyTorch.

    Args:
        shape: sizes. rate: learning rate of Adam.
        rounds, per_round: turns of each rival, and timed steps per turn.
        torch: race the PyTorch model if it is installed. device: where PyTorch computes, "cpu" or "cuda".

    Returns:
        rows_per_s, torch_rows_per_s and ratio (ours over theirs, above 1 is faster; None without a rival), from
        median step times; `note`: why there is no rival; `jax` and `torch` with times, FLOP/s and the chosen layout;
        shape; train_flops_per_step.

    Raises:
        ValueError: the two models do not compute the same loss.
    """
    flops = shape.rows * count("rankmixer", shape.schema(), shape.model_config()).train_flops_per_row
    ours, weights, batch = jax_step(shape, rate)
    steps: dict[str, Rival] = {"jax": ours}
    rival, note = _torch_step(shape, weights, batch, rate, device) if torch else ({}, None)
    if rival:
        steps["torch"] = rival.pop("step")
        rival["first_loss_difference"] = _same_loss(ours, rival["first_loss"], _LOSS_TOLERANCE[device])
    times = race(steps, rounds=rounds, per_round=per_round)
    for time in times.values():
        time["rows_per_s"] = 1e3 * shape.rows / time["median_ms"]
        time["flops_per_s"] = 1e3 * flops / time["median_ms"]
    speed, other = (times[name]["rows_per_s"] if name in times else None for name in ("jax", "torch"))
    return {
        "rows_per_s": speed,
        "torch_rows_per_s": other,
        "ratio": speed / other if speed and other else None,
        "note": note,
        "jax": times["jax"],
        "torch": {**rival, **times["torch"]} if rival else None,
        "shape": dataclasses.asdict(shape),
        "train_flops_per_step": flops,
    }


def race_torch_at(model: str, rows: int, *, steps: int, device: str) -> dict[str, Any]:
    """`race_torch` at the sizes of a RankMixer preset, tokens given as dense input."""
    config = get_config(model)
    shape = Shape(rows, config.tokens, config.width, config.hidden, config.layers)
    return race_torch(shape, rounds=steps, per_round=1, device=device)


def jax_step(shape: Shape, rate: float = 1e-3) -> tuple[TrainingSteps, dict[str, np.ndarray], Batch]:
    """Our steps; the initial weights by rival's name; the batch."""
    source = FixedBatch(shape.schema(), shape.rows)
    batch = source.batch(0)
    steps = TrainingSteps(adam_config("rankmixer", **shape.model_config()), source, batch, rate)
    return steps, weights_of(steps.state.params), batch


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


def tokens_of(batch: Batch) -> tuple[Float[np.ndarray, "T B D"], Float[np.ndarray, " B"]]:
    """(x, labels) of a batch whose dense fields are tokens."""
    fields = [np.asarray(value)[:, 0] for value in batch.candidates.dense.values()]
    return np.stack(fields), np.asarray(batch.labels)[:, 0, 0]


def _torch_step(
    shape: Shape, weights: dict[str, np.ndarray], batch: Batch, rate: float, device: str
) -> tuple[dict[str, Any], str | None]:
    """The fastest layout of the rival with its facts, or {} and why there is none."""
    if importlib.util.find_spec("torch") is None:
        return {}, TORCH_MISSING
    import torch

    from . import torch_rankmixer

    torch.set_num_threads(len(cores()))
    x, labels = tokens_of(batch)
    steps, first = {}, {}
    # Compiling each takes minutes for a GPU, where the layouts are one product by another name.
    for layout in torch_rankmixer.LAYOUTS if device == "cpu" else torch_rankmixer.LAYOUTS[:1]:
        steps[layout], _ = torch_rankmixer.make_step(
            weights, x, labels, layers=shape.layers, layout=layout, rate=rate, device=device
        )
        first[layout] = steps[layout](1)  # compiles
    medians = {layout: times["median_ms"] for layout, times in race(steps, rounds=2, per_round=2).items()}
    fastest = min(medians, key=medians.__getitem__)
    facts = {"layout": fastest, "trial_ms": medians, "threads": torch.get_num_threads(), "first_loss": first[fastest]}
    return {"step": steps[fastest], **facts}, None


def _same_loss(ours: TrainingSteps, theirs: float, tolerance: float) -> float:
    """Difference of the losses of the first step; ValueError if the models are not the same."""
    difference = abs(ours(1) - theirs)
    if not difference < tolerance:
        raise ValueError(
            f"the first losses differ by {difference:.2e}, expected below {tolerance:g}: not the same model"
        )
    return difference
