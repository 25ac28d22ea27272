"""MovieLens-100K: DCNv2, DLRM, DIN and RankMixer as a practitioner trains them, with dropout, three seeds.

    recscale data movielens-100k --out DIR
    recscale sweep movielens --data DIR --out runs/movielens

Passes until validation stops improving, then a decay; L2 on embedding rows. 80,000 rows carry no exponent: this is a
table. RecBole 1.2.1 on the same rows, labels and split, three seeds (test logloss, AUC, GAUC): DCNv2 .5523, .7940,
.7179 with dropout and .5665, .7819 without dropout and L2; WideDeep .5558, .7929, .7154. A logistic regression on user
and item has .5584, .7871, .7112, an item bias with the user's own rate .5647, .7797, .6994.

The sweep was not run as a whole: no figure of it has been committed. One seed of DCNv2 at its default size had .5491,
.7969, .7172 (validation .5436), 68 s on one core of an AMD EPYC shared with other work, 2026-11-30, jax 0.10.2:

    recscale train dcnv2 --dataset DIR --out RUN --set training.lr=3e-4 --set training.weight_decay=0 \\
        --set training.embedding_lr=.02 --set training.embedding_l2=1e-3 --set model.hidden_dropout=.2
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, product, seeds
from recscale.sweeps.base import power_law

MODELS: list[dict[str, Any]] = [
    {"architecture": "dcnv2", "model.widths": (128, 64), "model.rank": 32, "model.hidden_dropout": 0.2},
    {"architecture": "dlrm_mlp", "model.widths": (128, 64), "model.hidden_dropout": 0.2},
    {"architecture": "din+dlrm_mlp", "model.backbone.widths": (128, 64), "model.backbone.hidden_dropout": 0.2},
    {"architecture": "rankmixer", "model.width": 32, "model.hidden": 32, "model.layers": 1, "model.dropout": 0.2},
]


def get_config(architecture: str = "rankmixer") -> ConfigDict:
    config = base_config(architecture, "stored")
    training = config.training
    training.lr, training.weight_decay = 5e-4, 0.0
    training.embedding_lr, training.embedding_l2 = 0.02, 1e-3
    return config


def get_sweep() -> Sweep:
    return product(MODELS, seeds(3))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
