"""The rates of `mixers_by_rows`: every shape at three rates with 2.5e5 rows, one seed, another stream of the log.

With 1.75e6 rows the best of three are known (`quickstart_rates`). Fewer steps want higher rates: tried are one, two and
four times these; of the shape of `mixers_by_rows_check`, around a line through them. The three smallest shapes are
tried with 8e6 rows too (`mixers_by_rows_most`), around what the powers of the rows say of them, and once beyond an end
that was best.

    recscale sweep mixers_by_rows_rates --out runs/mixers_by_rows_rates --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, quickstart, rate_search
from recscale.sweeps.mixers import mixers_by_rows, mixers_by_rows_check

CENTRE = 2.0
CHECKED = {"rankmixer": 5.2e-3, "dlrm_mlp": 3e-3}
MOST, SMALLEST = 8_000_000, 3
# With so many rows, beyond three whose best was an end.
BEYOND = {
    ("rankmixer", "2.7e3"): 3.8e-2,
    ("rankmixer", "6.4e3"): 1e-2,
    ("dlrm_mlp", "2.7e3"): 2.2e-3,
    ("dlrm_mlp", "1.1e4"): 2e-2,
}


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.training.examples = 250_000
    return config


def get_sweep() -> Sweep:
    centres = [_around(size) for size in quickstart.LADDER] + [mixers_by_rows_check.shapes(CHECKED)]
    fewest = chain(*(rate_search(points, trials=quickstart.TRIALS) for points in centres))
    return chain(fewest, *(_with_most_rows(size) for size in [*quickstart.LADDER][:SMALLEST]))


def _with_most_rows(size: str) -> Sweep:
    searched = mixers_by_rows.with_rows(quickstart.shapes(size), MOST, mixers_by_rows.SEARCHED_ROWS, "to be found")
    found = rate_search(searched, trials=quickstart.TRIALS)
    firsts = {trial["architecture"]: trial for trial in found}
    beyond = {name: BEYOND[name, size] for name in firsts if (name, size) in BEYOND}
    return found + [firsts[name] | {"training.lr": rate} for name, rate in beyond.items()]


def _around(size: str) -> Sweep:
    return [point | {"training.lr": CENTRE * point["training.lr"]} for point in quickstart.shapes(size)]
