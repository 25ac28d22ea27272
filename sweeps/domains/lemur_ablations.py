"""LEMUR on a log whose items have content: joint training against two stages, what each part adds, and what staleness
costs.

Preset `content` of the known-truth log: 8,192 items, most of them rare, whose clicks follow the history (80 % of the
signal). Content says of every item, with one sign in twenty wrong, what its id would have to be trained for. What the
paper printed is judged by `recscale paper lemur`.

Predictors in place of stale vectors are a reconstruction, and linear and ema its controls: in the only public log of
the method, forecasts were worse than stale vectors. Columns of the table: recovered_L, and the run's last lines of
metrics hold bank/cosine by age, bank/error and bank/forecast_error.

Equal dense parameters, five paired seeds, three rates for everyone; items are encoded in batches of 512 rows.

    recscale sweep lemur_ablations --out runs/lemur_ablations

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

SIZE = 4e4
RATES = (1.5e-3, 3e-3, 6e-3)

VARIANTS = (
    {},
    {"ranking_gradient": False},
    {"reader_layers": 0},
    {"sqdc_weight": 0.0},
    {"sqdc_weight": 0.3},
    {"session_mask": False},
    {"similarity": False},
    {"join_gradient": True},
    {"encode_fraction": 1.0, "backward_fraction": 1.0},
    {"encode_fraction": 1.0, "backward_fraction": 0.2},
    {"encode_fraction": 0.1, "backward_fraction": 0.1},
    {"predictor": "linear"},
    {"predictor": "ema"},
    {"predictor": "lstm"},
)


def get_config() -> ConfigDict:
    return known_truth("lemur", "content", examples=2_000_000)


def get_sweep() -> Sweep:
    own = [{f"model.{flag}": value for flag, value in variant.items()} for variant in VARIANTS]
    content = product(architectures(["lemur"]), [{"model.layers": 1}], own)
    none = product(architectures(["sum_pooling+rankmixer"]), [{"model.backbone.layers": 1}])
    return product(by_dense_params([SIZE]), chain(content, none), axis("training.lr", RATES), seeds(5))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
