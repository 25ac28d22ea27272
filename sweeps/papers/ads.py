"""The orderings ADS published (arXiv 2502.05523), each as two arms of one sweep.

What differs from the paper: the log of `length_ladder` with histories of 64 events; 1.6e5 rows; 3e5 dense parameters,
equal for every arm (generated queries have parameters per event, which plain scorers give to the backbone); logloss
decides, AUC stands beside it. The paper's percentages are taken for relative ones, from a translation of its text.

    recscale paper ads

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, as_option
from recscale.sweeps import Sweep, by_dense_params, by_history_length, chain, noted, product, seeds
from recscale.sweeps.sequences.length_ladder import long_log

LENGTH = 64
SIZE = 3e5
SCORERS = {"DIN": "din", "MHA": "mha", "CAN": "can"}
GENERATORS = {
    "ADS": {},
    "no PCRG": {"model.encoder.pcrg": False},
    "plain": {"model.encoder.pcrg": False, "model.encoder.psrg": False},
}
CHUNKS = (2, 5, 10)


def get_config() -> ConfigDict:
    return long_log("ads+rankmixer", LENGTH, examples=160_000, lr=3e-3)


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    small = {"model.encoder.width": 32, "model.encoder.gen_hidden": 8}
    arms = [
        noted([small | {"model.encoder.scorer": scorer} | change], arm=f"{name} on {text}")
        for text, scorer in SCORERS.items()
        for name, change in GENERATORS.items()
    ]
    shared = {"model.encoder.scorer": "mha"}
    arms += [noted([small | shared | {"model.encoder.chunk": n}], arm=f"chunks of {n}") for n in CHUNKS]
    sizes = product(by_history_length([LENGTH]), by_dense_params([SIZE], training__lr=3e-3))
    return product(sizes, chain(*arms), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    at, percent = "sizes not printed, an advertiser's log", "% of AUC"
    no_pcrg, plain = {"DIN": 0.06, "MHA": 0.03, "CAN": 0.23}, {"DIN": 0.23, "MHA": 0.23, "CAN": 0.29}
    rows = ["ADS on MHA", "chunks of 2", "chunks of 5", "chunks of 10", "plain on MHA"]
    found = []
    for name in SCORERS:
        full, none, bare = f"ADS on {name}", f"no PCRG on {name}", f"plain on {name}"
        gain = round(plain[name] - no_pcrg[name], 2)
        found += [
            Ordering(f"PCRG.{name}", full, none, no_pcrg[name], "table 3", at, percent),
            Ordering(f"both.{name}", full, bare, plain[name], "table 3", at, percent),
            Ordering(f"PSRG.{name}", none, bare, gain, "table 3", at, percent),
        ]
    for better, worse in zip(rows, rows[1:], strict=False):
        found.append(Ordering(f"chunks.{worse}", better, worse, None, "section 3.4, curves", at, percent))
    for name in ("FRNet", "PEPNet"):
        lacking = f"{name} is not in the package"
        found.append(Ordering(f"rival.{name}", "ADS on DIN", name, 0.2, "table 2", at, percent, lacking))
    return found
