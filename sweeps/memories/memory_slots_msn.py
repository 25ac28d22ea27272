"""Slots of MSN at fixed width, and at equal active parameters: seven sizes, 2^8 to 2^14 slots in each of two memories.

Keys grow with sqrt M. At fixed width that is 2 * p more active parameters per sub-key and memory; at equal active
parameters the networks are narrowed by as much, which is how the paper compares. Where the keys added weigh
less than half a hidden unit of every token and layer, at the smallest sizes, both are the same run.

    recscale sweep memory_slots_msn --out runs/memory_slots_msn

Not run yet at this size: no figure of it has been committed.
"""

from recscale.models import freeze_config
from recscale.models.memories.msn import active_hidden, count_params
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.sweeps import Sweep, architectures, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.memories.memory_ablations import get_config

__all__ = ["get_config", "get_report", "get_sweep"]

SUB_KEYS = [16, 23, 32, 45, 64, 91, 128]


def get_sweep() -> Sweep:
    config = get_config()
    schema = make_schema(preset("memory", **config.data.overrides.to_dict()))
    base = config.model.to_dict() | {"memory_topk": 8}

    def sized(slots: int) -> dict:
        return base | {"memory_slots": slots}

    slots = [n * n for n in SUB_KEYS]
    first = count_params(freeze_config("msn", sized(slots[0])), schema)
    points = []
    for M in slots:
        narrowed = active_hidden(schema, freeze_config("msn", sized(M)), first.dense - first.inactive)
        hidden = dict.fromkeys((base["hidden"], narrowed))  # once where both are the same
        points += [{"model.memory_slots": M, "model.memory_topk": 8, "model.hidden": F} for F in hidden]
    return product(architectures(["msn"]), points, seeds(5))


def get_report() -> dict:
    return power_law("memory_slots", hold_out=False)
