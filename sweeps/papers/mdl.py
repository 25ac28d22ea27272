"""The orderings MDL published (arXiv 2602.07520), each as two arms of one sweep.

What differs from the paper: three made-up domains and two labels of the log of `mdl_shared_fraction` instead of a
search engine's pages; 1.2e4 dense parameters instead of 5e8; logloss decides, where the paper has the mean AUC of a
query. How much domains have in common is not known of its data, so MDL stands beside its rivals at five shares rho, and
where one of them should be best, at the ends, that is what is asked. Ablations are asked at one half.

The log is short, 5e4 rows, a sixth of `mdl_shared_fraction`: there every model found nearly all of either part, and
nothing had to be shared. Every arm at every share has a search of its own, five rates on another stream.

    recscale paper mdl

Not run yet at this size: no figure of it has been committed.
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, against_one, as_option
from recscale.sweeps import Sweep, chain, noted, product, seeds
from recscale.sweeps.domains import mdl_shared_fraction as study

HALF = 0.5
CHANGES: dict[str, dict[str, Any]] = {
    "no scenario tokens": {"model.scenario_tokens": "none"},
    "no task tokens": {"model.task_tokens": "none"},
    "no global token": {"model.global_scenario": False},
    "no scenario attention": {"model.scenario_tokens": "plain"},
    "no task attention": {"model.task_tokens": "plain"},
}


def get_config() -> ConfigDict:
    config = study.get_config()
    config.training.examples = 50_000
    return config


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    def runs(arm: str, name: str, rho: float, change: dict[str, Any]) -> Sweep:
        return noted(product(study.model(name), [study.at(rho) | change | {"training.lr": 0.03}]), arm=arm)

    beside = [runs(study.arm(name, rho), name, rho, {}) for name in study.RATES for rho in study.SHARED]
    ablated = [runs(name, "MDL", HALF, change) for name, change in CHANGES.items()]
    return product(chain(*beside, *ablated), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    """Those of `mdl_shared_fraction`, the ablations (means over three kinds of page), and rivals that are not here."""
    at, unit = "5e8 parameters, private search log", "QAUC points x 100"
    losses = {"no scenario tokens": 0.16, "no task tokens": 0.107, "no global token": 0.05}
    losses |= {"no scenario attention": 0.047, "no task attention": 0.02}
    rivals = {"HMoE": 0.318, "STAR": 0.367, "PEPNet": 0.32}
    return [
        *study.orderings(),
        *against_one("ablation", study.arm("MDL", HALF), losses, "table of ablations", at, "% of click QAUC"),
        *(
            Ordering(name, study.arm("MDL", HALF), name, gap, "main table", at, unit, "the rival is not built")
            for name, gap in rivals.items()
        ),
    ]
