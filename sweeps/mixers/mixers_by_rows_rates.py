"""The rates of `mixers_by_rows`: every shape at three rates with the fewest rows, one seed, another stream of the log.

With 1.75e6 rows the best of three are known (`quickstart_rates`). Fewer steps want higher rates: tried are one, two and
four times these; of the shape of `mixers_by_rows_check`, around a line through them.

    recscale sweep mixers_by_rows_rates --out runs/mixers_by_rows_rates --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, quickstart, rate_search
from recscale.sweeps.mixers import mixers_by_rows_check

CENTRE = 2.0
CHECKED = {"rankmixer": 5.2e-3, "dlrm_mlp": 3e-3}


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.training.examples = 250_000
    return config


def get_sweep() -> Sweep:
    centres = [_around(size) for size in quickstart.LADDER] + [mixers_by_rows_check.shapes(CHECKED)]
    return chain(*(rate_search(points, trials=quickstart.TRIALS) for points in centres))


def _around(size: str) -> Sweep:
    return [point | {"training.lr": CENTRE * point["training.lr"]} for point in quickstart.shapes(size)]
