"""Memory slots x slots read: is a memory short of slots, or of how many of them a read may combine?

Five numbers of slots by K * H of 8, 32 and 128 slots a read (K the slots of a head, H heads whose reads are summed), in
the world of `memory_slots_ladder`. More hits cost time and FLOPs; slots cost parameters alone. H multiplies the keys as
well, and the tokens of query and keys grow with it: compare at equal K * H.

    recscale sweep memory_slots_by_reads --out runs/memory_slots_by_reads

Not run yet at this size: no figure of it has been committed.
"""

from recscale.sweeps import Sweep, architectures, axis, by_memory_slots, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.memories.memory_slots_ladder import BACKBONE, get_config

__all__ = ["get_config", "get_report", "get_sweep"]

SUB_KEYS = [32, 45, 64, 128, 256]

# (K, H)
READS = [(8, 1), (8, 4), (32, 1), (32, 4)]

RATES = [1e-2, 3e-2]


def get_sweep() -> Sweep:
    plain = {name: value for name, value in BACKBONE.items() if name != "model.memory_heads"}
    reads = [{"model.memory_topk": topk, "model.memory_heads": heads} for topk, heads in READS]
    slots = by_memory_slots([n * n for n in SUB_KEYS])
    return product(architectures(["pkm"]), [plain], axis("training.lr", RATES), reads, slots, seeds(3))


def get_report() -> dict:
    return power_law("memory_slots", hold_out=False)
