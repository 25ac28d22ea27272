"""What delays LONGER's start on long histories: undisclosed choices, one at a time, five paired seeds at three rates.

The log of `length_ladder`, whose LONGER + RankMixer stays near the base rate for up to a third of a million rows at 128
events and more. Equal backbone and equal width of the encoder, so that an arm changes nothing but what it names. The
column `examples_to_start` has the rows after which a run was first 2 % below the logloss of the base rate, in the mean
over a logging interval (a fortieth of the rows), null where it never was; runs that know nothing stay within .5 %.

    recscale sweep longer_start --out runs/longer_start

Run so far are the arms in `AT`. What they say: `notebooks/runs/sequences.md`. For more add them to it, then
`recscale plan longer_start --out runs/longer_start --extend`.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, axis, by_history_length, chain, noted, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.sequences.length_ladder import LENGTHS, SETTINGS, long_log

EXAMPLES = 120_000
RATES = (7.5e-4, 1.5e-3, 3e-3)
# The same RankMixer behind every arm.
BEHIND = {f"model.backbone.{key}": value for key, value in dict(layers=1, width=32, hidden=64, tokens=8).items()}

# What is undisclosed and may matter, and what each arm changes of it.
ARMS = {
    "LONGER": {},
    "newest row": {"readout": "globals_newest"},
    "8 queries": {"queries": 8},
    "newest row, 8 queries": {"readout": "globals_newest", "queries": 8},
    "no InnerTrans": {"inner": 0},
    "small InnerTrans": {"inner_init": 0.1},
    "one inner head": {"inner_heads": 1},
    "heads of width 8": {"head_dim": 8},
    "norm on attention": {"output_norm": True},
}
AT = {128: [*ARMS], 512: ["newest row, 8 queries"]}

# What the runs recommend.
RECOMMENDED = SETTINGS["longer+rankmixer"] | {"model.encoder.readout": "globals_newest", "model.encoder.queries": 8}


def get_config() -> ConfigDict:
    config = long_log("longer+rankmixer", max(LENGTHS), examples=EXAMPLES, lr=3e-3)
    config.data.holdout_rows = 16_384
    return config


def get_sweep() -> Sweep:
    tried = product(axis("training.lr", RATES), seeds(5))
    return chain(*(product(arms(names), by_history_length([length]), tried) for length, names in AT.items()))


def arms(names: list[str]) -> Sweep:
    """Each of these arms in front of the same backbone."""
    common = SETTINGS["longer+rankmixer"] | BEHIND
    changes = {name: {f"model.encoder.{key}": value for key, value in ARMS[name].items()} for name in names}
    return chain(*(noted([common | change], arm=name) for name, change in changes.items()))


def get_report() -> dict:
    return power_law("history_length", hold_out=False)
