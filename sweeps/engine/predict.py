"""What a job will cost, predicted before anything is launched: peak memory and seconds. Both are estimates and say so.

Parameters and FLOPs of a plan are counted; these two are not, they only have to be good enough to fill a machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from recscale.models.inputs import Schema
from recscale.scaling.training.config import KEPT_CHECKPOINTS
from recscale.scaling.training.schedule import program, warmup_steps

# Python, jax, the compiler's own memory and a few programs.
BASE_BYTES = 900e6

# Copies of the dense parameters alive at the peak of a step besides the state: gradient, update and the checkpoint's
# host copy.
_DENSE_COPIES = 3
_MOMENTS = {"adamw": 2, "adam": 2, "rmsprop": 1, "adagrad": 1}

# Row optimiser state per table: floats per row and per value.
_ROW_STATE = {"rowwise_adagrad": (1, 0), "rowwise_adam": (1, 2), "rowwise_sgd": (0, 0)}

# Activations kept for the backward pass are the multiply-adds over the fan-in. A typical fan-in is the square root of a
# layer's parameters; counting 64 equal layers errs on the side of narrow ones, so of more activations. Four copies:
# before and after the non-linearity, and their gradients.
_LAYERS = 64
_LEAST_FAN_IN = 8
_ACTIVATION_COPIES = 4

# Share of the probe's FLOP/s a training step of a small model reaches: its products are narrower than the probe's and
# as much time goes to element-wise work.
_EFFICIENCY = 0.25

# Seconds of tracing, compiling and loading per job, and microseconds per row of making a batch and of overheads.
_COMPILE_S = 10.0
_ROW_S = 4e-6


def job_steps(configs: Sequence[ConfigDict], examples: Sequence[int]) -> int:
    """Steps of the program that trains runs of the given (rounded) examples: the trunk once, then every decay."""
    training = configs[0].training
    rows = training.requests * training.candidates
    horizons = [math.ceil(count / rows) for count in examples]
    warmup = warmup_steps(configs[0], rows, horizons)
    return sum(segment.steps for segment in program(horizons, training.schedule, training.decay_fraction, warmup))


def peak_memory_bytes(
    config: ConfigDict, schema: Schema, counts: Any, *, replicas: int, horizons: int, record: int = 0
) -> int:
    """Predicted peak of a job's worker: state, activations of one batch, holdout and the process itself.

    Args:
        replicas: (seed, rate) pairs trained together. horizons: different numbers of examples; above one, a copy of
            the trunk waits while a branch decays. record: bytes of training rows that the source keeps.
    """
    training = config.training
    dense, tables = _state_bytes(config, schema, counts)
    fan_in = max(math.sqrt(counts.dense_params / _LAYERS), _LEAST_FAN_IN)
    activations = _ACTIVATION_COPIES * (counts.forward_flops_per_row / 2 / fan_in + _input_width(schema))
    batch = 4 * training.requests * training.candidates * activations
    holdout = 4 * config.data.holdout_rows * _input_width(schema)
    states = 2 if horizons > 1 else 1
    own = states * (dense + tables) + 4 * counts.dense_params * _DENSE_COPIES + tables  # and the tables' host copy
    return round(BASE_BYTES + replicas * (own + batch) + holdout + record)


def checkpoint_bytes(config: ConfigDict, schema: Schema, counts: Any, *, replicas: int, horizons: int) -> int:
    """Predicted size of a job's checkpoints on disk: those kept and one being written; arguments as above."""
    states = 2 if horizons > 1 else 1
    return (KEPT_CHECKPOINTS + 1) * states * replicas * sum(_state_bytes(config, schema, counts))


def seconds(train_flops: float, rows: float, core_flops: float) -> float:
    """Predicted seconds of training on one core: FLOPs at a share of the probe's speed, rows at a fixed cost each."""
    return _COMPILE_S + train_flops / (_EFFICIENCY * core_flops) + rows * _ROW_S


def _state_bytes(config: ConfigDict, schema: Schema, counts: Any) -> tuple[int, int]:
    """Bytes of one replica's state: dense parameters and their moments; embedding tables and theirs."""
    training = config.training
    per_row, per_value = _ROW_STATE[training.embedding_optimizer]
    tables = sum(rows * (width * (1 + per_value) + per_row) for rows, width in schema.tables().values())
    return 4 * counts.dense_params * (1 + _MOMENTS.get(training.optimizer, 2)), 4 * tables


def _input_width(schema: Schema) -> int:
    """Floats of one row as an architecture sees it, histories included."""
    return schema.width + sum(sequence.length * sequence.width for sequence in schema.sequences)
