"""The orderings RankMixer published (arXiv 2507.15551 v3), each as two arms of one sweep.

What differs from the paper: a log whose law is known (preset `dense`, 3e5 rows) instead of two weeks of a feed's; 3e4
dense parameters instead of 1e8, equal for every arm but the small dense model, where the paper's baselines have 9e6 to
1.2e8 and its ablations keep the widths; the logloss, whose differences are resolved earlier, decides, and AUC stands
beside it. Experts: eight a token, with lam_rate 1.02 and lam0 1e-4, for runs of some thousand steps.

    recscale paper rankmixer

What its runs say of each: `notebooks/runs/papers.md`.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, against_one, as_option, in_a_row
from recscale.sweeps import Sweep, by_dense_params, chain, noted, product, seeds
from recscale.sweeps.base import known_truth

SIZE = 3e4
_SHAPE = {"model.tokens": 8, "model.layers": 2}

# Table 2 and 3: variants of the block.
BLOCKS = {
    "rankmixer": {},
    "no mixing": {"model.mixer": "none"},
    "shared FFN": {"model.ffn": "shared"},
    "All-Share": {"model.mixer": "all_share"},
    "All-Concat": {"model.mixer": "all_concat"},
    "no skip": {"model.residual": False},
    "no LN": {"model.norm": "none"},
    "self-attention": {"model.mixer": "self_attention"},
}
# Table 1.
BASELINES = {
    "HiFormer": "hiformer",
    "Wukong": "wukong",
    "DHEN": "dhen_lite",
    "AutoInt": "autoint",
    "DCNv2": "dcnv2",
    "DLRM-MLP": "dlrm_mlp",
    "MoE": "mmoe",
}
SHARES = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
_RELU = {"model.experts": 8, "model.lam_rate": 1.02, "model.lam0": 1e-4}
_TOPK = {"model.experts": 8, "model.router": "topk"}


def get_config() -> ConfigDict:
    return known_truth("rankmixer", "dense", requests=256, examples=300_000, lr=5e-3)


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    blocks = [_arm(name, _SHAPE | change) for name, change in {**BLOCKS, **experts()}.items()]
    baselines = [_arm(name, {"architecture": architecture}) for name, architecture in BASELINES.items()]
    same_size = product(by_dense_params([SIZE], training__lr=5e-3), chain(*blocks, *baselines))
    small = product(by_dense_params([SIZE / 8], training__lr=1e-2), _arm("small dense", _SHAPE))
    return product(chain(same_size, small), seeds(5))


def experts() -> dict[str, dict]:
    """Eight experts a token, a share of them active, routed by ReLU (two routers) or by top-k."""
    arms = {}
    for text, share in SHARES.items():
        active = {"model.active_ratio": share}
        arms[f"DTSI {text}"] = _RELU | active
        arms[f"balanced top-k {text}"] = _TOPK | active | {"model.balance_weight": 0.01}
        arms[f"top-k {text}"] = _TOPK | active
    return arms


def _arm(name: str, settings: dict) -> Sweep:
    return noted([settings], arm=name)


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    own, feed = "1e8 parameters, private feed", "9e6 to 1.2e8 parameters, private feed"
    losses = {"self-attention": 0.03, "no LN": 0.05, "no skip": 0.07, "All-Concat": 0.18, "All-Share": 0.25}
    losses |= {"shared FFN": 0.31, "no mixing": 0.50}
    gains = {"rankmixer": 0.64, "HiFormer": 0.48, "Wukong": 0.29, "DHEN": 0.18, "DLRM-MLP": 0.15, "DCNv2": 0.13}
    gains |= {"AutoInt": 0.10, "MoE": 0.09}
    above = {name: round(gains["rankmixer"] - gain, 2) for name, gain in gains.items() if name != "rankmixer"}
    ranked = in_a_row("neighbours", {name: -loss for name, loss in losses.items()}, "tables 2 and 3", own)
    return [
        *against_one("ablation", "rankmixer", losses, "tables 2 and 3", own),
        *ranked,
        *against_one("baseline", "rankmixer", above, "table 1", feed),
        *in_a_row("baselines", {name: gains[name] for name in gains if name != "rankmixer"}, "table 1", feed),
        *_sparse(),
        Ordering(
            "baseline.RDCN", "rankmixer", "RDCN", 0.55, "table 1", feed, lacking="RDCN is not described in the paper"
        ),
    ]


def _sparse() -> list[Ordering]:
    """AUC of 1e9 parameters at full and smaller active shares, digitised from figure 3."""
    at = "1e9 parameters, private feed"
    dense, small = 86.45, 86.14
    auc = {
        "DTSI": (86.45, 86.44, 86.43),
        "balanced top-k": (86.36, 86.23, 86.20),
        "top-k": (86.34, 86.19, 86.15),
    }
    found = []
    for number, share in enumerate(SHARES):
        levels = {"rankmixer": dense} | {f"{name} {share}": values[number] for name, values in auc.items()}
        found += in_a_row(f"sparse {share}", levels | {"small dense": small}, "figure 3, digitised", at)
    return [ordering for ordering in found if ordering.published]  # at 1/2 two of them are equal
