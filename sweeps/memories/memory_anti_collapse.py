"""What keeps a memory from collapsing: norms of queries and keys, warm-up, over-parameterised keys; all eight of 2x2x2.

Published are the claims (arXiv 2602.07526) that each raises the share of slots in use and brings their use nearer to
uniform; no numbers. Read `model_layer1/memory/usage` of the metrics beside `.../usage_null`, which perfectly uniform
routing of as many hits would show, and `.../kl` beside `.../kl_null`: usage below 1 with few hits is no collapse.

Two more arms, norms and warm-up on: theta on the left, as the formula is printed (it moves only keys that were read),
and theta on the right with frozen base keys.

    recscale sweep memory_anti_collapse --out runs/memory_anti_collapse

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, axis, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law
from recscale.sweeps.memories.memory_ablations import WORLD


def get_config() -> ConfigDict:
    config = known_truth("msn", "memory", WORLD)
    config.model.update(tokens=8, width=32, hidden=64, memory_slots=4_096, memory_topk=8)
    return config


def get_sweep() -> Sweep:
    norms = [{"model.query_norm": kind, "model.key_norm": kind} for kind in ("layer", "none")]
    # The paper warms up for 50,000 steps of an unknown number; here it is 5 % of the run, about 100 steps.
    warmups = axis("training.warmup_examples", [50_000, 0])
    cube = product(norms, warmups, axis("model.theta", ["right_dxd", "none"]))
    left, frozen = {"model.theta": "left_nxn"}, {"model.theta": "right_dxd", "model.freeze_base_keys": True}
    return product(chain(cube, product(norms[:1], warmups[:1], [left, frozen])), seeds(5))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
