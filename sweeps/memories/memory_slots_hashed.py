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

Measured 2026-11-30 on one shared core of an AMD EPYC, then of an Intel Xeon, jax 0.10.2, a part of it: 225 runs in
stages (`plan --extend`), about 53 min. MSN is the best at every size. At 2^16 slots one hashed row is above `pkm` by
.0079 [.0071, .0088], MSN by .0156 [.0149, .0163]; at 2^12 `pkm` is above eight hashed rows by .0110 [.0091, .0130].
Counting a row's own updates is worse at 2^16, and Adagrad is the best on hash tables. Where all pairs are alike,
counting a row's own updates gains nothing, and `pkm` is ahead of hashes at 2^12 slots by .046. With 8e6 rows `pkm` is
.0020 [.0010, .0029] behind one hashed row, MSN .0071 [.0064, .0079] above eight. No law with a floor is granted. Not
run: `pkm` by Adam by row below 2^16 slots, with 8e6 rows what the note lists. Why: `notebooks/runs/memories.md`.
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
# Beside the ladder's log: 2^14 pairs that are alike, 61 rows of each; and more rows of the ladder's.
ALIKE, LONGER = ", pairs alike", ", 8e6 rows"
LOGS: dict[str, dict] = {
    "": {},
    ALIKE: {"data.overrides.a": 0.0, "data.overrides.pair_items": 2**8, "training.examples": 1_000_000},
    LONGER: {"training.examples": 8_000_000},
}
FEW, MANY = ALIKE + ", 2.5e5 rows", ALIKE + ", 2e6 rows"
LOGS |= {FEW: LOGS[ALIKE] | {"training.examples": 250_000}, MANY: LOGS[ALIKE] | {"training.examples": 2_000_000}}
# Log -> (method, update) -> slots -> rate: the best of `memory_slots_hashed_rates`, for pkm by Adam of
# `memory_slots_ladder`; where none was searched, that of the nearest size below, or above at 2^14.
RATES: dict[str, dict[tuple[str, str], dict[int, float]]] = {
    "": {
        (_K1, "Adam"): {2**8: 3e-2, 2**10: 3e-2, SMALL: 1e-2, 2**14: 1e-2, LARGE: 1e-2},
        (_K1, "Adam by row"): {SMALL: 3e-2, LARGE: 3e-2},
        (_K1, "Adagrad"): {2**8: 3e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
        (_K8, "Adam"): {2**8: 1e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
        (_K8, "Adam by row"): {SMALL: 3e-2, LARGE: 1e-2},
        (_K8, "Adagrad"): {2**8: 3e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
        ("pkm", "Adam"): {SMALL: 3e-2, LARGE: 3e-2},
        ("pkm", "Adam by row"): {LARGE: 1e-2},
        ("pkm_random", "Adam"): {SMALL: 1e-2, LARGE: 1e-2},
        ("MSN", "Adam"): {2**8: 1e-2, 2**10: 1e-2, SMALL: 3e-3, 2**14: 1e-3, LARGE: 1e-3},
    },
    ALIKE: {
        (_K1, "Adam"): {SMALL: 3e-2, 2**14: 3e-2},
        (_K1, "Adam by row"): {2**14: 1e-2},
        (_K1, "Adagrad"): {SMALL: 1e-2, 2**14: 1e-2},
        (_K8, "Adam"): {SMALL: 1e-2, 2**14: 3e-3},
        (_K8, "Adam by row"): {2**14: 1e-2},
        (_K8, "Adagrad"): {SMALL: 1e-2, 2**14: 1e-2},
        ("pkm", "Adam"): {SMALL: 1e-2, 2**14: 3e-2},
        ("pkm", "Adam by row"): {2**14: 3e-2},
        ("pkm_random", "Adam"): {SMALL: 3e-2, 2**14: 3e-2},
        ("MSN", "Adam"): {2**14: 1e-3},
    },
    LONGER: {
        (_K1, "Adagrad"): {2**8: 3e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
        (_K8, "Adagrad"): {2**8: 3e-2, 2**10: 1e-2, SMALL: 1e-2, 2**14: 3e-3, LARGE: 3e-3},
        ("pkm", "Adam"): {SMALL: 3e-2, 2**14: 1e-2, LARGE: 3e-2},
        ("MSN", "Adam"): {SMALL: 3e-3, LARGE: 1e-3},
    },
}
# Log -> sizes where arms are compared, by five paired seeds at rates that were searched; elsewhere two seeds.
COMPARED = {"": (SMALL, LARGE), ALIKE: (SMALL, 2**14), LONGER: (LARGE,)}


def get_sweep() -> Sweep:
    return chain(*(runs(*cell, slots, log) for log in RATES for cell in RATES[log] for slots in RATES[log][cell]))


def runs(method: str, update: str, slots: int, log: str = "") -> Sweep:
    """Seeds of one arm at one size, at its rate there."""
    compared, rate = slots in COMPARED[log], RATES[log][method, update][slots]
    rule = "best on another stream" if compared else "of fewer rows" if log == LONGER else "of another size"
    points = product([model(method, update, slots, log) | {"training.lr": rate}], seeds(5 if compared else 2))
    return noted(points, arm=arm(method, update, log), lr_rule=rule, lr_bracketed=compared)


def model(method: str, update: str, slots: int, log: str = "") -> dict:
    """The settings of one arm at so many slots, on one of the logs."""
    return METHODS[method] | UPDATES[update] | {"model.memory_slots": slots} | LOGS[log]


def arm(method: str, update: str, log: str = "") -> str:
    """What its runs are called."""
    return f"{method}, {update}{log}"


def get_report() -> dict:
    return power_law("memory_slots", hold_out=False)


def orderings() -> dict[str, dict[int, list[Ordering]]]:
    """Log -> slots -> the orderings that are judged there, by those arms that were run; none was published."""
    pkm, msn, drawn = ("pkm", "Adam"), ("MSN", "Adam"), ("pkm_random", "Adam")
    eight = [((_K8, update), (_K1, update)) for update in UPDATES]
    # Were a slot first touched late moved too far by Adam, these would hold.
    by_row = [((method, "Adam by row"), (method, "Adam")) for method in (_K1, _K8, "pkm")]
    adagrad = [((method, "Adagrad"), (method, "Adam")) for method in (_K1, _K8)]
    top = [((_K1, "Adam"), pkm), (msn, pkm), *eight, ((_K8, "Adam"), msn), *by_row, *adagrad, (pkm, drawn)]
    low = [*eight, *by_row, *adagrad, (pkm, (_K8, "Adagrad")), (msn, pkm), (pkm, drawn)]
    # With four times the rows hash tables were trained by Adagrad alone.
    one, many = (_K1, "Adagrad"), (_K8, "Adagrad")
    more = [(many, one), (one, pkm), (many, pkm), (msn, many), (msn, pkm)]
    return {log: {slots: [_better(*pair, log) for pair in (more if log == LONGER else low if slots == SMALL else top)]
                  for slots in sizes}
            for log, sizes in COMPARED.items()}  # fmt: skip


def _better(best: tuple[str, str], worse: tuple[str, str], log: str) -> Ordering:
    names = arm(*best, log), arm(*worse, log)
    return Ordering(" above ".join(names), *names, None, "not published", "")
