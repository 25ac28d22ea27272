"""RankMixer and the MLP four times as large as in `mixers_by_rows`, with more rows: what was forecast of them.

Trained after the forecast had been committed (notebooks/runs/forecast.md), whatever came out, at rates that were set
with it: those that three trials of these shapes with 2.5e5 rows say are best, times the powers of the rows.

    recscale sweep mixers_by_rows_check --out runs/mixers_by_rows_check --no-report
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, noted, product, quickstart, seeds
from recscale.sweeps.mixers.mixers_by_rows import with_rows

ROWS = 4_000_000
SIZE = "4.9e5"
MODELS = {
    "rankmixer": {"model.layers": 1, "model.tokens": 8, "model.width": 232, "model.hidden": 116},
    "dlrm_mlp": {"model.widths": (1976,)},
}
SEARCHED_ROWS = 250_000
RATES = {"rankmixer": 4e-3, "dlrm_mlp": 3.1e-3}


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    points = noted(shapes(RATES), match_id=SIZE)
    ruled = with_rows(points, ROWS, SEARCHED_ROWS, "vertex of three at 2.5e5 rows, times a power of the rows")
    return product(ruled, seeds(2))


def shapes(rates: dict[str, float]) -> Sweep:
    return [{"architecture": name, **model, "training.lr": rates[name]} for name, model in MODELS.items()]
