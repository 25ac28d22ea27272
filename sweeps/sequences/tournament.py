"""Eight ways to read a history of 16 to 512 events, in two protocols, five paired seeds: loss, and when a run starts.

The log of `length_ladder`. In "equal FLOPs" one RankMixer stands behind encoders of about equal training FLOPs at 128
events (with 8 candidates a request; the run table has them at every length), and HyFormer and MixFormer, which have no
encoder, spend as much in all. In "equal total" all have 4e4 dense parameters, and every share of them is tried for an
encoder. Rates are the best of three on another stream of the log, one seed each, and of two or four more beyond an edge
where the best lay there, at every length. LONGER is as `longer_start` recommends. `examples_to_start` says after how
many rows a run was first 2 % below the base rate's logloss, null where it never was.

    recscale sweep tournament --out runs/tournament --no-report

Readers are compared at one length at a time. There is no figure along it: position tables grow with the length, by more
than a tenth of a small encoder.

The whole study is both protocols with all of `NAMES` at every length of `length_ladder`; `STAGES` lists what was run:
with equal FLOPs all eight at 16 to 256 events (where the search began with five rates for STCA at 256) and `STARTED` at
512, and LONGER as `PUBLISHED` at 64; with equal total all at 64, every encoder at the best of all `SHARES`, and five at
16 with the same shares. Add to it, then `recscale sweep tournament --out runs/tournament --extend`. The runs' note:
`notebooks/runs/sequences.md`.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, by_dense_params, by_history_length, chain, noted, product, seeds
from recscale.sweeps.sequences import length_ladder, longer_start

SIZE = 4e4
SHARES = (0.2, 0.4, 0.6, 0.8)  # of an encoder in "equal total"; LONGER's event widths give .35 and .85

_MIXFORMER = length_ladder.SETTINGS["mixformer"]
# Name -> what has equal FLOPs.
NAMES = {
    "longer+rankmixer": longer_start.RECOMMENDED,
    "sasrec+rankmixer": {"model.encoder.width": 16},
    "din+rankmixer": {"model.encoder.hidden": (26, 13)},
    "hyformer": {"model.layers": 1, "model.tokens": 8, "model.width": 16, "model.hidden": 24},
    "mixformer": _MIXFORMER | {"model.tokens": 4, "model.width": 16, "model.hidden": 32},
    "stca+rankmixer": {"model.encoder.width": 16},
    "hstu+rankmixer": {"model.encoder.width": 14},
    "target_attention+rankmixer": {"model.encoder.width": 112},
}
# LONGER by the paper's share of queries, with what this package assumes where the paper is silent, and by the merge of
# four events to a token of `NAMES` or of eight to an equally wide one; both within 30 % of the training FLOPs there.
PUBLISHED = {
    "published LONGER, merge 4": length_ladder.SETTINGS["longer+rankmixer"],
    "published LONGER, merge 8": length_ladder.SETTINGS["longer+rankmixer"]
    | {"model.encoder.merge": 8, "model.encoder.event_width": 4},
}
# The middle of the searches at 64 events, which came first, and of those at other lengths: what was best at 64, or
# where that was not best at 256 events either, a rate between them at 128 and that of 256 at 512.
RATE, FIRST = 2e-3, 64
BEST = {
    "longer+rankmixer": 2e-3,
    "sasrec+rankmixer": 4e-3,
    "din+rankmixer": 1.6e-2,
    "hyformer": 4e-3,
    "mixformer": 8e-3,
    "stca+rankmixer": 2e-3,
    "hstu+rankmixer": 4e-3,
    "target_attention+rankmixer": 4e-3,
}
LOWERED = ("sasrec+rankmixer", "hyformer", "mixformer", "stca+rankmixer", "hstu+rankmixer")
LOWER: dict[int, dict[str, float]] = {
    128: dict(zip(LOWERED, (2e-3, 2e-3, 4e-3, 1e-3, 2e-3), strict=True)),
    512: dict(zip(LOWERED, (2e-3, 1e-3, 2e-3, 5e-4, 1e-3), strict=True)),
}
# The share of each encoder that was best in the search of "equal total"; one that is not here is tried at all `SHARES`.
SHARE = {
    "longer+rankmixer": 0.2,
    "sasrec+rankmixer": 0.4,
    "din+rankmixer": 0.2,
    "stca+rankmixer": 0.8,
    "hstu+rankmixer": 0.4,
    "target_attention+rankmixer": 0.6,
}
# Those whose seeds still start at 256 events.
STARTED = ["longer+rankmixer", "din+rankmixer", "target_attention+rankmixer", "sasrec+rankmixer"]
# Protocol -> length -> names.
STAGES = {
    "equal FLOPs": {length: [*NAMES] for length in (16, 32, 128, 256)} | {64: [*NAMES, *PUBLISHED], 512: STARTED},
    "equal total": {
        16: ["longer+rankmixer", "din+rankmixer", "sasrec+rankmixer", "hyformer", "hstu+rankmixer"],
        64: [*NAMES],
    },
}


def get_config() -> ConfigDict:
    return longer_start.get_config()


def get_rates() -> dict:
    return {"trials": 3}


def get_sweep() -> Sweep:
    return chain(*(
        product(
            model(protocol, name, [SHARE[name]] if name in SHARE else SHARES),
            by_history_length([length], training__lr=centre(protocol, name, length)),
            seeds(5),
        )
        for protocol, stages in STAGES.items()
        for length, names in stages.items()
        for name in names
    ))  # fmt: skip


def centre(protocol: str, name: str, length: int) -> float:
    """The middle of the search for a rate: one for all at first, then what was best there or nearby."""
    if protocol == "equal FLOPs" and length == FIRST:
        return RATE
    return LOWER.get(length, {}).get(name, BEST[name])


def model(protocol: str, name: str, shares: Sequence[float] = SHARES) -> Sweep:
    """One architecture in one of the protocols, an encoder of "equal total" at each of the shares."""
    if name in PUBLISHED:
        return noted([{"architecture": "longer+rankmixer"} | longer_start.BEHIND | PUBLISHED[name]], arm=name)
    if protocol == "equal FLOPs":
        return noted([{"architecture": name} | (longer_start.BEHIND if "+" in name else {}) | NAMES[name]], arm=name)
    if "+" not in name:
        return noted(by_dense_params([SIZE], architecture=name, **length_ladder.SETTINGS[name]), arm=f"{name}, total")
    own = {"model.backbone.layers": 1}
    if name == "longer+rankmixer":
        own |= {key: value for key, value in NAMES[name].items() if key != "model.encoder.event_width"}
    return chain(*(
        noted(by_dense_params([SIZE], architecture=name, **own, **{"size.encoder_share": share}),
              arm=f"{name}, total, {share:g}")
        for share in shares
    ))  # fmt: skip
