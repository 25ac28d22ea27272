"""The orderings LONGER published (arXiv 2505.04421), each as two arms of one sweep.

What differs from the paper: the log of `length_ladder`, whose events are all that is worth reading, instead of an
advertiser's (5.2e9 rows); histories of 64 events instead of 2,000, so that 8 merged events make 8 tokens and a share of
.4 of them are 4 queries; 1.6e5 rows; 6e4 dense parameters, equal for every arm (the RankMixer backbone behind every
encoder takes what the encoder leaves), and merged tokens of equal width, where the paper's sizes differ; logloss
decides, AUC stands beside it. The published gaps are .0001 to .003 AUC: many of them are smaller than the noise of five
seeds here.

    recscale paper longer

What its runs say of each: `notebooks/runs/papers.md`.
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, as_option, in_a_row
from recscale.sweeps import Sweep, by_dense_params, chain, noted, product, seeds
from recscale.sweeps.sequences.length_ladder import SETTINGS, long_log

LENGTH = 64
SIZE = 6e4
WIDTH = 32  # of a merged token

_LONGER = SETTINGS["longer+rankmixer"] | {"model.encoder.max_length": LENGTH}

# Table 2 varies one thing at a time of the model with all queries; table 1's is the one with a share of .4.
MERGES = {
    "no merge": {"merge": 1, "inner": 0, "query_share": 1.0},
    "merge 4": {"merge": 4, "inner": 0, "query_share": 1.0},
    "merge 8": {"merge": 8, "inner": 0, "query_share": 1.0},
}
QUERIES = {
    "LONGER": {},
    "recent 20 %": {"query_share": 0.2},
    "recent 60 %": {"query_share": 0.6},
    "recent 80 %": {"query_share": 0.8},
    "recent 100 %": {"query_share": 1.0},
    "recent and uniform": {"query_strategy": "recent_uniform"},
    "uniform": {"query_strategy": "uniform"},
    "learnable": {"query_strategy": "learnable"},
}
BASELINES = {
    "Transformer": "sequence_transformer",
    "HSTU": "hstu",
    "DIN": "din",
    "TWIN": "twin_lite",
    "SumPooling": "sum_pooling",
}


def get_config() -> ConfigDict:
    return long_log("longer+rankmixer", LENGTH, examples=160_000, lr=3e-3)


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    longer = [_arm(name, "longer", _LONGER | _encoder(**change)) for name, change in {**MERGES, **QUERIES}.items()]
    baselines = [_arm(name, encoder, _baseline(encoder)) for name, encoder in BASELINES.items()]
    recent = _arm("DIN, recent 25", "din", _baseline("din") | {"model.encoder.recent": 25})
    base = noted([{"architecture": "rankmixer", "model.layers": 1}], arm="no history")
    arms = chain(*longer, *baselines, recent, base)
    return product(by_dense_params([SIZE], training__lr=3e-3), arms, seeds(5))


def _arm(name: str, encoder: str, settings: dict) -> Sweep:
    return noted([{"architecture": f"{encoder}+rankmixer"} | settings], arm=name)


def _baseline(encoder: str) -> dict:
    return SETTINGS.get(f"{encoder}+rankmixer", {"model.backbone.layers": 1})


def _encoder(merge: int = 8, **change: Any) -> dict:
    settings = {"merge": merge, "event_width": WIDTH // merge} | change
    return {f"model.encoder.{key}": value for key, value in settings.items()}


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    """AUC x 100 as printed. The paper's DIN of 50 recent events, of 2,000, is one of 25 of 64 here."""
    at = "history of 2,000 events, 5.2e9 rows"
    encoders = {"LONGER": 85.29, "Transformer": 85.111, "HSTU": 84.994, "DIN": 84.982, "DIN, recent 25": 84.698}
    encoders |= {"TWIN": 84.472, "SumPooling": 84.201, "no history": 83.968}
    merges = {"recent 100 %": 85.332, "merge 8": 85.291, "merge 4": 85.232, "no merge": 85.111}
    counts = {"recent 100 %": 85.332, "recent 80 %": 85.331, "recent 60 %": 85.29, "recent 20 %": 85.235}
    ways = {"LONGER": 85.29, "recent and uniform": 85.255, "uniform": 85.183, "learnable": 84.946}
    far = ["HSTU", "DIN", "DIN, recent 25", "TWIN", "SumPooling", "no history"]  # the neighbour is in the ranking
    return [
        *in_a_row("encoders", encoders, "table 1", at),
        *[_gap("encoder", "LONGER", name, encoders, "table 1", at) for name in far],
        *in_a_row("merging", merges, "table 2", at),
        _gap("merging", "merge 8", "no merge", merges, "table 2", at),
        *in_a_row("queries", counts, "table 2", at),
        Ordering("queries.40>20", "LONGER", "recent 20 %", 0.055, "table 2", at),
        *in_a_row("sampling", ways, "table 2", at),
    ]


def _gap(prefix: str, better: str, worse: str, levels: dict[str, float], source: str, at: str) -> Ordering:
    return Ordering(f"{prefix}.{better}>{worse}", better, worse, round(levels[better] - levels[worse], 3), source, at)
