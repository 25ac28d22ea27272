"""What MDL loses without each of its parts, at equal size, and the controls its paper lacks.

What the paper printed of its five ablations is judged by `recscale paper mdl`; three are of the size of seed noise, and
one of their cells reverses. Controls: the same initialisers in front of the towers alone (reads="none"), of one
attention (reads="last") or of every block, since "no task tokens" also removes their networks; token_state="split", in
which what a token starts with can only ask; one set of keys for both readers; the block as printed. Half of the
cross-feature signal is common to the three domains.

Equal dense parameters, five paired seeds, three rates for everyone.

    recscale sweep mdl_ablations --out runs/mdl_ablations

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, axis, by_dense_params, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.domains import mdl_shared_fraction as study

SIZE = 4e4
RATES = (5e-3, 1e-2, 2e-2)

VARIANTS = (
    {},
    {"scenario_tokens": "none"},
    {"task_tokens": "none"},
    {"global_scenario": False},
    {"scenario_tokens": "plain"},
    {"task_tokens": "plain"},
    {"reads": "last"},
    {"reads": "none"},
    {"token_state": "split"},
    {"share_kv": True},
    {"ffn_residual": False},
)


def get_config() -> ConfigDict:
    config = study.get_config()
    config.training.examples = 2_000_000
    return config


def get_sweep() -> Sweep:
    fixed = {"model.tokens": 8, "model.layers": 2}
    variants = [fixed | {f"model.{flag}": value for flag, value in variant.items()} for variant in VARIANTS]
    return product(by_dense_params([SIZE]), variants, axis("training.lr", RATES), seeds(5))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
