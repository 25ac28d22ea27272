"""Slots of LMN, a reconstruction: seven sizes from 2^14 to 2^20, read 8, 16 or 32 at a time, on the known-truth log.

Preset `base`: pairs to remember and histories to read, so that slots can serve the reads of events and of the target.
Everything but slots and K is fixed; values have ten times the dense rate, the memory loss its default weight. Without
it (`memory_weight` 0) at the middle size: does writing by the loss matter? For an accelerator: at 2^20 slots the values
of three seeds with their moments take 2.4 GB.

    recscale sweep lmn_slots_ladder --out runs/lmn_slots_ladder

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_memory_slots, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

# M = n * n, half-octaves of n.
SUB_KEYS = [128, 181, 256, 362, 512, 724, 1024]


def get_config() -> ConfigDict:
    config = known_truth("lmn", "base", requests=128, candidates=8, examples=4_000_000, value_lr=10.0)
    config.data.history_length = 32
    config.model.key_width = config.model.value_width = 64
    return config


def get_sweep() -> Sweep:
    ladder = product(axis("model.memory_topk", [8, 16, 32]), by_memory_slots([n * n for n in SUB_KEYS]))
    silent = [{"model.memory_topk": 16, "model.memory_slots": 362 * 362, "model.memory_weight": 0.0}]
    return product(architectures(["lmn"]), chain(ladder, silent), seeds(3))


def get_report() -> dict:
    return power_law("memory_slots")
