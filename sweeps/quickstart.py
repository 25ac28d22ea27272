"""Two architectures over two decades of dense parameters on a log whose law is known.

Preset `dense` of the known-truth log: all signal is in products of code signs that are given as inputs, so excess
logloss falls with dense parameters and with nothing else; seven shapes an architecture, one pass each.

    recscale sweep quickstart --out runs/quickstart
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, architectures, by_dense_params, product


def get_config() -> ConfigDict:
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "dense"
    config.training.examples = 1_000_000
    return config


def get_sweep() -> Sweep:
    # Seven rungs over two decades: the largest is held out, and six remain for three parameters.
    sizes = [1e3, 2.2e3, 4.6e3, 1e4, 2.2e4, 4.6e4, 1e5]
    return product(architectures(["rankmixer", "dlrm_mlp"]), by_dense_params(sizes))


def get_report() -> dict:
    return {"form": "power_offset", "axes": ["dense_params", "train_flops"], "target": "logloss"}
