"""Ablations of RankMixer and TokenMixer-Large at one number of dense parameters, five paired seeds.

RankMixer (arXiv 2507.15551): no mixing < shared FFN < all-share < all-concat < no skip < no LN < self-attention < full;
dense >= ReLU-routed experts trained by two routers >> top-k with balance > top-k > a small dense model, at half, a
quarter and an eighth of the experts.
TokenMixer-Large (arXiv 2602.06563): above RankMixer; no mixing < shared SwiGLU < no residual < per-token FFN < no
inter-layer residual and auxiliary loss < no global token < full; initial scales; norm placement; residual styles;
sparse experts at 1:2 and 1:4 with gate scales, without the shared expert, from one pool.

The largest published gap is .005 AUC and most are below .001, on private data: at this size a tie is a result too.
Every variant has the same total of dense parameters (hidden widths are solved for), except the small dense model.

    recscale sweep mixer_ablations --out runs/mixer_ablations

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

SIZE = 1.2e5

# Tokens and blocks are fixed, so that a variant is not also another kind of shape.
_RANKMIXER = {"model.tokens": 8, "model.layers": 2}
_TOKENMIXER = {"model.tokenizer": "cut", "model.tokens": 8, "model.layers": 4}


def get_config() -> ConfigDict:
    return known_truth("rankmixer", "dense_nested")


def get_sweep() -> Sweep:
    rankmixer = product(architectures(["rankmixer"]), [_RANKMIXER], chain(_rankmixer(), _experts()))
    tokenmixer = product(architectures(["tokenmixer_large"]), _tokenmixer())
    same_size = product(by_dense_params([SIZE]), chain(rankmixer, tokenmixer))
    # What a quarter of the experts would be without the others.
    small = product(by_dense_params([SIZE / 4]), architectures(["rankmixer"]), [_RANKMIXER])
    return product(chain(same_size, small), seeds(5))


def _rankmixer() -> Sweep:
    return [
        {},
        {"model.mixer": "none"},
        {"model.ffn": "shared"},
        {"model.mixer": "all_share"},
        {"model.mixer": "all_concat"},
        {"model.residual": False},
        {"model.norm": "none"},
        {"model.mixer": "self_attention"},
        {"model.norm_place": "pre"},
    ]


def _experts() -> Sweep:
    """Eight experts, 1/2, 1/4 and 1/8 of them active. lam_rate is the calm one, for runs of some thousand steps."""
    shares = axis("model.active_ratio", [0.5, 0.25, 0.125])
    relu = {"model.experts": 8, "model.lam_rate": 1.02, "model.lam0": 1e-4}
    topk = {"model.experts": 8, "model.router": "topk"}
    merges = axis("model.dtsi_merge", ["two_losses", "mean_gates", "train_only", "infer_only"])
    return chain(
        product(shares, [relu]),
        product([relu | {"model.active_ratio": 0.25}], merges),
        product(shares, [topk, topk | {"model.balance_weight": 0.01}]),
    )


def _tokenmixer() -> Sweep:
    base = [_TOKENMIXER]
    changes = [
        {},
        {"model.mixer": "none"},
        {"model.ffn": "shared_swiglu"},
        {"model.residual": False},
        {"model.ffn": "per_token_ffn"},
        {"model.inter_residual_every": 0, "model.aux_weight": 0.0},
        {"model.aux_weight": 0.0},
        {"model.inter_residual_every": 0},
        {"model.aux_mode": "independent"},
        {"model.global_token": False},
        {"model.heads": 4},
        {"model.residual_style": "B"},
        {"model.residual_style": "C", "model.inter_residual_every": 0},
        {"model.sandwich_norm": True},
        *_initial_scales(),
        *_sparse(),
    ]
    return product(base, changes)


def _initial_scales() -> Sweep:
    """Of the [up and gate, down] matrices; [1, 0.01] is the default."""
    scales = [(1.0, 0.1), (1.0, 1.0), (0.01, 1.0), (0.01, 0.01)]
    return [{"model.up_init_scale": up, "model.down_init_scale": down} for up, down in scales]


def _sparse() -> Sweep:
    half = {"model.experts": 8, "model.active": 4}
    quarter = {"model.experts": 8, "model.active": 2, "model.gate_norm": "all"}
    return chain(
        product([half], axis("model.gate_scale", [1.0, 2.0, 4.0])),
        product([quarter], axis("model.gate_scale", [1.0, 2.0, 4.0])),
        [half | {"model.shared_expert": False}, half | {"model.expert_scope": "global"}],
    )


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
