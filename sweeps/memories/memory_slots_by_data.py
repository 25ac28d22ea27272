"""Memory slots x examples: are more slots worth anything without more rows, and do hits per slot collapse the curves?

Five numbers of slots by four horizons of one run, in the world of `memory_slots_ladder`. A slot is hit
`memory_hits_per_slot` = examples * K / M times: draw the loss against slots and against that column, beside
`memory_usage` / `memory_usage_null`. The report fits loss = E + a M^-alpha + b examples^-beta.

    recscale sweep memory_slots_by_data --out runs/memory_slots_by_data

Not run yet at this size: no figure of it has been committed.
"""

from recscale.sweeps import Sweep, architectures, axis, by_memory_slots, product, seeds
from recscale.sweeps.memories.memory_slots_ladder import BACKBONE, get_config

__all__ = ["get_config", "get_report", "get_sweep"]

SUB_KEYS = [16, 32, 64, 128, 256]

# Branches of one run: a constant rate up to each horizon's decay, so the three shorter ones cost a fifth each.
EXAMPLES = [250_000, 500_000, 1_000_000, 2_000_000]

# The two that were best in the ladder.
RATES = [1e-2, 3e-2]


def get_sweep() -> Sweep:
    slots, rows = by_memory_slots([n * n for n in SUB_KEYS]), axis("training.examples", EXAMPLES)
    return product(architectures(["pkm"]), [BACKBONE], axis("training.lr", RATES), slots, rows, seeds(3))


def get_report() -> dict:
    axes = {"x1": "memory_slots", "x2": "examples"}
    return {"form": "sum", "axes": axes, "target": "logloss", "hold_out_largest": False}
