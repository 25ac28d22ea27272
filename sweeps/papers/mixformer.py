"""The orderings MixFormer published (arXiv 2602.14110), each as two arms of one sweep.

What differs from the paper: the log of `length_ladder` with histories of 64 events instead of 512; 1.6e5 rows; 8e4
dense parameters, equal for every arm, where the paper has 9e6 to 1.3e9; target attention is the encoder of that name;
logloss decides, AUC stands beside it. The paper's percentages are taken for relative ones.

    recscale paper mixformer

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, against_one, as_option, in_a_row
from recscale.sweeps import Sweep, by_dense_params, chain, noted, product, seeds
from recscale.sweeps.sequences.length_ladder import SETTINGS, long_log

LENGTH = 64
SIZE = 8e4

MIXFORMER = {
    "MixFormer": {},
    "no mixing": {"model.query_mixer": "none"},
    "self-attention": {"model.query_mixer": "self_attention"},
    "no query networks": {"model.query_ffn": False},
    "shared history networks": {"model.history_ffn": "shared"},
    "shared output networks": {"model.output_ffn": "shared"},
    "post-norm": {"model.norms": "post"},
}
PAIRS = {
    "STCA + RankMixer": "stca+rankmixer",
    "STCA + DCNv2": "stca+dcnv2",
    "TA + RankMixer": "target_attention+rankmixer",
    "TA + Wukong": "target_attention+wukong",
    "TA + DHEN": "target_attention+dhen_lite",
    "TA + DCNv2": "target_attention+dcnv2",
    "TA + DLRM": "target_attention+dlrm_mlp",
    "OneTrans": "onetrans_lite",
}


def get_config() -> ConfigDict:
    return long_log("mixformer", LENGTH, examples=160_000, lr=3e-3)


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    own = [noted([SETTINGS["mixformer"] | change], arm=name) for name, change in MIXFORMER.items()]
    others = [noted([{"architecture": architecture}], arm=name) for name, architecture in PAIRS.items()]
    return product(by_dense_params([SIZE], training__lr=3e-3), chain(*own, *others), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    at, small, percent = "9e6 to 1.3e9 parameters", "2.8e8 parameters", "% of AUC"
    models = {"MixFormer": 1.28, "STCA + RankMixer": 1.12, "OneTrans": 1.05, "TA + RankMixer": 0.95}
    models |= {"STCA + DCNv2": 0.89, "TA + Wukong": 0.29, "TA + DHEN": 0.18, "TA + DCNv2": 0.13, "TA + DLRM": 0.0}
    losses = {"shared output networks": 0.06, "no query networks": 0.04, "no mixing": 0.03}
    losses |= {"shared history networks": 0.03, "post-norm": 0.01}
    above = {name: round(1.28 - gain, 2) for name, gain in list(models.items())[2:]}
    return [
        *in_a_row("models", models, "table 1", at, percent),
        *against_one("model", "MixFormer", above, "table 1", at, percent),
        *against_one("ablation", "MixFormer", losses, "figure 3", small, percent),
        Ordering("mixer.none", "self-attention", "no mixing", 0.03, "figure 3", small, percent),
        Ordering("parallel", "MixFormer", "STCA beside RankMixer", 0.17, "table 1", at, percent,
                 lacking="an encoder beside a backbone, not in front of it, is not in the package"),
    ]  # fmt: skip
