"""Three more seeds of the quickstart's pair at 2.4e4 parameters: with its two, five, as `mixers_by_size` has there.

    recscale sweep mixers_by_size_seeds --out runs/mixers_by_size_seeds --no-report

What they say: notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, quickstart

SIZE = "2.4e4"


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    own = [point for point in quickstart.get_sweep() if point["note.match_id"] == SIZE and point["seed"] == 0]
    return [point | {"seed": seed} for point in own for seed in (2, 3, 4)]
