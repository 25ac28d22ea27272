"""The quickstart's ladder two decades further up, for one accelerator: the last stage of `recscale bench device`.

Preset `dense` of the known-truth log (see `quickstart`), RankMixer and DLRM-MLP of up to 1.25e7 dense parameters, four
million rows in steps of 4,096, two seeds trained as replicas of one program. The smallest sizes come first, so that a
budget that ends cuts off the top of the ladder.

    recscale sweep device_ladder --out runs/device_ladder

Not run yet.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

# Seven rungs over 2.6 decades; the quickstart ends at the second.
SIZES = [3e4, 1.25e5, 3.1e5, 7.9e5, 2e6, 5e6, 1.25e7]


def get_config() -> ConfigDict:
    return known_truth("rankmixer", "dense", requests=4096, examples=4_000_000, lr=2e-3)


def get_sweep() -> Sweep:
    # Tokens and blocks fixed, so that a size is not also another kind of shape.
    rankmixer = product(architectures(["rankmixer"]), axis("model.layers", [1]), axis("model.tokens", [8]))
    return product(by_dense_params(SIZES), chain(rankmixer, architectures(["dlrm_mlp"])), seeds(2))


def get_report() -> dict:
    return power_law("dense_params")
