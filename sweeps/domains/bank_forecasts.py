"""What staleness costs LEMUR, and whether a forecast of what a vector has become gives it back.

The log of `lemur_cold_items` with 512 items, a rate that stays (so that encoders drift to the end), a tenth of a
batch's items encoded a step:

    stale            the bank's last vector                  predictor="none"
    linear, lstm     forecasts from the last two, three snapshots
    averaged         a moving average of the encoder writes the bank (predictor="ema")
    always fresh     every item of a batch is encoded, a tenth with gradient

Columns bank_error and bank_forecast_error are |vector - fresh| / |fresh| of what was encoded anew, means over the last
tenth of the run; ..._age<a> the same of items last written a to 2a steps ago. Expected: stale < forecast <= fresh, and
a forecast's error below the bank's. In the only public log of the method (arXiv 2308.13466, a reconstruction here) it
was above it in 600 of 600 rows.

One shape, five paired seeds, the rate of `lemur_cold_items`.

    recscale sweep bank_forecasts --out runs/bank_forecasts

Measured 2026-11-30 on one shared core of an AMD EPYC, jax 0.10.2: 25 runs in 335 s. Refuted here: both forecasts cost
quality, the LSTM although its error is below the bank's from an age of seven steps on; that of linear grows with age.
Always fresh and averaged are inside the noise of stale: what staleness costs is less than what seeds do.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, as_option
from recscale.sweeps import Sweep, chain, noted, product, seeds
from recscale.sweeps.domains import lemur_cold_items as cold

SHAPE = cold.LEMUR | {"model.sample_order": "hash"}
ARMS = {
    "stale": {},
    "linear": {"model.predictor": "linear"},
    "lstm": {"model.predictor": "lstm"},
    "averaged": {"model.predictor": "ema", "model.ema_decay": 0.9},
    "always fresh": {"model.encode_fraction": 1.0},
}


def get_config() -> ConfigDict:
    config = cold.content_log(16, examples=150_000, lr=4e-3, schedule="constant")
    config.model.update(encode_fraction=0.1, backward_fraction=0.1)
    return config


def get_sweep() -> Sweep:
    searched = dict(lr_rule="best of lemur_cold_items", lr_trials=3, lr_bracketed=True)
    return product(chain(*(noted([SHAPE | own], arm=name, **searched) for name, own in ARMS.items())), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    pairs = [("always fresh", "stale"), *((name, "stale") for name in ("linear", "lstm", "averaged"))]
    pairs += [("always fresh", name) for name in ("linear", "lstm", "averaged")]
    return [Ordering(f"{a}>{b}", a, b, None, "section 5", "no size: a property") for a, b in pairs]
