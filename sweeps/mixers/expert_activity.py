"""Which experts are open, per layer and token, at one of eight: RankMixer's ReLU routing, top-k, TokenMixer-Large.

Figure 4 of RankMixer (arXiv 2507.15551 v3) shows how much the share of open experts differs between tokens, figure 7 of
TokenMixer-Large (arXiv 2602.06563 v2) how even their load is. Here on a log whose law is known (preset `dense`: eight
fields of 31 signs), eight tokens of width 16, two blocks, 3e4 dense parameters and 7e4, 3e5 rows, five paired seeds;
rates bracketed by three trials on another stream, five where the best of three was at an edge (ReLU routing).

    RankMixer, two routers       ReLU routing, dense training and sparse inference (DTSI), budget 1/8 of eight experts
    RankMixer, one router        the same without the train router
    RankMixer, top-k             one of eight by softmax; and with the balance loss
    TokenMixer-Large             one shared and one of 15 routed experts of 16; and with the balance loss

    recscale sweep expert_activity --out runs/expert_activity
    recscale collect runs/expert_activity --experts expert_activity.parquet

Run 2026-11-30, all of it, about 6 min. What it says: `notebooks/runs/mixers.md`.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, as_option
from recscale.sweeps import Sweep, chain, noted, product, seeds
from recscale.sweeps.base import known_truth

_SHAPE = {"model.tokens": 8, "model.width": 16, "model.layers": 2}
_RANKMIXER = {"architecture": "rankmixer", "model.hidden": 40, "model.experts": 8, "model.active_ratio": 0.125}
# The calm rate of the penalty, for a run of some thousand steps.
_RELU = _RANKMIXER | {"model.lam_rate": 1.02, "model.lam0": 1e-4}
_TOPK = _RANKMIXER | {"model.router": "topk"}
_LARGE = {"architecture": "tokenmixer_large", "model.hidden": 32, "model.tokenizer": "cut"}
_LARGE |= {"model.experts": 16, "model.active": 2, "model.gate_norm": "all"}
_BALANCE = {"model.balance_weight": 0.01}

ARMS = {
    "RankMixer, two routers": _RELU,
    "RankMixer, one router": _RELU | {"model.dtsi_merge": "infer_only"},
    "RankMixer, top-k": _TOPK,
    "RankMixer, top-k, balance loss": _TOPK | _BALANCE,
    "TokenMixer-Large": _LARGE,
    "TokenMixer-Large, balance loss": _LARGE | _BALANCE,
}


def get_config() -> ConfigDict:
    return known_truth("rankmixer", "dense", requests=256, examples=300_000, lr=1e-2)


def get_rates() -> dict:
    return {"trials": 3}


def get_sweep() -> Sweep:
    arms = chain(*(noted([settings], arm=name) for name, settings in ARMS.items()))
    return product(arms, [_SHAPE | {"training.lr": 1e-2}], seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    """Whether a balance loss costs or gains anything, and two routers over one, or over top-k that is balanced. Of the
    paper of RankMixer its figure 3 has what is printed at 1/8, digitised."""
    at, figure = "not printed", ("figure 3, digitised", "1e9 parameters, private feed")
    return [
        Ordering("balance", "RankMixer, top-k, balance loss", "RankMixer, top-k", 0.05, *figure),
        Ordering("balance.large", "TokenMixer-Large, balance loss", "TokenMixer-Large", None, at, at),
        Ordering("relu", "RankMixer, two routers", "RankMixer, top-k, balance loss", 0.23, *figure),
        Ordering("routers", "RankMixer, two routers", "RankMixer, one router", None, at, at),
    ]
