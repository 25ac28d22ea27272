"""The orderings MSN published (arXiv 2602.07526), each as two arms of one sweep.

What differs from the paper: the log's preset `memory` (pairs to remember, 3e5 rows) instead of a feed's; 4,096 slots
instead of 65,536; active parameters equal for every arm, as in the paper, at a few 1e5 instead of 1.2e8; logloss
decides, AUC stands beside it, where the paper has the mean AUC of a query, and calls its gate's rivals only
"marginally" worse.

    recscale paper msn

Not run yet at this size: no figure of it has been committed.
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.models import freeze_config
from recscale.models.memories.msn import active_hidden, count_params
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.scaling.report.orderings import Ordering, against_one, as_option, in_a_row
from recscale.sweeps import Sweep, axis, by_dense_params, chain, noted, product, seeds
from recscale.sweeps.memories.memory_ablations import WORLD
from recscale.sweeps.memories.memory_ablations import get_config as ablations

SLOTS = 4_096
CHANGES: dict[str, dict[str, Any]] = {
    "MSN": {},
    "SMoE 2 of 6": {"module": "smoe", "experts": 6},
    "SMoE 2 of 4": {"module": "smoe", "experts": 4},
    "FFN": {"module": "ffn"},
    "gated FFN": {"module": "gated_ffn"},
    "MSN and SMoE": {"module": "msn_smoe", "experts": 4},
    "identity gate": {"combine": "gate_identity"},
    "sigmoid gate": {"combine": "gate_sigmoid"},
    "concat": {"combine": "concat"},
    "replace": {"combine": "replace"},
    "8 read": {"memory_topk": 8},
    "16 read": {"memory_topk": 16},
    "one layer": {"memory_count": 1},
    "four layers": {"memory_count": 4},
    "four times the slots": {"memory_slots": 4 * SLOTS},
    "values per token": {"values_per_token": True},
}


def get_config() -> ConfigDict:
    config = ablations()
    config.training.examples = 300_000
    return config


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    schema, base = make_schema(preset("memory", **WORLD)), get_config().model.to_dict()
    counts = count_params(freeze_config("msn", base), schema)
    active = counts.dense - counts.inactive

    def equal(changes: dict[str, Any]) -> dict[str, Any]:
        hidden = active_hidden(schema, freeze_config("msn", base | changes), active)
        return {f"model.{name}": value for name, value in (changes | {"hidden": hidden}).items()}

    own = [noted([equal(changes)], arm=name) for name, changes in CHANGES.items()]
    others = [
        product(by_dense_params([float(active)]), noted([{"architecture": architecture}], arm=name))
        for name, architecture in (("Wukong", "wukong"), ("DLRM-MLP", "dlrm_mlp"))
    ]
    return product(axis("training.lr", [3e-3]), chain(*own, *others), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    at, percent = "1.2e8 active parameters", "% of click QAUC"
    modules = {"MSN": 0.54, "MSN and SMoE": 0.50, "SMoE 2 of 6": 0.43, "SMoE 2 of 4": 0.38, "FFN": 0.35}
    modules |= {"Wukong": 0.25, "DLRM-MLP": 0.0}
    above = {name: round(0.54 - gain, 2) for name, gain in list(modules.items())[2:]}
    gates = {"identity gate": 0.02, "sigmoid gate": 0.05, "concat": None, "replace": None}
    return [
        *in_a_row("modules", modules, "table 1", at, percent),
        *against_one("module", "MSN", above | {"gated FFN": 0.19}, "table 1", at, percent),
        *against_one("gate", "MSN", gates, "table 2 and text", at, percent),
        *against_one("reads", "MSN", {"8 read": 0.05, "16 read": 0.01}, "table 2", at, percent),
        Ordering("reads.16>8", "16 read", "8 read", 0.04, "table 2", at, percent),
        *against_one("layers", "MSN", {"one layer": 0.05, "four layers": 0.10}, "table 2", at, percent),
        Ordering("layers.1>4", "one layer", "four layers", 0.05, "table 2", at, percent),
        Ordering("slots", "four times the slots", "MSN", 0.04, "table 2, one layer", at, percent),
        Ordering("values", "values per token", "MSN", 0.06, "table 2, one layer", at, percent),
    ]
