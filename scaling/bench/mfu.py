"""Model FLOPs utilisation of a training step on this machine's accelerator.

    MFU = rows per step * training FLOPs per row / (median step time * bfloat16 peak of the device)

FLOPs are the closed form's: recomputed ones do not count, embedding look-ups and the optimiser are not in them. The
step is the trainer's own, on one device, from one random batch.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax

from recscale import models
from recscale.scaling.counting.schemas import load_schema
from recscale.scaling.records.provenance import environment
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer

from .fixed_batch import FixedBatch
from .kernels import accelerator


def run(model: str = "rankmixer_1b", *, rows: int = 4096, warmup: int = 10, steps: int = 50) -> dict[str, Any]:
    """Measures the step of a model without histories on the reference schema.

    Returns:
        model, rows_per_step, dense_params, train_flops_per_step, median_ms, lower_quartile_ms, upper_quartile_ms,
        rows_per_s, tflop_per_s, peak_tflop_per_s, mfu, environment.

    Raises:
        NoAccelerator: there is none. ValueError: the model reads histories.
    """
    target = accelerator()
    schema, config = load_schema(), get_config(model)
    config.training.requests = rows
    counts = models.count(model, schema, config.model)
    source = FixedBatch(schema, rows)
    trainer = make_trainer(config, source, [(0, config.training.lr)], warmup=1)
    state, batch = trainer.fresh_state(), source.batch(0)
    times = []
    for number in range(warmup + steps):
        start = time.perf_counter()
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready((state, metrics))
        if number >= warmup:
            times.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(times, n=4)
    flops = rows * counts.train_flops_per_row
    return {
        "model": model,
        "rows_per_step": rows,
        "dense_params": counts.dense_params,
        "train_flops_per_step": flops,
        "median_ms": 1e3 * middle,
        "lower_quartile_ms": 1e3 * low,
        "upper_quartile_ms": 1e3 * high,
        "rows_per_s": rows / middle,
        "tflop_per_s": flops / middle / 1e12,
        "peak_tflop_per_s": target.bf16_flops / 1e12,
        "mfu": flops / middle / target.bf16_flops,
        "environment": environment(),
    }
