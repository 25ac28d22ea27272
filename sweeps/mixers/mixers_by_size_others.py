"""Wukong, HiFormer and RankMixers of experts with the quickstart's 1.25e6 rows: with `mixers_by_size`, all eight.

The arms and shapes of `mixers_by_rows_others`, but for a Wukong of wide tokens where there is room for one, which is
far better there (`mixers_by_rows_shapes`). The rate of every shape is the best of three or more on another stream of
the log, found first, around a half to a quarter of the best with 2.5e5 rows. Five seeds, as the others have at these
sizes.

    recscale sweep mixers_by_size_others --out runs/mixers_by_size_others --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows_others import COMPARED, shapes, wide

# Where the search begins, by arm and size.
CENTRES = {
    "wukong": {"6.4e3": 1.4e-2},
    "wukong_wide": {"2.4e4": 2e-2, "1.15e5": 2e-2},
    "hiformer": {"6.4e3": 7e-3, "2.4e4": 5e-3, "1.15e5": 5e-3},
    "rankmixer_1_2": {"6.4e3": 1.1e-2, "2.4e4": 1.3e-2, "1.15e5": 4e-3},
    "rankmixer_1_4": {"6.4e3": 5.5e-3, "2.4e4": 6.5e-3},
}
# The Wukong of wide tokens that is as large as the others at the third size; with 2.5e5 rows there is none.
WIDE = {"1.15e5": {"width": 64, "fm_tokens": 8, "linear_tokens": 8, "rank": 8, "hidden": 167, "layers": 1}}


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    return product(chain(*(_shapes(size) for size in COMPARED)), seeds(5))


def get_rates() -> dict:
    return {"trials": quickstart.TRIALS}


def get_report() -> dict:
    return {"form": "power", "axes": {"N": "dense_params"}, "target": "excess_logloss"}


def _shapes(size: str) -> Sweep:
    """Those of one size, with the rate the search begins at."""
    own = noted([wide(shape) for name, shape in WIDE.items() if name == size], arm="wukong_wide", match_id=size)
    points = {point["note.arm"]: point for point in chain(shapes(size), own)}
    return [points[arm] | {"training.lr": rates[size]} for arm, rates in CENTRES.items() if size in rates]
