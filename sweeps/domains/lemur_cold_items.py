"""LEMUR on items that few rows show: encoders trained with the ranker, in two stages, or none.

Known-truth log, preset `content` with one large signal: four signs of an item against those of the eight newest events,
the newest with half of it. Content says the signs, one in twenty wrong; an id has to be learnt. Items are drawn from
8,192 by a Zipf law; "cold" is the tenth of the rows whose items are least popular (`excess_logloss_rare`): 4,160 items,
each shown five times in training as a candidate. Labels are click probabilities.

    joint         ranking loss and SQDC train the encoders
    two stages    SQDC alone does, and the ranker reads what it makes (both at once: ranking_gradient=False)
    none          sum pooling and RankMixer on ids

Published, QAUC in percent over none, private data: joint +.81, two stages +.12. Equal dense parameters, five paired
seeds, every arm at the best of three rates found on another stream.

    recscale sweep lemur_cold_items --out runs/lemur_cold_items

Measured 2026-11-30 on one shared core of an AMD EPYC, jax 0.10.2, 15 runs and 9 of the search: joint and two stages are
above none, on cold items by .036 and .032 nats and on all by more; between the two the sign is open.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, as_option
from recscale.sweeps import Sweep, chain, noted, product, seeds
from recscale.sweeps.base import known_truth

SIZE = 2.8e4
LEMUR = {
    "architecture": "lemur",
    "model.layers": 1,
    "model.tokens": 8,
    "model.width": 24,
    "model.hidden": 24,
    "model.content_width": 16,
    "model.encoder_heads": 2,
    "model.query_layers": 1,
    "model.document_layers": 1,
    "model.reader_layers": 1,
    "model.sample_order": "missing_first",
    "training.lr": 4e-3,
}
NONE = {"model.backbone.layers": 1, "model.backbone.tokens": 8}
# Each with the centre of its search for a rate.
ARMS = {
    "joint": LEMUR,
    "two stages": LEMUR | {"model.ranking_gradient": False},
    "none": {"architecture": "sum_pooling+rankmixer", "size.dense_params": SIZE, "training.lr": 2e-3} | NONE,
}


def get_config() -> ConfigDict:
    return content_log(examples=200_000, lr=4e-3)


def content_log(blocks: int = 256, **training: float | str) -> ConfigDict:
    """LEMUR on a content log of 32 `blocks` items."""
    signs = dict(code_width=4, content_tokens=4, content_bits=2, query_tokens=4)
    world = dict(b=0.0, signal=4.0, shares=(0.0, 0.9, 0.0, 0.1), lam=1.0, history_max=8, soft_labels=True) | signs
    config = known_truth("lemur", "content", world | {"blocks": blocks}, requests=256, **training)
    config.data.holdout_rows = 16_384
    return config


def get_rates() -> dict:
    return {"trials": 3}


def get_sweep() -> Sweep:
    arms = chain(*(noted([settings], arm=name) for name, settings in ARMS.items()))
    return product(arms, seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    """In percent of QAUC as printed; on cold items and on all."""
    gaps = {("joint", "two stages"): 0.69, ("joint", "none"): 0.81, ("two stages", "none"): 0.12}
    metrics = {"cold": "excess_logloss_rare", "all": "logloss"}
    return [
        Ordering(f"{items}.{better}>{worse}", better, worse, gap, "table 2", "private", "% of QAUC", metric=metric)
        for items, metric in metrics.items()
        for (better, worse), gap in gaps.items()
    ]
