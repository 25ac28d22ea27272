"""Hash tables beside product-key memories: what a learned address is worth, and what late first touches cost.

The world of `memory_slots_ladder`: pairs whose sign has to be remembered one by one, each seen as a frozen random code.
That code is the discrete key, bit by bit, so it can be hashed; the network around the memory is the same.

    hash table, K = 1     one row at a uniform hash of the code, collisions and all
    hash table, K = 8     eight rows at eight hashes, summed (Bloom embeddings)
    pkm, pkm_random       eight slots at learned queries and keys, and as drawn
    MSN                   as printed: FFN(z * tanh(read)), over-parameterised keys, K = 8

Values train by Adam, whose bias correction counts the steps of the run, so a slot first touched late moves by
(1 - b1) / sqrt(1 - b2) = 3.2 times the rate; by Adam that counts the row's own updates; and by row-wise Adagrad, whose
first step is the rate whenever it comes. The same in a world where all pairs are equally likely: there every slot is
touched from the start, and no address can serve the frequent ones first.

    recscale sweep memory_slots_hashed --out runs/memory_slots_hashed --no-report

Measured 2026-11-30 on one shared core of an AMD EPYC, jax 0.10.2, a part of it: 76 runs in stages (`plan --extend`),
about 12 min; every ordering is judged. At 2^16 slots one hashed row is above `pkm` by .0079 [.0071, .0088], MSN by
.0156 [.0149, .0163]. Counting a row's own updates makes all worse, and Adagrad is the best on hash tables. Not run:
`pkm_random`, hash tables by Adam between the sizes compared, pairs that are alike, 8e6 rows. Why:
`notebooks/runs/README.md`.
"""

from recscale.scaling.report.orderings import Ordering
from recscale.sweeps import Sweep, chain, noted, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.memories.memory_slots_ladder import BACKBONE, get_config

__all__ = ["get_config", "get_report", "get_sweep", "orderings"]

SMALL, LARGE = 2**12, 2**16  # where arms are compared, by five paired seeds

_SEARCH = ("model.memory_heads", "model.key_width", "model.query_norm", "model.key_norm", "model.score_scale")
_PLAIN = {name: value for name, value in BACKBONE.items() if name not in _SEARCH}
METHODS = {
    "hash table, K = 1": {"architecture": "hash_table"} | _PLAIN,
    "hash table, K = 8": {"architecture": "hash_table_8"} | _PLAIN,
    "pkm": {"architecture": "pkm"} | BACKBONE,
    "pkm_random": {"architecture": "pkm_random"} | BACKBONE,
    "MSN": {"architecture": "msn"} | BACKBONE | {"model.norm": "layer"},
}
# Adagrad's steps shrink from the first on, so its values get a larger multiple of the dense rate.
UPDATES = {
    "Adam": {},
    "Adam by row": {"training.value_bias_correction": "row"},
    "Adagrad": {"training.value_update": "rows_adagrad", "training.value_lr": 50.0},
}


_K1, _K8 = "hash table, K = 1", "hash table, K = 8"
# (method, update) -> slots -> rate: the best of `memory_slots_hashed_rates`, for pkm by Adam of `memory_slots_ladder`;
# where none was searched, that of the nearest size below, or above at 2^14.
RATES: dict[tuple[str, str], dict[int, float]] = {
    (_K1, "Adam"): {2**8: 3e-2, 2**10: 3e-2, SMALL: 1e-2, 2**14: 1e-2, LARGE: 1e-2},
    (_K1, "Adam by row"): {LARGE: 3e-2},
    (_K1, "Adagrad"): {2**8: 3e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
    (_K8, "Adam"): {2**8: 1e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
    (_K8, "Adam by row"): {LARGE: 1e-2},
    (_K8, "Adagrad"): {2**8: 3e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
    ("pkm", "Adam"): {SMALL: 3e-2, LARGE: 3e-2},
    ("pkm", "Adam by row"): {LARGE: 1e-2},
    ("pkm_random", "Adam"): {LARGE: 1e-2},
    ("MSN", "Adam"): {LARGE: 1e-3},
}
# Other logs, at the rates of 2^16 slots: a world where all pairs are alike, at as many slots as it has pairs, and more
# rows of the ladder's.
ALIKE, LONGER = ", pairs alike", ", 8e6 rows"
LOGS = {
    ALIKE: {"data.overrides.a": 0.0, "data.overrides.pair_items": 2**8, "training.examples": 1_000_000},
    LONGER: {"training.examples": 8_000_000},
}
_COMPARED = [(method, update) for method in (_K1, _K8, "pkm") for update in ("Adam", "Adam by row")]


def get_sweep() -> Sweep:
    ladder = [runs(*cell, slots, rate) for cell, rates in RATES.items() for slots, rate in rates.items()]
    alike = [runs(*cell, 2**14, RATES[cell][LARGE], ALIKE, 5) for cell in _COMPARED]
    longer = [runs(*cell, LARGE, RATES[cell][LARGE], LONGER) for cell in ((_K1, "Adagrad"), (_K8, "Adagrad"))]
    return chain(*ladder, *alike, *longer)


def runs(method: str, update: str, slots: int, rate: float, log: str = "", count: int | None = None) -> Sweep:
    """Seeds of one arm at one size: five where arms are compared, two elsewhere."""
    compared = not log and slots in (SMALL, LARGE)
    searched = compared and method != "pkm_random"  # that has the one rate of the ladder
    point = model(method, update, slots) | {"training.lr": rate} | LOGS.get(log, {})
    rule = "best on another stream" if searched else "of another size"
    points = product([point], seeds(count or (5 if compared else 2)))
    return noted(points, arm=arm(method, update) + log, lr_rule=rule, lr_bracketed=searched)


def model(method: str, update: str, slots: int) -> dict:
    """The settings of one arm at so many slots."""
    return METHODS[method] | UPDATES[update] | {"model.memory_slots": slots}


def arm(method: str, update: str) -> str:
    """What its runs are called."""
    return f"{method}, {update}"


def get_report() -> dict:
    return power_law("memory_slots", hold_out=False)


def orderings() -> dict[int, list[Ordering]]:
    """Slots -> the orderings that are judged there; none was published."""

    def better(best: str, worse: str) -> Ordering:
        return Ordering(f"{best} above {worse}", best, worse, None, "not published", "")

    top = [better(arm(_K1, "Adam"), arm("pkm", "Adam")), better(arm("MSN", "Adam"), arm("pkm", "Adam"))]
    top += [better(arm(_K8, update), arm(_K1, update)) for update in UPDATES]
    top += [better(arm(_K8, "Adam"), arm("MSN", "Adam"))]
    # Were a slot first touched late moved too far by Adam, these would hold.
    by_row = [better(arm(method, "Adam by row"), arm(method, "Adam")) for method in (_K1, _K8, "pkm")]
    adagrad = [better(arm(method, "Adagrad"), arm(method, "Adam")) for method in (_K1, _K8)]
    low = [better(arm(_K8, update), arm(_K1, update)) for update in ("Adam", "Adagrad")] + adagrad
    low += [better(arm("pkm", "Adam"), arm(_K8, "Adagrad"))]
    return {LARGE: top + by_row + adagrad, SMALL: low}
