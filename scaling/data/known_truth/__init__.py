"""The known-truth click log: a synthetic log whose irreducible loss, exponents and click probability per row are known.

    config = preset("base", world_seed=1)
    world  = build_world(config)                                  # what decides every click: host arrays, a pytree
    batch  = make_batch(world, log_seed, index, requests, candidates)   # pure, jit-able, shards over R
    schema = make_schema(config)

Label = 1 with probability sigmoid(z + eta): z a deterministic function of the inputs (`config` lists its parts), eta
normal and unobservable. Nothing is stored: request q is a pure function of (world, log_seed, q), whatever the batch
size, the number of devices or the model that reads it. Ids and logits are integer arithmetic, so they are the same bits
everywhere; only the label threshold uses float32.

Truth per row is in `exact`, constants in `card`, metrics of a model in `evaluate`, closed forms in `laws`; `source`
makes a data set of it.
"""

from .batches import FIRST_EVALUATION_REQUEST, make_batch, make_requests, make_schema
from .config import PRESETS, KnownTruthConfig, preset
from .world import World, build_world, popularity

__all__ = [
    "FIRST_EVALUATION_REQUEST", "PRESETS", "KnownTruthConfig", "World", "build_world", "make_batch", "make_requests",
    "make_schema", "popularity", "preset",
]  # fmt: skip
