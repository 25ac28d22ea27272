"""The tournament's encoders in a world with two categories: an event counts where it shares the candidate's.

The log of `length_ladder` with `match_groups = 2`: events and candidate name their category beside their signs, and
of 64 events about half say something of a candidate. With one category a sum of events weighted by position holds all
that is to be known; here it takes a sum for each category, or attention that picks the events. One that ignores
categories recovers half of what the events say. Protocol "equal FLOPs" of `tournament` at 64 events: SASRec and HSTU
are wider than there, so that training FLOPs stay within 30 % of each other. 2.4e5 rows, five paired seeds. Rates are
the best of three around what was best at 64 events of one category, and of two or four more beyond an edge, on
another stream of this log.

    recscale sweep tournament_categories --out runs/tournament_categories --no-report

Two categories were chosen after a look at eight (`LOOK`: the first three of `NAMES`, three rates, one seed), where in
as many rows only DIN was below the base rate, in the last tenth. The runs' note: `notebooks/runs/sequences.md`.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, axis, by_history_length, chain, noted, product, seeds
from recscale.sweeps.sequences import length_ladder, longer_start, tournament

LENGTH, CATEGORIES, LOOK, EXAMPLES = 64, 2, 8, 240_000
# Categories are looked up.
WORLD = {"match_groups": CATEGORIES, "embedding_width": 8}

# What has another size than in the tournament.
SIZES = {"sasrec+rankmixer": {"model.encoder.width": 20}, "hstu+rankmixer": {"model.encoder.width": 18}}
NAMES = ["longer+rankmixer", "din+rankmixer", "target_attention+rankmixer", "sasrec+rankmixer", "hstu+rankmixer"]


def get_config() -> ConfigDict:
    longest = max(length_ladder.LENGTHS)
    config = length_ladder.long_log("longer+rankmixer", longest, WORLD, examples=EXAMPLES, lr=3e-3)
    config.data.holdout_rows = 16_384
    return config


def get_rates() -> dict:
    return {"trials": 3}


def get_sweep() -> Sweep:
    length = by_history_length([LENGTH])
    return chain(*(
        product(model(name), length, axis("training.lr", [tournament.BEST[name]]), seeds(5)) for name in NAMES
    ))  # fmt: skip


def model(name: str) -> Sweep:
    """One of the encoders in front of the tournament's RankMixer."""
    settings = tournament.NAMES[name] | SIZES.get(name, {})
    return noted([{"architecture": name} | longer_start.BEHIND | settings], arm=name)
