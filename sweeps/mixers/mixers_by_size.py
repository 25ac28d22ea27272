"""DCNv2 and TokenMixer-Large at the quickstart's seven sizes and 1.25e6 rows: partners of its RankMixer and its MLP.

Same log, rows and seeds (five at 2.4e4 parameters too), one cross layer or block each, as in `mixers_by_rows_others`.
The rate of every shape is the best of three or more on another stream of the log, found first. With the quickstart's
runs this is a table of four architectures, so each pair can be asked which needs fewer parameters for the same loss.

    recscale sweep mixers_by_size --out runs/mixers_by_size --no-report

What it says: `notebooks/runs/mixers.md`.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows_others import MODELS, RANKS

# Where the search begins: the rate near 2.5e3 parameters, and the power of size it falls with.
CENTRES = {"dcnv2": (7e-3, 0.2), "tokenmixer_large": (2e-2, 0.4)}
# Where the best of a first three, or of those that followed, was at an end: tried again around it.
MOVED = {("dcnv2", "2.7e3"): 5.6e-2, ("dcnv2", "1.1e4"): 2.6e-3}

# The quickstart's, and five at one size more, where `mixers_by_size_seeds` has the pair's.
SEEDS = {size: count for size, (_, _, count) in quickstart.LADDER.items()} | {"2.4e4": 5}

# One size more, of one seed: two decades of sizes.
LARGER = "2.7e5"
LARGER_MODELS = {
    "rankmixer": {"model.layers": 1, "model.tokens": 8, "model.width": 168, "model.hidden": 84, "training.lr": 2.4e-3},
    "dlrm_mlp": {"model.widths": (1101,), "training.lr": 2.4e-3},
    "dcnv2": {"model.cross_layers": 1, "model.widths": (), "model.rank": 547, "training.lr": 1.3e-3},
    "tokenmixer_large": MODELS["tokenmixer_large"] | {"size.dense_params": float(LARGER), "training.lr": 6e-3},
}


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    own = [product(noted(_shapes(size), match_id=size), seeds(count)) for size, count in SEEDS.items()]
    larger = [{"architecture": name, **model} for name, model in LARGER_MODELS.items()]
    return chain(*own, product(noted(larger, match_id=LARGER), seeds(1)))


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
    found = []
    for name, (rate, power) in CENTRES.items():
        centre = MOVED.get((name, size), float(f"{rate * (float(size) / 2500) ** -power:.2g}"))
        found.append({"architecture": name, **models[name], "training.lr": centre})
    return found
