"""Two architectures over two decades of dense parameters on a log whose law is known: a law, a forecast, a verdict.

Preset `dense` of the known-truth log: all signal is in products of two code signs that are given as inputs, no sign in
two of the strongest 124, and labels are click probabilities, so what is short is capacity: a learner of n products
misses c / (n + 1). Seven sizes of nearly equal parameters, the largest held out, both architectures on the same rows.
Rates were found on another stream of the log (`quickstart_rates`), three trials a size, and are recorded as such.

    recscale sweep quickstart --out runs/quickstart

Measured 2026-11-29 on 2 cores of an AMD EPYC shared with other work, jax 0.10.2: 46 runs in 344 s. Excess over the
asymptote falls as N^-.493 [.447, .569] (RankMixer) and N^-.57 [.42, .72] (MLP); RankMixer needs .60 [.49, .69] of the
MLP's parameters for the same loss. What it says and what it does not: notebooks/runs/quickstart.md.
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, chain, noted, product, seeds

# Size: width of a RankMixer of eight tokens and one block, whose hidden width is half of it; hidden width of an MLP of
# as many parameters; seeds, five at three sizes, the largest among them, where the two are compared in pairs.
LADDER = {
    "2.7e3": (8, 11, 5),
    "6.4e3": (16, 26, 5),
    "1.1e4": (24, 45, 2),
    "2.4e4": (40, 95, 2),
    "5.0e4": (64, 201, 2),
    "8.6e4": (88, 349, 2),
    "1.15e5": (104, 460, 5),
}

# Best of three trials at every size, from notebooks/runs/quickstart_rates.parquet.
RATES = {
    "rankmixer": dict(zip(LADDER, (2e-2, 5.5e-3, 9e-3, 6.5e-3, 4.7e-3, 3.8e-3, 3.4e-3), strict=True)),
    "dlrm_mlp": dict(zip(LADDER, (1.2e-2, 1.7e-2, 7e-3, 6e-3, 4.2e-3, 3.3e-3, 3e-3), strict=True)),
}
TRIALS = 3


def get_config() -> ConfigDict:
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "dense"
    config.training.requests = 256
    config.training.examples = 1_250_000
    return config


def get_sweep() -> Sweep:
    searched = dict(lr_rule="best of three on another stream", lr_trials=TRIALS, lr_bracketed=True)
    return chain(*(product(noted(shapes(size), match_id=size, **searched), seeds(LADDER[size][2])) for size in LADDER))


def shapes(size: str) -> Sweep:
    """Either architecture at one size, at its rate."""
    width, hidden, _ = LADDER[size]
    mixer = {"model.layers": 1, "model.tokens": 8, "model.width": width, "model.hidden": width // 2}
    models = {"rankmixer": mixer, "dlrm_mlp": {"model.widths": (hidden,)}}
    return [{"architecture": name, **model, "training.lr": RATES[name][size]} for name, model in models.items()]


def get_report() -> dict:
    axes = {"N": "dense_params"}
    return {"form": "power", "axes": axes, "target": "excess_logloss", "versus": ("rankmixer", "dlrm_mlp")}
