"""The parameter ladder of `mixer_ladder` for what the mixers become: sparse experts, and users separated (UG-Sep).

Same log, sizes, seeds, shapes and rates as the dense mixers of `mixer_ladder`, so each run has its dense rival there.

    rankmixer, tokenmixer_large            half of the experts active: `active_params` beside `dense_params`
    ug_rankmixer, ug_tokenmixer_large      5 of 8 fields are the user's, so compensation is on

Two and four experts, since hidden widths come in steps of them and the smallest models are a few units wide. `lam_rate`
is the calm one, for runs of some thousand steps.

    recscale sweep variant_ladder --out runs/variant_ladder

Not run yet at this size: no figure of it has been committed.
"""

from recscale.sweeps import Sweep, chain
from recscale.sweeps.mixers.mixer_ladder import CENTRES, get_config, get_report, tuned_ladder

__all__ = ["get_config", "get_report", "get_sweep"]

RANKMIXER = dict(layers=1, tokens=8)
LARGE = dict(layers=1, heads=4, aux_weight=0.0)

MODELS = {
    "rankmixer": RANKMIXER | dict(experts=2, active_ratio=0.5, lam0=1e-4, lam_rate=1.02),
    "tokenmixer_large": LARGE | dict(experts=4, active=2, gate_norm="all"),
    "ug_rankmixer": RANKMIXER,
    "ug_tokenmixer_large": LARGE,
}


def get_sweep() -> Sweep:
    ladders = (tuned_ladder(name, CENTRES[name.removeprefix("ug_")], **settings) for name, settings in MODELS.items())
    return chain(*ladders)
