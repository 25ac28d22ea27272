"""Model FLOPs utilisation of a training step on this machine's accelerator.

    MFU = rows per step * training FLOPs per row / (median step time * bfloat16 peak of the device)

FLOPs are the closed form's: recomputed ones do not count, embedding look-ups and the optimiser are not in them. The
step is the trainer's own, on one device, from one random batch.
"""

from __future__ import annotations

import statistics
from typing import Any

from recscale import models
from recscale.pallas_kernels.targets import Target
from recscale.scaling.counting.schemas import load_schema
from recscale.scaling.training import get_config

from .accelerator import accelerator
from .fixed_batch import FixedBatch
from .timing import clock, quartiles
from .training_steps import TrainingSteps


def measure_mfu(model: str = "rankmixer_1b", *, rows: int = 4096, warmup: int = 10, steps: int = 50) -> dict[str, Any]:
    """Measures the step of a model without histories on the reference schema.

    Returns:
        model, rows_per_step, dense_params, train_flops_per_step, median_ms, lower_quartile_ms, upper_quartile_ms,
        rows_per_s, tflop_per_s, peak_tflop_per_s, mfu.

    Raises:
        NoAccelerator: there is none. ValueError: the model reads histories.
    """
    return measure_step(model, accelerator(), rows=rows, warmup=warmup, steps=steps)


def measure_step(model: str, target: Target | None, *, rows: int, warmup: int, steps: int) -> dict[str, Any]:
    """The same on a known device; without one (a CPU) mfu and peak_tflop_per_s are None."""
    schema, config = load_schema(), get_config(model)
    config.training.requests = rows
    counts = models.count(model, schema, config.model)
    source = FixedBatch(schema, rows)
    training = TrainingSteps(config, source, source.batch(0), rate=config.training.lr)
    seconds = clock(lambda: training(1), warmup=warmup, runs=steps)
    flops, middle = rows * counts.train_flops_per_row, statistics.median(seconds)
    peak = None if target is None else target.bf16_flops
    return {
        "model": model,
        "rows_per_step": rows,
        "dense_params": counts.dense_params,
        "train_flops_per_step": flops,
        **quartiles(seconds),
        "rows_per_s": rows / middle,
        "tflop_per_s": flops / middle / 1e12,
        "peak_tflop_per_s": peak and peak / 1e12,
        "mfu": peak and flops / middle / peak,
    }
