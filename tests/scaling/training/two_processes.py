"""Three steps of a small RankMixer: imported by a test, or started as one of two processes that share them.

python two_processes.py HOST:PORT PROCESS
"""

import json
import sys

import numpy as np

from recscale.scaling.processes import connect


def three_steps(mesh_text=""):
    """Losses, and every array of the state after them, whichever devices and processes hold it."""
    import jax
    from jax.experimental import multihost_utils

    from recscale.models.inputs import Field, Schema, Task
    from recscale.scaling.bench.fixed_batch import FixedBatch
    from recscale.scaling.parallel import run_mesh
    from recscale.scaling.training import get_config
    from recscale.scaling.training.step import make_trainer

    config = get_config("rankmixer")
    config.model.update({"tokens": 2, "width": 8, "hidden": 8, "layers": 1})
    config.training.eps = 1e-3  # Adam divides by the gradient's size: near 0 that would magnify the order of sums
    schema = Schema((Field("user", "user", 8), Field("item", "candidate", 8)), (), (Task("click"),))
    source = FixedBatch(schema, 16)
    mesh = run_mesh(mesh_text, 16)
    trainer = make_trainer(config, source, [(0, 1e-2)], 1, mesh)
    state, losses = trainer.fresh_state(), []
    batch = trainer.put(jax.device_get(source.batch(0)))
    for _ in range(3):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"][0]))
    leaves = jax.tree.leaves(state)
    if jax.process_count() > 1:
        assert len(mesh.local_devices) == 1 and any(leaf.sharding.spec for leaf in leaves)
        gather = multihost_utils.process_allgather  # compiled for every shape
        leaves = [leaf if leaf.is_fully_replicated else gather(leaf, tiled=True) for leaf in leaves]
    return losses, [np.asarray(leaf).tolist() for leaf in leaves]


if __name__ == "__main__":
    connect(sys.argv[1], 2, int(sys.argv[2]))
    print(json.dumps(three_steps("fsdp=2")))
