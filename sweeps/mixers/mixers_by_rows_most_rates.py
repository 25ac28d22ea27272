"""How far the rates of `mixers_by_rows_most_others` are from the best: two shapes at half, once and twice theirs.

Seed 0, another stream of the log, as many rows.

    recscale sweep mixers_by_rows_most_rates --out runs/mixers_by_rows_most_rates --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, quickstart, rate_search
from recscale.sweeps.mixers import mixers_by_rows_most_others

TRIED = ("6.4e3", "1.1e4")


def get_config() -> ConfigDict:
    return mixers_by_rows_most_others.get_config()


def get_sweep() -> Sweep:
    points = [point for point in mixers_by_rows_most_others.get_sweep() if point["note.match_id"] in TRIED]
    return rate_search(points, trials=quickstart.TRIALS)
