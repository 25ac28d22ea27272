"""Everything the made-up distribution brings, in one sweep of four runs."""

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, product, seeds


def get_config():
    config = base_config("one_layer", "coins")
    config.data.holdout_rows = 512
    config.data.metrics = ("brier",)
    config.training.requests = 64
    config.training.examples = 6_400
    return config


def get_sweep():
    return product(axis("model.hidden", [2, 16]), seeds(2))


def get_report():
    return {"form": "bare_power", "axes": {"x": "dense_params"}, "target": "brier", "hold_out_largest": False}
