"""The orderings HyFormer published (arXiv 2601.12681), each as two arms of one sweep.

What differs from the paper: the log of `length_ladder` with one history of 64 events instead of three of up to 3,000
(so that separate and merged histories cannot differ); 1.6e5 rows instead of 3e9; 1e5 dense parameters, equal for every
arm; logloss decides, AUC stands beside it, where the paper has the mean AUC of a query.

    recscale paper hyformer

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, as_option, in_a_row
from recscale.sweeps import Sweep, by_dense_params, chain, noted, product, seeds
from recscale.sweeps.sequences.length_ladder import long_log

LENGTH = 64
SIZE = 1e5

HYFORMER = {
    "HyFormer": {},
    "no pools": {"model.query_pools": "none"},
    "target only": {"model.query_sources": "target"},
}
BACKBONES = {"RankMixer": "rankmixer", "Wukong": "wukong"}
_LONGER = {"model.encoder.merge": 1, "model.encoder.event_width": 32, "model.encoder.queries": LENGTH // 4}
_FULL = {"model.encoder.width": 32}


def get_config() -> ConfigDict:
    return long_log("hyformer", LENGTH, examples=160_000, lr=3e-3)


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    own = [noted([{"model.keep": LENGTH // 4} | change], arm=name) for name, change in HYFORMER.items()]
    two_stage = [
        noted([{"architecture": f"{encoder}+{backbone}"} | settings], arm=f"{name} + {text}")
        for text, backbone in BACKBONES.items()
        for name, encoder, settings in (("LONGER", "longer", _LONGER), ("Full", "sequence_transformer", _FULL))
    ]
    unified = noted([{"architecture": "onetrans_lite"}], arm="OneTrans")
    arms = chain(*own, *two_stage, unified)
    return product(by_dense_params([SIZE], training__lr=3e-3), arms, seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    """Differences of AUC x 100 as printed."""
    at = "4e8 parameters, 3e9 rows"
    models = {"HyFormer": 64.89, "OneTrans": 64.83, "Full + RankMixer": 64.81, "LONGER + RankMixer": 64.78}
    one_history = "needs several histories, of which the log has one"
    return [
        *in_a_row("models", models, "table 1", at),
        Ordering("model.Full", "HyFormer", "Full + RankMixer", 0.08, "table 1", at),
        Ordering("model.LONGER", "HyFormer", "LONGER + RankMixer", 0.11, "table 1", at),
        Ordering("backbone.LONGER", "LONGER + RankMixer", "LONGER + Wukong", 0.13, "table 1", at),
        Ordering("backbone.Full", "Full + RankMixer", "Full + Wukong", 0.13, "table 1", at),
        Ordering("encoder.Wukong", "Full + Wukong", "LONGER + Wukong", 0.03, "table 1", at),
        *in_a_row("queries", {"HyFormer": 64.89, "no pools": 64.86, "target only": 64.84}, "table 2", at),
        Ordering("queries.all", "HyFormer", "target only", 0.05, "table 2", at),
        Ordering("histories", "HyFormer", "merged histories", 0.04, "table 2", at, lacking=one_history),
        Ordering("backbone.Transformer", "LONGER + RankMixer", "LONGER + Full Transformer", 0.06, "table 1", at,
                 lacking="a Transformer over field tokens behind an encoder is not in the package"),
    ]  # fmt: skip
