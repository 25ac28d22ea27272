"""The orderings TokenMixer-Large published (arXiv 2602.06563 v2), each as two arms of one sweep.

What differs from the paper: a log whose law is known (preset `dense`, 3e5 rows) instead of months of a feed's; 4e4
dense parameters, equal for every arm, where the paper has 4e8 to 8e9; eight tokens and four blocks; logloss decides,
AUC stands beside it. Its tables were read second-hand.

    recscale paper tokenmixer_large

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, against_one, as_option, in_a_row
from recscale.sweeps import Sweep, by_dense_params, chain, noted, product, seeds
from recscale.sweeps.base import known_truth

SIZE = 4e4
_SHAPE = {"model.tokenizer": "cut", "model.tokens": 8, "model.layers": 4}
_HALF = {"model.experts": 8, "model.active": 4, "model.gate_scale": 2.0}
_QUARTER = {"model.experts": 8, "model.active": 2, "model.gate_scale": 4.0, "model.gate_norm": "all"}

VARIANTS = {
    "TokenMixer-Large": {},
    # Table 5.
    "no mixing": {"model.mixer": "none"},
    "shared SwiGLU": {"model.ffn": "shared_swiglu"},
    "no residual": {"model.residual": False},
    "per-token FFN": {"model.ffn": "per_token_ffn"},
    "no inter-residual, no auxiliary loss": {"model.inter_residual_every": 0, "model.aux_weight": 0.0},
    "no global token": {"model.global_token": False},
    # Table 14, [up, gate, down].
    "init 1, 1, .1": {"model.up_init_scale": 1.0, "model.down_init_scale": 0.1},
    "init 1, 1, 1": {"model.up_init_scale": 1.0, "model.down_init_scale": 1.0},
    "init .01, .01, 1": {"model.up_init_scale": 0.01, "model.down_init_scale": 1.0},
    "init .01, .01, .01": {"model.up_init_scale": 0.01, "model.down_init_scale": 0.01},
    # Appendix, normalisation.
    "sandwich norm": {"model.sandwich_norm": True},
    # Tables 6 and 12.
    "experts 1:2": _HALF,
    "experts 1:4": _QUARTER,
    "experts 1:2, no shared expert": _HALF | {"model.shared_expert": False},
    "experts 1:2, gate scale 1": _HALF | {"model.gate_scale": 1.0},
    "experts 1:2, init 1, 1, 1": _HALF | {"model.down_init_scale": 1.0},
    "experts 1:2, one pool": _HALF | {"model.expert_scope": "global"},
}
# Table 2.
BASELINES = {
    "RankMixer": {"architecture": "rankmixer", "model.tokens": 8, "model.layers": 2},
    "Wukong": {"architecture": "wukong"},
    "AutoInt": {"architecture": "autoint"},
    "DHEN": {"architecture": "dhen_lite"},
    "DCNv2": {"architecture": "dcnv2"},
    "HiFormer": {"architecture": "hiformer"},
    "DLRM-MLP": {"architecture": "dlrm_mlp"},
}


def get_config() -> ConfigDict:
    return known_truth("tokenmixer_large", "dense", requests=256, examples=300_000, lr=1e-2)


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    variants = [noted([_SHAPE | change], arm=name) for name, change in VARIANTS.items()]
    baselines = [noted([settings], arm=name) for name, settings in BASELINES.items()]
    return product(by_dense_params([SIZE], training__lr=1e-2), chain(*variants, *baselines), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    large, own, sparse = "4.6e9 parameters", "5e8 parameters", "4.6e9 parameters, 1:2"
    gains = {"TokenMixer-Large": 0.94, "RankMixer": 0.84, "Wukong": 0.76, "AutoInt": 0.75, "DHEN": 0.63}
    gains |= {"DCNv2": 0.49, "HiFormer": 0.44, "DLRM-MLP": 0.0}
    above = {name: round(gains["TokenMixer-Large"] - gain, 2) for name, gain in list(gains.items())[2:]}
    losses = {"no global token": 0.02, "no inter-residual, no auxiliary loss": 0.04, "per-token FFN": 0.10}
    losses |= {"no residual": 0.15, "shared SwiGLU": 0.21, "no mixing": 0.27}
    inits = {"TokenMixer-Large": 0.03, "init 1, 1, .1": 0.02, "init 1, 1, 1": 0.0, "init .01, .01, 1": -0.01}
    inits |= {"init .01, .01, .01": -0.10}
    experts = {"experts 1:2, no shared expert": 0.02, "experts 1:2, gate scale 1": 0.03}
    experts |= {"experts 1:2, init 1, 1, 1": 0.03, "experts 1:2, one pool": 0.10}
    missing = {
        "Group Transformer": ("table 2", 0.13, "its projections per token are not in the package"),
        "FAT": ("table 2", 0.12, "its architecture is not in the package"),
        "half coverage": ("table 11", 0.08, "mixed tokens that cover half of the tokens are not in the package"),
    }
    return [
        *in_a_row("models", gains, "table 2", own),
        *against_one("model", "TokenMixer-Large", above, "table 2", own),
        *against_one("ablation", "TokenMixer-Large", losses, "table 5", large),
        *in_a_row("neighbours", {name: -loss for name, loss in losses.items()}, "table 5", large),
        *in_a_row("init", inits, "table 14", "size not printed"),
        Ordering("norm.sandwich", "TokenMixer-Large", "sandwich norm", 0.03, "appendix", "size not printed"),
        Ordering("experts.1:4", "TokenMixer-Large", "experts 1:4", 0.03, "table 12", large),
        *against_one("experts", "experts 1:2", experts, "table 6", sparse),
        *[
            Ordering(f"lacking.{name}", "TokenMixer-Large", name, gap, source, own, lacking=why)
            for name, (source, gap, why) in missing.items()
        ],
    ]
