"""Loss against history length for four ways to read a history, on a log whose length exponent is known.

Preset `long` of the known-truth log, made learnable on two cores: all signal lies in events, and a model that sees the
newest S misses (S + 1)^-lam of its variance, lam = .30. Every architecture has about 4e4 dense parameters at every
length, the same rows and steps, and 8 candidates per request, so that what is done once per request is shared.

    recscale sweep length_ladder --out runs/length_ladder

Measured 2026-11-28 on 2 shared cores of an Intel Xeon (Sapphire Rapids), jax 0.10.2: 72 runs in 24 programs, about 100
core-minutes. Mean logloss of three seeds, from 16 events to 512: HyFormer .6126 to .5690, DIN .6124 to .5704, MixFormer
.6136 to .5812, LONGER .6151 to .6783 (it is slow to start beyond 64 events), where the best possible is .6104 to .5658.
Fitted with E free: HyFormer .287 [.230, .345], DIN .32 [.21, .44]. More: notebooks/runs/sequences.md.
For other rates, add them to `RATES` and extend the plan.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, by_history_length, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

LENGTHS = [16, 32, 64, 128, 256, 512]
SIZE = 4e4

# The preset's law in a world that models of this size can learn. Given ids, all signal is in products of two looked-up
# vectors, and models stay at the base rate's logloss for 4e5 to 1.6e6 rows; given the ids' signs (of events and of the
# candidate) DIN, HyFormer and MixFormer recover 83 to 87 % of the signal of 53 events in 4e5 rows.
WORLD = dict(
    # No model here reads more than 512 events, and older ones are noise to all: they need not be drawn at all. The log
    # adds the variance they would carry, so the law stays that of the preset.
    history_max=max(LENGTHS),
    shares=(0.0, 1.0, 0.0, 0.0),  # events alone: nothing else to learn, or to be short of
    codes="oracle_history",
    code_width=4,
    code_bits=1,  # the eight other fields say nothing
    quanta=64,
    match_groups=1,
    blocks=1,
    b=0.0,
    signal=2.0,
)

# At every length: the best or nearly so in shorter runs of three rates at 4 to 128 events.
RATES = {
    "longer+rankmixer": [1.5e-3],
    "din+rankmixer": [6e-3],
    "hyformer": [1.5e-3],
    "mixformer": [1.5e-3],
}
SETTINGS = {
    # Merged events of width 8, four to a token; one position table whatever the length.
    "longer+rankmixer": {
        "model.encoder.event_width": 8,
        "model.encoder.merge": 4,
        "model.encoder.max_length": max(LENGTHS),
        "model.backbone.layers": 1,
    },
    # DIN's published widths (80, 40) cost more per candidate than everything else here together.
    "din+rankmixer": {"model.encoder.hidden": (32, 16), "model.backbone.layers": 1},
    "hyformer": {"model.layers": 1},
    # Its default head is one hidden layer of 16 ReLUs here, which die one after another at 3e-3: a linear head.
    "mixformer": {"model.layers": 1, "model.tower": ()},
}


def get_config() -> ConfigDict:
    return long_log("longer+rankmixer", max(LENGTHS))


def long_log(architecture: str, longest: int, world: Mapping[str, Any] | None = None, **training: Any) -> ConfigDict:
    """A run in `WORLD` with histories of at most `longest` events; `world` and `training` as in `known_truth`."""
    fields = WORLD | {"history_max": longest} | dict(world or {})
    return known_truth(architecture, "long", fields, requests=32, candidates=8, **training)


def get_sweep() -> Sweep:
    models = chain(
        *(product(architectures([name]), [SETTINGS[name]], axis("training.lr", RATES[name])) for name in RATES)
    )
    return product(models, by_dense_params([SIZE]), by_history_length(LENGTHS), seeds(3))


def get_report() -> dict:
    return power_law("history_length", hold_out=False)
