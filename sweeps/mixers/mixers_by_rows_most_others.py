"""DCNv2 with 8e6 rows, at the quickstart's sizes: a partner of the RankMixer and the MLP of `mixers_by_rows_most`.

One cross layer, the shapes of `mixers_by_size`. Rates are by rule: the best with 1.25e6 rows, times the power of the
rows that the best rates of the four largest shapes show between 2.5e5 and 1.25e6 rows, where it is .50 to .52. Of the
three smallest it is -.8, .9 and 1.0, so that the rates of these are the least certain; two were tried with as many rows
afterwards (`mixers_by_rows_most_rates`).

    recscale sweep mixers_by_rows_most_others --out runs/mixers_by_rows_most_others --no-report

What it says and what it does not: notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, noted, product, quickstart, seeds
from recscale.sweeps.mixers import mixers_by_rows_most
from recscale.sweeps.mixers.mixers_by_rows_others import RANKS

# Best of three or more with 1.25e6 rows (`mixers_by_size`).
RATES = dict(zip(quickstart.LADDER, (5.6e-2, 5.8e-3, 2.6e-3, 4.5e-3, 3.8e-3, 3.4e-3, 3.3e-3), strict=True))
EXPONENT = 0.5


def get_config() -> ConfigDict:
    return mixers_by_rows_most.get_config()


def get_sweep() -> Sweep:
    """One seed."""
    more = mixers_by_rows_most.ROWS / quickstart.get_config().training.examples
    found = []
    for size, rate in RATES.items():
        model = {"model.cross_layers": 1, "model.widths": (), "model.rank": RANKS[size]}
        point = {"architecture": "dcnv2", **model, "training.lr": float(f"{rate * more**-EXPONENT:.2g}")}
        found += noted([point], match_id=size)
    rule = "best of three or more at 1.25e6 rows, times a power of the rows"
    return product(noted(found, lr_rule=rule, lr_bracketed=False), seeds(1))


def get_report() -> dict:
    return {"form": "power", "axes": {"N": "dense_params"}, "target": "excess_logloss"}
