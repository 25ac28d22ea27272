"""The orderings UG-Sep published (arXiv 2602.10455), each as two arms of one sweep.

Unseparated TokenMixer-Large against the separated one, by the user's share of twelve tokens, with and without
compensation, each pair with the same tokens; and the control in which neither side sees the other before the mean.

What differs from the paper: a log whose law is known (preset `dense`, 3e5 rows) instead of a feed's; 6e4 dense
parameters, equal for every arm (what UG-Sep drops of the matrices is given back); logloss decides, AUC stands beside
it. The paper calls a loss of .01 to .03 neutral. Its tables were read second-hand; gains in speed are benchmarks, no
arms.

    recscale paper ug_sep

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.report.orderings import Ordering, as_option
from recscale.sweeps import Sweep, by_dense_params, chain, noted, product, seeds
from recscale.sweeps.base import known_truth

SIZE = 6e4
TOKENS = 12
USER_TOKENS = {"1:2": 4, "1:1": 6, "2:1": 8, "3:1": 9, "5:1": 10}

_SHAPE = {
    "model.tokenizer": "cut",
    "model.cut_align": "exact",
    "model.tokens": TOKENS,
    "model.layers": 4,
    "model.global_token": False,
}
_SEPARATED = {"architecture": "ug_tokenmixer_large"} | _SHAPE


def get_config() -> ConfigDict:
    return known_truth("tokenmixer_large", "dense", requests=256, examples=300_000, lr=1e-2)


def get_rates() -> dict:
    return {"trials": 5}


def get_sweep() -> Sweep:
    arms = []
    for ratio, count in USER_TOKENS.items():
        user = {"model.user_tokens": count}
        arms.append(noted([_SHAPE | user], arm=f"base {ratio}"))
        if ratio != "2:1":
            arms.append(noted([_SEPARATED | user | {"model.compensation": "per_token"}], arm=f"UG-Sep {ratio}"))
        if ratio != "5:1":
            arms.append(noted([_SEPARATED | user | {"model.compensation": "none"}], arm=f"no compensation {ratio}"))
    towers = {"model.user_tokens": 6, "model.compensation": "none", "model.user_to_candidate": False}
    arms.append(noted([_SEPARATED | towers], arm="two towers"))
    return product(by_dense_params([SIZE], training__lr=1e-2), chain(*arms), seeds(5))


def get_report() -> dict:
    return {"orderings": as_option(orderings())}


def orderings() -> list[Ordering]:
    at = "size not printed, private feed"
    lost = {"1:1": 0.01, "2:1": 0.04, "3:1": 0.06}
    return [
        Ordering("table 1.1:2", "UG-Sep 1:2", "base 1:2", 0.002, "table 1", at),
        Ordering("table 1.1:1", "base 1:1", "UG-Sep 1:1", 0.004, "table 1", at),
        Ordering("table 3.3:1", "base 3:1", "UG-Sep 3:1", 0.02, "table 3", at),
        Ordering("table 3.5:1", "base 5:1", "UG-Sep 5:1", 0.04, "table 3", at),
        *[Ordering(f"bare.{r}", f"base {r}", f"no compensation {r}", gap, "table 3", at) for r, gap in lost.items()],
        Ordering("compensation.3:1", "UG-Sep 3:1", "no compensation 3:1", 0.04, "table 3", at),
        Ordering("compensation.1:1", "UG-Sep 1:1", "no compensation 1:1", 0.006, "tables 1 and 3", at),
        Ordering("one way.1:1", "no compensation 1:1", "two towers", None, "section 3, implied", at),
        Ordering("share.1:2>2:1", "no compensation 1:2", "no compensation 2:1", 0.04, "table 3", at),
    ]
