"""Loss against memory slots on a log whose slot exponent is known, and two controls that learn no addresses.

Preset `memory` of the known-truth log, reduced to its memory part: (cluster, item) pairs whose rank k has probability
proportional to k^-1.35 and whose sign has to be remembered one by one. A store of M pairs knows M / 64 ranks here (16
clusters, 4 pairs of a cluster and rank), so what it misses falls as M^-.35; a table with collisions at random has the
same exponent and a larger constant.

    pkm          learned queries and keys, K = 8
    pkm_random   queries and keys as drawn
    pkm_hashed   the same with K = 1: one read at frozen random product keys, which crowd on a part of the slots, so no
                 hash table, whose addresses would be uniform

Nothing but the memory can hold pairs: the input is one code per pair, drawn once and never trained, in one token; the
network around the memory has under 1,000 parameters. Read `memory_usage` and `memory_kl` of the run table beside the
loss: pairs are Zipf-distributed, so rare slots stay empty long before 2^16 of them, whatever the null of uniform hits.

    recscale sweep memory_slots_ladder --out runs/memory_slots_ladder

Measured 2026-11-22 on 1 shared core of an AMD EPYC, jax 0.10.2: 135 runs, in stages (`plan --extend`), about 55 min.
Mean logloss of three seeds at the best rate, from 2^8 slots to 2^16: `pkm` .5063 to .4262, `pkm_random` .5498 to .4296,
`pkm_hashed` .5541 to .4502, where a perfect store has .5251 to .3893. With E free no exponent is granted; with the
exact asymptote given `pkm` falls with .162, a perfect store with .34. Why: notebooks/runs/memories.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_memory_slots, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

# M = n * n, half-octaves of n from 2^8 to 2^16 slots.
SUB_KEYS = [16, 23, 32, 45, 64, 91, 128, 181, 256]

# The preset's pairs in a world where few rows tell a sign. With a logit of +-2 around 0 three looks at a pair tell its
# sign with 95 %; with the preset's +-.77 around -2 about 30 are needed, and 2^16 slots would never be told apart. A
# learner that wastes nothing misses .0148 at 2^16 slots after 2e6 rows and .0093 after 1.6e7, .1451 at 2^8 slots.
WORLD = dict(
    shares=(0.0, 0.0, 1.0, 0.0),
    codes="none",
    clusters=16,
    pair_items=2**12,
    pair_field=True,
    embedding_width=16,
    b=0.0,
    signal=4.0,
)

# One token that is the pair's code, no norm between the read and the logit: what a slot holds is what it says.
BACKBONE = {
    "model.tokenizer": "identity",
    "model.norm": "none",
    "model.width": 16,
    "model.hidden": 16,
    "model.layers": 1,
    "model.memory_heads": 1,
    "model.key_width": 8,
    "model.query_norm": "layer",
    "model.key_norm": "layer",
    "model.score_scale": "inv_sqrt",
    "model.value_init_std": 0.02,
}

# Rates of the dense parameters; values have ten times as much. The lowest is tried at four sizes only.
RATES = [3e-3, 1e-2, 3e-2, 1e-1]
CHECKED = [16, 64, 181, 256]


def get_config() -> ConfigDict:
    return known_truth(
        "pkm",
        "memory",
        WORLD,
        requests=1024,
        examples=2_000_000,
        value_lr=10.0,
        embedding_lr=0.0,
        embedding_init_std=1.0,
    )


def get_sweep() -> Sweep:
    def slots(sub_keys: list[int]) -> Sweep:
        return by_memory_slots([n * n for n in sub_keys])

    learned = chain(
        product(architectures(["pkm"]), axis("training.lr", RATES[1:]), slots(SUB_KEYS)),
        product(architectures(["pkm"]), axis("training.lr", RATES[:1]), slots(CHECKED)),
    )
    one_rate = axis("training.lr", RATES[1:2])
    controls = chain(
        product(architectures(["pkm_hashed"]), one_rate, slots(SUB_KEYS)),
        product(architectures(["pkm_random"]), one_rate, slots(SUB_KEYS[::2])),
    )
    return product(chain(learned, controls), [BACKBONE], seeds(3))


def get_report() -> dict:
    return power_law("memory_slots")
