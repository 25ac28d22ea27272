"""MovieLens-100K: DCNv2, DLRM, DIN and RankMixer as a practitioner trains them, with dropout, three seeds.

    recscale data movielens-100k --out DIR
    recscale sweep movielens --data DIR --out runs/movielens

Passes until validation stops improving, then a decay, with the defaults of finite logs. 80,000 rows carry no exponent:
this is a table. RecBole 1.2.1 on the same rows, labels and split, three seeds (test logloss, AUC, GAUC): DCNv2 .5523,
.7940, .7179 with dropout and .5665, .7819 without dropout and L2; WideDeep .5558, .7929, .7154.

Measured 2026-11-30 on one core of an AMD EPYC shared with other work, jax 0.10.2, three seeds: DCNv2 .5443, .7990,
.7253 in 242 s, DLRM .5435, .8003, .7243 in 226 s, RankMixer .5480, .7962, .7181 in 240 s, DIN .5429, .7997, .7028 in
749 s. Narrower ones were worse on validation: DCNv2 of 128 and 64 with rank 32 .5453 against .5351, DLRM of 128 and 64
.5572 against .5355, RankMixer of one block and width 32 .5430 against .5392.
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, product, seeds
from recscale.sweeps.base import power_law

MODELS: list[dict[str, Any]] = [
    {"architecture": "dcnv2", "model.hidden_dropout": 0.2},
    {"architecture": "dlrm_mlp", "model.hidden_dropout": 0.2},
    {"architecture": "din+dlrm_mlp", "model.backbone.hidden_dropout": 0.2},
    {"architecture": "rankmixer", "model.width": 64, "model.hidden": 128, "model.layers": 2, "model.dropout": 0.2},
]


def get_config(architecture: str = "rankmixer") -> ConfigDict:
    return base_config(architecture, "stored")


def get_sweep() -> Sweep:
    return product(MODELS, seeds(3))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
