"""Six more mixers on the log of `mixers_by_rows`, with 2.5e5 rows: RankMixer's and the MLP's partners at equal size.

One block or layer each, as there. DCNv2 is a cross layer alone, of a rank that grows. RankMixers of two and four
experts have one active at a token: `active_params` are those of the dense one of that size, `dense_params` more. The
rate of every shape is the best of three or more on another stream of the log, found first. Five seeds at three sizes,
and two of four architectures at the sizes between. A second Wukong, of wide tokens, came later, at one size.

    recscale sweep mixers_by_rows_others --out runs/mixers_by_rows_others --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows_rates import CENTRE

ROWS = 250_000
# The rank of a cross layer with as many parameters as the quickstart's pair.
RANKS = dict(zip(quickstart.LADDER, (4, 12, 22, 47, 100, 174, 231), strict=True))
# Where everybody is compared, with five seeds; between them there are two, of those that a law is fitted to.
COMPARED = ("6.4e3", "2.4e4", "1.15e5")
FITTED = ("rankmixer", "dlrm_mlp", "dcnv2", "tokenmixer_large")
MODELS = {
    "tokenmixer_large": {"model.layers": 1, "model.heads": 4, "model.aux_weight": 0.0},
    "wukong": {"model.layers": 1},
    "hiformer": {"model.layers": 1},
}
# A Wukong of wide tokens, the best of the shapes of `mixers_by_rows_shapes`, and where its search begins.
WIDE = {"2.4e4": {"width": 64, "fm_tokens": 4, "linear_tokens": 4, "rank": 4, "hidden": 21, "layers": 1}}
WIDE_CENTRE = 2e-2
EXPERTS = (2, 4)
SPARSE = {"model.lam0": 1e-4, "model.lam_rate": 1.02}
# Where the search begins: the rate near 2.5e3 parameters, and the power of size it falls with.
CENTRES = {"dcnv2": (1.6e-2, 0.2), "tokenmixer_large": (4e-2, 0.4), "wukong": (2e-2, 0.35), "hiformer": (2e-2, 0.35)}


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.training.examples = ROWS
    return config


def get_sweep() -> Sweep:
    compared = product(chain(*(shapes(size) for size in COMPARED)), seeds(5))
    between = chain(*(shapes(size) for size in RANKS if size not in COMPARED))
    return chain(compared, product([point for point in between if point["note.arm"] in FITTED], seeds(2)))


def get_rates() -> dict:
    return {"trials": quickstart.TRIALS}


def get_report() -> dict:
    return {"form": "power", "axes": {"N": "dense_params"}, "target": "excess_logloss"}


def shapes(size: str) -> Sweep:
    """Everybody at one size, with the rate the search begins at."""
    points = [point | {"training.lr": CENTRE * point["training.lr"]} for point in quickstart.shapes(size)]
    mixer = points[0]
    arms = {point["architecture"]: point for point in points}
    for count in EXPERTS:
        shares = {
            "model.experts": count,
            "model.active_ratio": 1 / count,
            "model.hidden": count * mixer["model.hidden"],
        }
        arms[f"rankmixer_1_{count}"] = mixer | shares | SPARSE
    arms["dcnv2"] = {"model.cross_layers": 1, "model.widths": (), "model.rank": RANKS[size]}
    arms |= {name: model | {"size.dense_params": float(size)} for name, model in MODELS.items()}
    for name, (rate, power) in CENTRES.items():
        arms[name] |= {"architecture": name, "training.lr": float(f"{rate * (float(size) / 2500) ** -power:.2g}")}
    if size in WIDE:
        arms["wukong_wide"] = wide(WIDE[size])
    return chain(*(noted([point], arm=name, match_id=size) for name, point in arms.items()))


def wide(shape: dict[str, int]) -> dict:
    """A Wukong of wide tokens, with the rate the search begins at."""
    options = {f"model.{name}": value for name, value in shape.items()}
    return {"architecture": "wukong", "training.lr": WIDE_CENTRE, **options}
