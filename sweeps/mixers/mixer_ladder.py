"""The parameter ladder of four interaction backbones on a log whose law is known, learning rates tuned at every size.

Preset `dense_nested` of the known-truth log: seven sizes from 2e3 to 2e5 dense parameters, one pass over a
million rows, three seeds. At every size the rate is one of a small grid around a centre that falls with size as short
runs of each architecture suggested; the run table says where the best rate lies inside its grid (`lr_bracketed`), and
the report fits the rows of that rate.

DCNv2's cross layer has the width of the inputs and stays the same at all sizes: what scales is its MLP.

    recscale sweep mixer_ladder --out runs/mixer_ladder

Measured 2026-11-22 on 1 core of an AMD EPYC, jax 0.10.2: 300 runs, 37 min. Excess logloss over the entropy floor, times
1,000, mean of three seeds at the best rate, from the smallest size to the largest: RankMixer 8.58 to 3.64,
TokenMixer-Large 7.91 to 3.70, DLRM-MLP 7.23 to 4.30, DCNv2 5.74 to 4.88. What it says and what it does not:
notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

# Seven rungs over two decades: the largest is held out, and six remain, over 1.67 decades, for three parameters.
SIZES = [2e3, 4.3e3, 9.3e3, 2e4, 4.3e4, 9.3e4, 2e5]

# Best rate near 2e3 parameters, and the power of size it falls with, from single runs at 2e3, 2e4, 1e5 and 2e5.
CENTRES = {
    "rankmixer": (1.2e-2, 0.5),
    "tokenmixer_large": (3e-2, 0.7),
    "dcnv2": (1.2e-2, 0.1),
    "dlrm_mlp": (5e-3, 0.0),
}

# Rates tried, relative to the centre: more where runs are cheap and the best rate varies most.
WIDE = (0.19, 0.58, 1.7, 5.2)
NARROW = (0.25, 1.0, 4.0)
WIDE_BELOW = 3e4


def get_config() -> ConfigDict:
    return known_truth("rankmixer", "dense_nested")


def get_sweep() -> Sweep:
    # One block and fixed tokens or heads, so that a size is not also another kind of shape. One block has no
    # lower block an auxiliary head could stand on.
    mixer = dict(layers=1, tokens=8)
    large = dict(layers=1, heads=4, aux_weight=0.0)
    cross = dict(cross_layers=1, rank=8)
    settings = {"rankmixer": mixer, "tokenmixer_large": large, "dcnv2": cross, "dlrm_mlp": {}}
    return chain(*(tuned_ladder(name, CENTRES[name], **model) for name, model in settings.items()))


def get_report() -> dict:
    return power_law("dense_params")


def tuned_ladder(
    architecture: str, centre: tuple[float, float], *, wide_below: float = WIDE_BELOW, **model: object
) -> Sweep:
    """One architecture at every size, three seeds, and a grid of rates around `centre` = (rate at 2e3, exponent).

    wide_below: sizes below it get four rates, others three. model: settings held fixed at every size.
    """
    fixed = [axis(f"model.{name}", [value]) for name, value in model.items()]
    rungs = (
        product(by_dense_params([size]), axis("training.lr", rates(size, *centre, size < wide_below)), seeds(3))
        for size in SIZES
    )
    return product(architectures([architecture]), *fixed, chain(*rungs))


def rates(size: float, at_smallest: float, exponent: float, wide: bool) -> list[float]:
    """The grid of learning rates of one size, rounded to two digits."""
    middle = at_smallest * (size / SIZES[0]) ** -exponent
    return [float(f"{middle * factor:.1e}") for factor in (WIDE if wide else NARROW)]
