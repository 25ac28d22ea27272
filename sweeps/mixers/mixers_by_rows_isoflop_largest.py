"""A fourth budget for `mixers_by_rows_isoflop`, at rates by rule: the quickstart's, times a power of the rows.

recscale sweep mixers_by_rows_isoflop_largest --out runs/mixers_by_rows_isoflop_largest --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows_isoflop import group

BUDGET, FIRST, LAST = 3e11, "6.4e3", "1.15e5"


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    """One seed."""
    rule = "best of three at 1.75e6 rows, times a power of the rows"
    return product(noted(group(BUDGET, FIRST, LAST), lr_rule=rule, lr_bracketed=False), seeds(1))
