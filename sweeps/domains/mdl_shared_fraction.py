"""MDL beside shared-bottom, private heads and MMoE, by the share of the signal that three domains have in common.

Preset `dense_nested` of the known-truth log with three domains and two labels, 512 terms each; a share rho of its
cross-feature signal is the same in all domains, the rest is each domain's own, with the same variance. Expected: a
shared bottom is best at rho = 1, private heads at rho = 0 with data enough, and MDL's excess loss stays below both in
between. The run table's columns recovered_N_shared and recovered_N_domain0 ... say which part of either a model found,
recovered_N_common and recovered_N_own the same of the labels.

Equal dense parameters, five paired seeds, three rates for everyone.

    recscale sweep mdl_shared_fraction --out runs/mdl_shared_fraction

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

SIZE = 4e4
SHARED = (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = (1.5e-3, 3e-3, 6e-3)


def get_config() -> ConfigDict:
    world = dict(domains=3, tasks=2, domain_shared=0.5, quanta=512, code_bits=12)
    return known_truth("mdl", "dense_nested", world, examples=2_000_000)


def get_sweep() -> Sweep:
    heads = product(architectures(["domain_heads"]), axis("model.head", ["shared", "private", "mmoe"]))
    models = chain(architectures(["mdl"]), heads)
    shared, shape = axis("data.overrides.domain_shared", SHARED), [{"model.tokens": 8, "model.layers": 2}]
    return product(by_dense_params([SIZE]), models, shape, shared, axis("training.lr", RATES), seeds(5))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
