"""Two architectures over two decades of dense parameters on a log whose law is known.

Preset `dense` of the known-truth log: all signal is in products of code signs that are given as inputs, so excess
logloss falls with dense parameters and with nothing else; seven shapes an architecture, one pass each, two seeds
trained as replicas of one program.

    recscale sweep quickstart --out runs/quickstart

Measured 2026-11-22 on 2 cores of an AMD EPYC, jax 0.10.2: 28 runs in 171 s. Excess over the entropy floor, times
1,000, mean of two seeds, from 1.8e3 parameters to 1.25e5: RankMixer 11.4 to 4.35, DLRM-MLP 7.50 to 4.34.
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds

# Seven rungs over 1.8 decades: the largest is held out, and six remain, over 1.5 decades, for three parameters.
SIZES = [1.8e3, 3.6e3, 7.2e3, 1.5e4, 3e4, 6.2e4, 1.25e5]


def get_config() -> ConfigDict:
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "dense"
    config.training.requests = 512
    config.training.examples = 1_000_000
    config.training.lr = 3e-3
    return config


def get_sweep() -> Sweep:
    # Tokens and blocks fixed, so that a size is not also another kind of shape. One block learns faster than two at
    # these sizes and this amount of data.
    rankmixer = product(architectures(["rankmixer"]), axis("model.layers", [1]), axis("model.tokens", [8]))
    return product(chain(rankmixer, architectures(["dlrm_mlp"])), by_dense_params(SIZES), seeds(2))


def get_report() -> dict:
    return {"form": "power_offset", "axes": {"N": "dense_params"}, "target": "logloss"}
