"""MSN's published ablations (arXiv 2602.07526) at equal active parameters, one change at a time, five paired seeds.

    modules     msn_ffn > smoe 2 of 6 > smoe 2 of 4 > ffn = gated_ffn > Wukong > MLP        +.54 .43 .38 .35 .35 .25 0 %
    both        a memory in front of experts adds nothing to it                             .50 against .54
    gate        tanh > identity > sigmoid of what was read; concat and replace marginally below
    slots read  8 < 16 < 32 = 64                                                            -.05, -.01, 0, 0
    slots       four times as many > as many                                                +.04
    values      a table per token > one for all                                             +.06
    layers      2 memories > 1 > 4                                                          +.05, 0, -.05

Hidden widths are solved for, so that every variant has the active parameters of the base, everything but values; for
the number of memories once more at the base's own hidden width, since equal active parameters make the rest narrower
the more layers have a memory. The paper's percentages are of click QAUC on private data; at this size most of them
cannot be told from 0. Norms, warm-up and theta have a sweep of their own, `memory_anti_collapse`.

    recscale sweep memory_ablations --out runs/memory_ablations

Not run yet at this size: no figure of it has been committed.
"""

from typing import Any

from ml_collections import ConfigDict

from recscale.models import freeze_config
from recscale.models.memories.msn import active_hidden, count_params
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.sweeps import Sweep, architectures, by_dense_params, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

# Few clusters: pairs are what the memory has to hold, and an embedding of the item holds a share of them by itself.
WORLD = {"clusters": 16}

_BASE = dict(tokens=8, width=32, hidden=128, layers=4, memory_count=2, memory_slots=4_096, memory_topk=32)


def get_config() -> ConfigDict:
    config = known_truth("msn", "memory", WORLD)
    config.model.update(_BASE)
    return config


def get_sweep() -> Sweep:
    schema = make_schema(preset("memory", **WORLD))
    base = count_params(freeze_config("msn", _BASE), schema)
    active = base.dense - base.inactive

    def equal(**changes: Any) -> dict[str, Any]:
        hidden = active_hidden(schema, freeze_config("msn", _BASE | changes), active)
        return {f"model.{name}": value for name, value in (changes | {"hidden": hidden}).items()}

    msn = [equal(**changes) for changes in _changes()]
    fixed = [{"model.memory_count": count} for count in (1, 4)]
    others = product(architectures(["wukong", "dlrm_mlp"]), by_dense_params([float(active)]))
    return product(chain(product(architectures(["msn"]), chain(msn, fixed)), others), seeds(5))


def _changes() -> list[dict[str, Any]]:
    """The base first, then what differs from it."""
    modules = [dict(module="ffn"), dict(module="gated_ffn"), dict(module="smoe", experts=4)]
    modules += [dict(module="smoe", experts=6), dict(module="msn_smoe", experts=4)]
    combines = ("gate_identity", "gate_sigmoid", "gate_one_plus_tanh", "concat", "replace")
    reads = [dict(memory_topk=topk) for topk in (8, 16, 64)]
    sizes = [dict(memory_slots=4 * _BASE["memory_slots"]), dict(values_per_token=True)]
    layers = [dict(memory_count=count) for count in (1, 4)]
    return [{}, *modules, *(dict(combine=combine) for combine in combines), *reads, *sizes, *layers]


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
