"""Part 5 of the acceptance experiment: what networks reach on the log whose law is known. Reported, not gated.

Three architectures at six sizes over 1.6 decades (fewer have no bootstrap interval), three seeds of each trained as
replicas of one program on preset `dense_nested` (signs given, one rate for all, one pass): loss, recovered share of
every order, an offset power law with its intervals or refusals, and the plateau under which the smallest and the
largest network lie. A model that knows every product of at most o signs and no other stops at the plateau of order o;
one between two plateaus has learned a part of the higher order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling.counting.sizing import size
from recscale.scaling.data import make_source
from recscale.scaling.data.known_truth import build_world, preset
from recscale.scaling.data.known_truth.exact import oracle_logits
from recscale.scaling.data.known_truth.expectations import divergence
from recscale.scaling.laws import fit
from recscale.scaling.records import runs as records
from recscale.scaling.training import RunSpec, get_config, run_id, train_group

from .evaluation_rows import ROWS, evaluation_batches

# One block and fixed tokens, so that a size is not also another kind of shape.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rankmixer": {"layers": 1, "tokens": 8},
    "dlrm_mlp": {},
    "dcnv2": {"cross_layers": 1, "rank": 8},
}
SIZES = (2e3, 4.2e3, 8.8e3, 1.85e4, 3.9e4, 8e4)
SEEDS = 3
_PRESET = "dense_nested"
_EXAMPLES, _HOLDOUT_ROWS = 500_000, 65_536


def measure_networks(
    *,
    shrink: int = 1,
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    sizes: Sequence[float] = SIZES,
    draws: int = 1_000,
) -> dict[str, Any]:
    """Trains every network in this process and returns JSON-able figures.

    Args:
        shrink: divides the 500,000 rows each network is trained on and the 65,536 it is evaluated on.
        architectures: of `ARCHITECTURES`. sizes: dense parameters asked of the sizing solver.
        draws: bootstrap draws of the intervals; 0 for none.

    Returns:
        plateaus: see `plateaus`; examples, seeds;
        architectures: name -> `sizes` (of each dense_params; logloss, excess and recovered shares, means over the seeds
        that finished; logloss_sd of one seed; not_done, the others), `law`, and the `plateau` of its two ends.
    """
    examples, holdout_rows = _EXAMPLES // shrink, _HOLDOUT_ROWS // shrink
    levels = plateaus(rows=holdout_rows)
    result: dict[str, Any] = {"examples": examples, "seeds": SEEDS, "plateaus": levels, "architectures": {}}
    for name in architectures:
        with tempfile.TemporaryDirectory() as folder:
            for target in sizes:
                _train(name, ARCHITECTURES[name], target, examples, holdout_rows, Path(folder))
            table = records.collect(folder)
        result["architectures"][name] = _summary(table, levels, draws)
    return result


def plateaus(*, rows: int) -> dict[int, float]:
    """Order o -> excess logloss over the entropy floor, in nats per label, of an oracle that knows every term of order
    <= o and none above, for every o that leaves something out."""
    config = preset(_PRESET)
    world = build_world(config)
    orders = range(max(order for order, share in enumerate(config.order_shares, 1) if share))
    sums, pieces = dict.fromkeys(orders, 0.0), -(-rows // ROWS)
    for batch, exact in evaluation_batches(world, pieces):
        for order in orders:
            sums[order] += float(divergence(exact.p, exact.q, oracle_logits(world, batch, orders=order)).mean())
    return {order: total / pieces for order, total in sums.items()}


def _train(name: str, fixed: dict[str, Any], target: float, examples: int, holdout_rows: int, out: Path) -> None:
    """All seeds of one shape, as replicas of one program; their records go below `out`."""
    config = get_config(name)
    config.model.update(fixed)
    config.training.examples = examples
    config.data.preset, config.data.holdout_rows = _PRESET, holdout_rows
    schema = make_source(config.data.to_dict(), requests=config.training.requests).schema
    config.model = size(name, schema, dense_params=target, config=config.model).config
    specs = []
    for seed in range(SEEDS):
        own = config.copy_and_resolve_references()
        own.seed = seed
        specs.append(RunSpec(own, out / "runs" / run_id(own)))
    train_group(specs, out / "groups" / f"{target:.0f}")


def _summary(table: pd.DataFrame, levels: dict[int, float], draws: int) -> dict[str, Any]:
    done = table[table["status"] == "done"]
    shares = [column for column in table.columns if column.startswith("recovered_")]
    found = []
    for _, group in table.groupby("dense_params"):
        own = group[group["status"] == "done"]
        found.append(
            {
                "dense_params": int(group["dense_params"].iloc[0]),
                "logloss": own["logloss"].mean(),
                "logloss_sd": own["logloss"].std(),
            }
            | {"excess": own["excess_logloss"].mean(), "not_done": len(group) - len(own)}
            | {share: own[share].mean() for share in shares}
        )
    law = fit(done, form="power_offset", axes={"x": "dense_params"}, bootstrap=draws, cluster="shape_id")
    refused = {name: law.reason(name) for name, value in law.params.items() if value is None}
    ends = {"smallest": found[0], "largest": found[-1]}
    return {
        "sizes": [{key: float(value) for key, value in row.items()} for row in found],
        "law": {"params": law.params, "intervals": law.intervals, "refused": refused},
        "plateau": {end: _plateau(row["excess"], levels) for end, row in ends.items()},
    }


def _plateau(excess: float, levels: dict[int, float]) -> int | None:
    """The highest order whose plateau the network reaches; None above all of them."""
    reached = [order for order, level in levels.items() if excess <= level]
    return max(reached, default=None)
