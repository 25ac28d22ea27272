"""What else as many parameters buy: slots against random values that never train, and against a wider network.

Five numbers of slots in the world of `memory_slots_ladder`, at its common rate; its own controls learn no addresses.

    pkm           the ladder's memory
    frozen        the same memory with values as drawn: what learned addresses alone can do
    wide          no memory: the network's hidden width is raised until it has as many parameters

Runs of `wide` have no slots; compare them by `dense_params`. At 2^16 slots its hidden width is 31,800.

    recscale sweep memory_slots_controls --out runs/memory_slots_controls

Not run yet at this size: no figure of it has been committed.
"""

from recscale.models import freeze_config
from recscale.models.memories.memory_mixer import count_params
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.sweeps import Sweep, architectures, axis, chain, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.memories.memory_slots_ladder import BACKBONE, RATES, WORLD, get_config

__all__ = ["get_config", "get_report", "get_sweep"]

SUB_KEYS = [16, 32, 64, 128, 256]


def get_sweep() -> Sweep:
    schema = make_schema(preset("memory", **WORLD))

    def dense(**changes: object) -> int:
        settings = {name.removeprefix("model."): value for name, value in BACKBONE.items()} | changes
        return count_params(freeze_config("pkm", settings), schema).dense

    def wide(slots: int) -> dict[str, int]:
        """No memory and the hidden width that gives as many parameters."""
        one, two = (dense(memory_count=0, hidden=hidden) for hidden in (1, 2))
        hidden = 1 + round((dense(memory_slots=slots) - one) / (two - one))
        return {"model.memory_count": 0, "model.hidden": hidden}

    slots = [n * n for n in SUB_KEYS]
    with_memory = [{"model.memory_slots": M, "model.values_frozen": frozen} for frozen in (False, True) for M in slots]
    plain = {name: value for name, value in BACKBONE.items() if name != "model.hidden"}
    arms = chain(product([BACKBONE], with_memory), product([plain], [wide(M) for M in slots]))
    return product(architectures(["pkm"]), axis("training.lr", RATES[1:2]), arms, seeds(3))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
