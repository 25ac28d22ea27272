"""Ablations of LONGER, one change at a time, and its baselines at one length, five paired seeds.

LONGER (arXiv 2505.04421): merge size with and without InnerTrans, which merged events are queries, and how many.
Baselines: sum pooling, DIN on 50 and on all events, target attention, Transformer, SASRec, HSTU, TWIN, STCA, OneTrans.

Every run is sized to one number of dense parameters (the backbone takes what the encoder leaves), so a change is not
also a change of size. Merged tokens are equally wide whatever is merged, so merging changes the backbone's size by 3 %
at most; InnerTrans without merging, whose block is as wide as a token, by a tenth. FLOPs differ and are in the run
table. The published gaps are .0001 to .002 AUC on 1e9 samples and more: at this scale a tie is the expected result, and
what the null controls (sum pooling; a backbone without history) leave is what the history is worth at all.

    recscale sweep sequence_ablations --out runs/sequence_ablations

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.sequences.length_ladder import long_log

LENGTH = 128
SIZE = 1.5e5
WIDTH = 32  # of a merged token

BASELINES = ["sum_pooling", "din", "target_attention", "sequence_transformer", "sasrec", "hstu", "twin_lite", "stca"]


def get_config() -> ConfigDict:
    return long_log("longer+rankmixer", LENGTH, examples=400_000, lr=1.5e-3)


def get_sweep() -> Sweep:
    return product(chain(_longer(), _baselines()), by_dense_params([SIZE]), seeds(5))


def _longer() -> Sweep:
    changes = [
        {},
        *(_merge(events) for events in (1, 2, 8)),
        *(_merge(events) | {"model.encoder.inner": 0} for events in (2, 4, 8)),
        *axis("model.encoder.query_strategy", ["uniform", "recent_uniform", "learnable"]),
        *axis("model.encoder.query_share", [0.1, 0.2, 0.8, 1.0]),
        *axis("model.encoder.n_global", [(1, 0), (1, 1)]),
        *axis("model.encoder.globals_order", ["user_first"]),
        *axis("model.encoder.seq_sees_user_globals", [True]),
        *axis("model.encoder.layers", [1, 4]),
    ]
    return product(architectures(["longer+rankmixer"]), _BACKBONE, changes)


def _merge(events: int) -> dict:
    return {"model.encoder.merge": events, "model.encoder.event_width": WIDTH // events}


def _baselines() -> Sweep:
    two_stage = product(architectures([f"{name}+rankmixer" for name in BASELINES]), _BACKBONE)
    recent = product(architectures(["din+rankmixer"]), _BACKBONE, axis("model.encoder.recent", [50]))
    alone = product(architectures(["rankmixer"]), axis("model.layers", [1]))
    return chain(two_stage, recent, alone, architectures(["onetrans_lite"]))


# The same kind of backbone behind every encoder.
_BACKBONE = axis("model.backbone.layers", [1])


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
