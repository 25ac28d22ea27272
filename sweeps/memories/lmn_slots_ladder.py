"""Slots of LMN, a reconstruction: seven sizes from 2^14 to 2^20, read 8, 16 or 32 at a time, on the known-truth log.

Preset `base`: pairs to remember and histories to read, so that slots can serve the reads of events and of the target.
Everything but slots and K is fixed; values have ten times the dense rate, the memory loss its default weight. Without
it (`memory_weight` 0) at the middle size: does writing by the loss matter? For an accelerator: at 2^20 slots the values
of three seeds with their moments take 2.4 GB, and no figure of this sweep has been committed.

    recscale sweep lmn_slots_ladder --out runs/lmn_slots_ladder
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, architectures, axis, by_memory_slots, chain, product, seeds

# M = n * n, half-octaves of n.
SUB_KEYS = [128, 181, 256, 362, 512, 724, 1024]


def get_config() -> ConfigDict:
    config = base_config("lmn", "known_truth")
    config.data.preset = "base"
    config.data.history_length = 32
    config.model.key_width = config.model.value_width = 64
    config.training.requests = 128
    config.training.candidates = 8
    config.training.examples = 4_000_000
    config.training.lr = 3e-3
    config.training.value_lr = 10.0
    return config


def get_sweep() -> Sweep:
    ladder = product(axis("model.memory_topk", [8, 16, 32]), by_memory_slots([n * n for n in SUB_KEYS]))
    silent = [{"model.memory_topk": 16, "model.memory_slots": 362 * 362, "model.memory_weight": 0.0}]
    return product(architectures(["lmn"]), chain(ladder, silent), seeds(3))


def get_report() -> dict:
    return {"form": "power_offset", "axes": {"N": "memory_slots"}, "target": "logloss"}
