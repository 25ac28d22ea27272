"""MovieLens-100K: DCNv2, DLRM, RankMixer and DIN as a practitioner trains them, two settings each, three seeds.

    recscale data movielens-100k --out DIR
    recscale sweep movielens --data DIR --out runs/movielens

Passes until validation stops improving, then a decay; L2 on the touched embedding rows, under row-wise Adagrad or Adam.
Of the two settings the one with the better validation logloss counts. 80,000 rows carry no exponent: this is a table.

The sweep was not run as a whole: no figure of it has been committed. One seed of DCNv2 under the first setting had test
logloss .5510, AUC .7954, GAUC .7147, under the second with a weight decay of .01 .5533, .7969, .7215; a logistic
regression on user and item has .5584, .7871, .7112, an item bias with the user's own rate .5647, .7797, .6994.
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, product, seeds
from recscale.sweeps.base import power_law

MODELS: list[dict[str, Any]] = [
    {"architecture": "dcnv2", "model.widths": (64, 32), "model.rank": 16},
    {"architecture": "dlrm_mlp", "model.widths": (64, 32)},
    {"architecture": "rankmixer", "model.width": 32, "model.hidden": 32, "model.layers": 1},
    {"architecture": "din+dlrm_mlp", "model.backbone.widths": (64, 32)},
]
SETTINGS: list[dict[str, Any]] = [
    {"training.embedding_optimizer": "rowwise_adagrad", "training.embedding_lr": 0.05, "training.embedding_l2": 3e-5},
    {"training.embedding_optimizer": "rowwise_adam", "training.embedding_lr": 2e-3, "training.embedding_l2": 1e-3},
]


def get_config(architecture: str = "rankmixer") -> ConfigDict:
    config = base_config(architecture, "stored")
    config.training.lr = 1e-3
    return config


def get_sweep() -> Sweep:
    return product(MODELS, SETTINGS, seeds(3))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
