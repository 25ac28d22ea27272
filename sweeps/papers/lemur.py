"""The orderings LEMUR published (arXiv 2511.10962), each as two arms of one sweep.

What differs from the paper: the log of `lemur_cold_items`, 8,192 items whose content says what an id would have to
learn, instead of a search engine's; 2.8e4 dense parameters instead of 1.4e8; one history, so what the paper has of a
short one cannot be asked; logloss decides, and the excess on cold items, where the paper has the mean AUC of a query.
Its ablation without gradient into the encoders (-.31) and its two stages (-.69) are one arm here, "two stages". An arm
without a part has fewer parameters.

    recscale paper lemur

Its first three arms are those of `lemur_cold_items`, whose runs are committed; the others were not run.
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, against_one, as_option, in_a_row
from recscale.sweeps import Sweep, chain, noted, product, seeds
from recscale.sweeps.domains import lemur_cold_items as study

CHANGES: dict[str, dict[str, Any]] = {
    "no history": {"model.reader_layers": 0},
    "no SQDC": {"model.sqdc_weight": 0.0},
    "no cosine": {"model.similarity": False},
    "no session mask": {"model.session_mask": False},
    "p 1, q 1": {"model.encode_fraction": 1.0, "model.backward_fraction": 1.0},
    "p 1, q .2": {"model.encode_fraction": 1.0, "model.backward_fraction": 0.2},
    "p .1, q .1": {"model.encode_fraction": 0.1, "model.backward_fraction": 0.1},
}


def get_config() -> ConfigDict:
    return study.get_config()


def get_rates() -> dict:
    return study.get_rates()


def get_sweep() -> Sweep:
    arms = study.ARMS | {name: study.LEMUR | change for name, change in CHANGES.items()}
    return product(chain(*(noted([settings], arm=name) for name, settings in arms.items())), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    at, unit = "1.4e8 parameters, private search log", "% of QAUC"
    losses = {"no history": 0.25, "no SQDC": 0.17, "no cosine": 0.12, "no session mask": 0.10}
    shares = {"p 1, q 1": 0.81, "p 1, q .2": 0.78, "joint": 0.76, "p .1, q .1": 0.75}
    ablations, lacking = "table of ablations", "the loss between content and ids is not built"
    return [
        *study.orderings(),
        *against_one("ablation", "joint", losses, ablations, at, unit),
        *in_a_row("sampling", shares, "table of sampling costs", at, unit),
        Ordering("contrastive", "joint", "content-id contrastive loss", 0.02, ablations, at, unit, lacking),
    ]
