"""DCNv2 and TokenMixer-Large at the quickstart's seven sizes and 1.25e6 rows: partners of its RankMixer and its MLP.

Same log, rows and seeds, one cross layer or block each, as in `mixers_by_rows_others`. The rate of every shape is the
best of three on another stream of the log, found first. With the quickstart's runs this is a table of four
architectures, so each pair can be asked which needs fewer parameters for the same loss.

    recscale sweep mixers_by_size --out runs/mixers_by_size --no-report

Not run yet: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows_others import MODELS

# Rank of a cross layer with as many parameters as the quickstart's pair.
RANKS = dict(zip(quickstart.LADDER, (4, 12, 22, 47, 100, 174, 231), strict=True))
# Where the search begins: the rate near 2.5e3 parameters, and the power of size it falls with.
CENTRES = {"dcnv2": (7e-3, 0.2), "tokenmixer_large": (2e-2, 0.4)}


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    ladder = quickstart.LADDER
    return chain(*(product(noted(_shapes(size), match_id=size), seeds(ladder[size][2])) for size in ladder))


def get_rates() -> dict:
    return {"trials": quickstart.TRIALS}


def get_report() -> dict:
    return {"form": "power", "axes": {"N": "dense_params"}, "target": "excess_logloss"}


def _shapes(size: str) -> Sweep:
    """Both architectures of a size, with the rate the search begins at."""
    models = {
        "dcnv2": {"model.cross_layers": 1, "model.widths": (), "model.rank": RANKS[size]},
        "tokenmixer_large": MODELS["tokenmixer_large"] | {"size.dense_params": float(size)},
    }
    rates = {name: rate * (float(size) / 2500) ** -power for name, (rate, power) in CENTRES.items()}
    return [{"architecture": name, **models[name], "training.lr": float(f"{rates[name]:.2g}")} for name in models]
