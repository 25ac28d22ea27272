"""The parameter ladder of `mixer_ladder` for the other backbones, at the same dense parameters, data and seeds.

Rates are a wide grid at every size, around a centre that was not calibrated: see `lr_bracketed` of the run table.
AutoInt spends about 2T FLOPs a parameter (16 here) where the others spend 2: at equal parameters it is not a comparison
at equal cost, and its runs take most of the sweep's time.

    recscale sweep baseline_ladder --out runs/baseline_ladder

Not run yet at this size: no figure of it has been committed.
"""

import math

from recscale.sweeps import Sweep, chain
from recscale.sweeps.mixers.mixer_ladder import get_config, get_report, tuned_ladder

__all__ = ["get_config", "get_report", "get_sweep"]

# Depths are those that learn at a few thousand parameters; every other setting is the architecture's own.
MODELS = {
    "wukong": dict(layers=2),
    "hiformer": dict(layers=1),
    "autoint": dict(layers=2),
    "dhen_lite": dict(layers=1),
    "mmoe": dict(experts=2),
}

# Rate at 2e3 parameters and the power of size it falls with: between those of the four calibrated backbones.
CENTRE = (1.2e-2, 0.35)


def get_sweep() -> Sweep:
    return chain(*(tuned_ladder(name, CENTRE, wide_below=math.inf, **model) for name, model in MODELS.items()))
