"""The rates of `memory_slots_hashed`: every arm at three or more, one seed, on another stream of the log.

Where the best was the lowest or highest of three, the next one is there as well; not of hash tables at 2^8 slots.

    recscale sweep memory_slots_hashed_rates --out runs/memory_slots_hashed_rates --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, axis, chain, noted, product
from recscale.sweeps.memories import memory_slots_hashed as study

_K1, _K8 = "hash table, K = 1", "hash table, K = 8"
# Log -> (method, update, slots) -> rates. Adam by row starts a slot with a step of the rate where Adam takes up to 3.2.
TRIALS = {
    "": {
        (_K1, "Adam", 2**8): [1e-2, 3e-2, 1e-1],
        (_K1, "Adam", 2**12): [3e-3, 1e-2, 3e-2],
        (_K1, "Adam", 2**16): [3e-3, 1e-2, 3e-2],
        (_K8, "Adam", 2**8): [1e-2, 3e-2, 1e-1],
        (_K8, "Adam", 2**12): [3e-3, 1e-2, 3e-2],
        (_K8, "Adam", 2**16): [1e-3, 3e-3, 1e-2, 3e-2],
        (_K1, "Adam by row", 2**12): [1e-2, 3e-2, 1e-1],
        (_K1, "Adam by row", 2**16): [1e-2, 3e-2, 1e-1],
        (_K8, "Adam by row", 2**12): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K8, "Adam by row", 2**16): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K1, "Adagrad", 2**8): [3e-3, 1e-2, 3e-2],
        (_K1, "Adagrad", 2**12): [3e-3, 1e-2, 3e-2],
        (_K1, "Adagrad", 2**16): [1e-3, 3e-3, 1e-2, 3e-2],
        (_K8, "Adagrad", 2**8): [3e-3, 1e-2, 3e-2],
        (_K8, "Adagrad", 2**12): [3e-3, 1e-2, 3e-2],
        (_K8, "Adagrad", 2**16): [1e-3, 3e-3, 1e-2, 3e-2],
        ("pkm", "Adam by row", 2**16): [3e-3, 1e-2, 3e-2, 1e-1],
        ("pkm_random", "Adam", 2**12): [3e-3, 1e-2, 3e-2],
        ("pkm_random", "Adam", 2**16): [3e-3, 1e-2, 3e-2],
        ("MSN", "Adam", 2**8): [1e-3, 3e-3, 1e-2, 3e-2],
        ("MSN", "Adam", 2**12): [3e-4, 1e-3, 3e-3, 1e-2],
        ("MSN", "Adam", 2**16): [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    },
    study.ALIKE: {
        (_K1, "Adam", 2**12): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K1, "Adam", 2**14): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K8, "Adam", 2**12): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K8, "Adam", 2**14): [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        (_K1, "Adam by row", 2**14): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K8, "Adam by row", 2**14): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K1, "Adagrad", 2**12): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K1, "Adagrad", 2**14): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K8, "Adagrad", 2**12): [3e-3, 1e-2, 3e-2, 1e-1],
        (_K8, "Adagrad", 2**14): [3e-3, 1e-2, 3e-2, 1e-1],
        ("pkm", "Adam", 2**12): [3e-3, 1e-2, 3e-2, 1e-1],
        ("pkm", "Adam", 2**14): [1e-2, 3e-2, 1e-1],
        ("pkm", "Adam by row", 2**14): [1e-2, 3e-2, 1e-1],
        ("pkm_random", "Adam", 2**12): [3e-3, 1e-2, 3e-2, 1e-1],
        ("pkm_random", "Adam", 2**14): [3e-3, 1e-2, 3e-2, 1e-1],
        ("MSN", "Adam", 2**14): [3e-4, 1e-3, 3e-3, 1e-2],
    },
    # How many rows: one rate each.
    study.FEW: {(_K1, "Adam", 2**14): [3e-2], ("pkm", "Adam", 2**14): [3e-2]},
    study.MANY: {(_K1, "Adam", 2**14): [3e-2], ("pkm", "Adam", 2**14): [3e-2]},
    study.LONGER: {
        (_K1, "Adagrad", 2**16): [1e-3, 3e-3, 1e-2],
        (_K8, "Adagrad", 2**16): [1e-3, 3e-3, 1e-2],
        ("pkm", "Adam", 2**16): [3e-3, 1e-2, 3e-2, 6e-2],
        ("MSN", "Adam", 2**16): [3e-4, 1e-3, 3e-3],
    },
}


def get_config() -> ConfigDict:
    config = study.get_config()
    config.data.log_seed = 1
    return config


def get_sweep() -> Sweep:
    return chain(*(search(log, *cell, rates) for log, cells in TRIALS.items() for cell, rates in cells.items()))


def search(log: str, method: str, update: str, slots: int, rates: list[float]) -> Sweep:
    """One arm at one size, at each of the rates."""
    points = product([study.model(method, update, slots, log)], axis("training.lr", rates))
    return noted(points, arm=study.arm(method, update, log))
