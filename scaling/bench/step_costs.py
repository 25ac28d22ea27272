"""What a training step pays for large embedding tables, for a large bank, and for generating its batch.

Both are ratios of steps that differ in one thing, run by turns in one process.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax

from recscale.models.inputs import Field, Schema
from recscale.scaling.counting.sizing import size
from recscale.scaling.data.known_truth.source import KnownTruthSource
from recscale.scaling.data.sources import make_source
from recscale.scaling.training import get_config

from .fixed_batch import FixedBatch
from .timing import race, repeated
from .training_steps import TrainingSteps

# Tables compared: rows of width 16.
SMALL_ROWS, LARGE_ROWS, TABLE_WIDTH = 10_000, 10_000_000, 16


def table_rows(
    *, rows: int = 1024, fields: int = 8, rounds: int = 8, per_round: int = 4, large: int = LARGE_ROWS
) -> dict[str, Any]:
    """Step time with a table of `large` rows over that with 10,000.

    One table of width 16 shared by 8 id fields, 1,024 rows per batch, row-wise Adagrad, and a small RankMixer (8 tokens
    of width 16, F 64, one block) so that the table, not the model, decides the time.

    Returns:
        ratio of medians, and both times; `large_rows`, `small_rows`.
    """
    steps = {}
    for name, vocabulary in (("small", SMALL_ROWS), ("large", large)):
        schema = Schema(
            tuple(
                Field(f"f{i}", "user" if i < fields // 2 else "candidate", TABLE_WIDTH, vocabulary, table="shared")
                for i in range(fields)
            )
        )
        config: Any = get_config("rankmixer")
        config.model.update({"tokenizer": "identity", "width": TABLE_WIDTH, "hidden": 64, "layers": 1})
        source = FixedBatch(schema, rows)
        steps[name] = TrainingSteps(config, source, source.batch(0))
    times = race(steps, rounds=rounds, per_round=per_round)
    return {
        "ratio": times["large"]["median_ms"] / times["small"]["median_ms"],
        "large_rows": large,
        "small_rows": SMALL_ROWS,
        "width": TABLE_WIDTH,
        "large": times["large"],
        "small": times["small"],
    }


def bank_rows(
    *, rows: int = 256, rounds: int = 8, per_round: int = 4, small: int = SMALL_ROWS, large: int = LARGE_ROWS
) -> dict[str, Any]:
    """Time of a LEMUR step with a bank of `large` rows over that with `small` ones.

    The batches are the same, drawn before: preset `content` of the known-truth log with 8,192 items, so that the rows
    of the bank are all that differs. Encoders of one layer, everything else as it comes.

    Returns:
        ratio of medians, and both times; `large_rows`, `small_rows`, `width` of a row.
    """
    config: Any = get_config("lemur", "known_truth")
    config.training.requests = rows
    config.model.update(dict(tokens=8, width=32, hidden=32, layers=1, content_width=TABLE_WIDTH))
    config.model.update(dict(query_layers=1, document_layers=1))
    steps = {}
    for name, items in (("small", small), ("large", large)):
        source = KnownTruthSource("content", requests=rows)
        content = source.schema.content
        if content is None or items < content.items:
            raise ValueError(f"a bank of {items} rows is smaller than the log's items; give it 8,192 or more")
        source.schema = dataclasses.replace(source.schema, content=dataclasses.replace(content, items=items))
        steps[name] = TrainingSteps(config, source, jax.block_until_ready(jax.jit(source.batch)(0)))
    times = race(steps, rounds=rounds, per_round=per_round)
    return {
        "ratio": times["large"]["median_ms"] / times["small"]["median_ms"],
        "large_rows": large,
        "small_rows": small,
        "width": TABLE_WIDTH,
        "large": times["large"],
        "small": times["small"],
    }


def generation(
    *, preset: str = "dense_nested", dense_params: float = 1e6, rows: int = 1024, rounds: int = 8, per_round: int = 4
) -> dict[str, Any]:
    """Share of a training step spent generating its known-truth batch on the device.

    The step that generates its batch is compared with the same step given that batch, for a RankMixer of 1M dense
    parameters; the batch alone is timed as well.

    Returns:
        share = 1 - given / generated, a small difference of two large times; share_alone = batch alone / generated
        (medians); the three times; preset and model size.
    """
    config: Any = get_config("rankmixer", "known_truth")
    config.data.preset = preset
    config.training.requests = rows
    source = make_source(config.data.to_dict(), requests=rows, candidates=1)
    sized = size("rankmixer", source.schema, dense_params=dense_params)
    config.model = sized.config
    alone = jax.jit(source.batch)
    numbers = itertools.count()
    steps = {
        "generated": TrainingSteps(config, source, None),
        "given": TrainingSteps(config, source, jax.block_until_ready(alone(0))),
        "batch_alone": repeated(lambda: alone(next(numbers))),
    }
    times = race(steps, rounds=rounds, per_round=per_round)
    return {
        "share": 1.0 - times["given"]["median_ms"] / times["generated"]["median_ms"],
        "share_alone": times["batch_alone"]["median_ms"] / times["generated"]["median_ms"],
        "preset": preset,
        "dense_params": sized.count.dense_params,
        **times,
    }
