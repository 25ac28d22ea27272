"""Dense parameters x history length: does a longer history need a larger model, and the other way round?

Three sizes by four lengths of a two-stage and a unified architecture on preset `long` of the known-truth log, half its
signal in products of fields and half in events: two resources that are separate by construction, so their losses add.
Signs are given in place of ids, as in `dense` and in `length_ladder`. LONGER's encoder has the same share of every
size, so that both of its parts grow: the sizes are those at which event widths of whole heads give that. The report
fits a sum of two power laws.

    recscale sweep co_scaling --out runs/co_scaling

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, by_history_length, chain, product, seeds
from recscale.sweeps.sequences.length_ladder import SETTINGS, long_log

LENGTHS = [8, 20, 50, 128]
SIZES = [3.3e4, 1e5, 3.6e5]
ENCODER_SHARE = 0.308  # event widths 4, 8 and 16


def get_config() -> ConfigDict:
    fields = dict(shares=(0.5, 0.5, 0.0, 0.0), quanta=1024, code_bits=8, order_shares=(0.10, 0.90), blocks=8)
    return long_log("longer+rankmixer", max(LENGTHS), fields, lr=1.5e-3)


def get_sweep() -> Sweep:
    # The position table is the same at every length.
    longer = product(
        architectures(["longer+rankmixer"]),
        axis("model.encoder.max_length", [max(LENGTHS)]),
        axis("model.backbone.layers", [1]),
        axis("size.encoder_share", [ENCODER_SHARE]),
    )
    mixformer = product(architectures(["mixformer"]), [SETTINGS["mixformer"]])
    return product(chain(longer, mixformer), by_dense_params(SIZES), by_history_length(LENGTHS), seeds(3))


def get_report() -> dict:
    # Three sizes leave none to hold out.
    axes = {"x1": "dense_params", "x2": "history_length"}
    return {"form": "sum", "axes": axes, "target": "logloss", "hold_out_largest": False}
