"""Every preset can be built, as shapes only, and has the parameters its closed form says, and its table of sizes.

A preset's name stands for one model in every run table, so what it counts on a schema with a history lies in
preset_sizes.json; `RECSCALE_WRITE_GOLDEN=1 pytest tests/models/test_presets.py` writes that anew.
"""

import json
import os
from pathlib import Path

import pytest

from recscale.models import count, list_presets
from recscale.models.inputs import Field, Schema, Sequence, reference_schema
from recscale.models.presets import PRESETS
from recscale.scaling.counting.abstract import abstract_model, tree_params

# Dense parameters on the reference schema as the size table gives them: value, unit, and half of the last digit.
STARTER_SIZES = {
    "rankmixer": "9.7k 101k 961k 10.7M",  # the larger ones are the paper's: test_rankmixer.py
    "ug_rankmixer": "9.7k 101k 961k 10.7M",
    "dlrm_mlp": "9.4k 99k 1.05M 9.4M 99M 1.004B",
    "dcnv2": "8.7k 102k 985k 9.7M 100M 982M",
    "wukong": "10.5k 105k 1.01M 10.5M 105M 1.006B",
    "autoint": "10.2k 106k 1.00M 10.2M 98M 1.01B",
    "hiformer": "9.8k 98k 1.03M 10.2M 101M 977M",
    "dhen_lite": "10.3k 102k 1.02M 9.6M 102M 1.016B",
    "mmoe": "9.5k 92k 1.00M 10.2M 102M 997M",
}
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}
NAMES = ("10k", "100k", "1m", "10m", "100m", "1b")

GOLDEN = Path(__file__).with_name("preset_sizes.json")

# What every preset of an architecture fixes itself, so that no default can move it.
FIXED = {
    "rankmixer": "tokens width hidden layers",
    "ug_rankmixer": "tokens width hidden layers user_tokens",
    "tokenmixer_large": "tokenizer heads tokens width hidden layers",
    "dlrm_mlp": "widths",
    "dcnv2": "cross_layers widths",
    "wukong": "width layers fm_tokens linear_tokens rank hidden hidden_layers",
    "autoint": "width attention layers",
    "hiformer": "width layers hidden heads key_width value_width key_rank value_rank",
    "dhen_lite": "width layers rank",
    "mmoe": "experts hidden expert_width tower",
    "longer": "event_width merge queries layers n_global",
    "hyformer": "tokens",
    "mixformer": "tokens width layers",
    "onetrans_lite": "tokens width layers heads",
    "msn": "theta",
    "pkm": "addressing",
    "lmn": "memory_slots memory_topk key_width widths",
}
MSN_SIZES = "tokens width hidden layers memory_count memory_slots memory_topk key_width"


def schema_with_history():
    event = Field("event", "user", 16, 1000, table="f20")
    return Schema(reference_schema().fields, (Sequence("clicks", 2000, (event,), timestamps=True),))


@pytest.mark.parametrize("name", list_presets())
def test_presets_are_what_their_closed_forms_say(name):
    schema = schema_with_history()
    assert tree_params(abstract_model(name, schema, None)) == count(name, schema).dense_params


@pytest.mark.parametrize("name", list_presets())
def test_presets_keep_their_sizes(name):
    base, overrides = PRESETS[name]
    needed = MSN_SIZES if base == "msn" and name != "msn_as_printed" else FIXED[base]
    assert set(needed.split()) <= overrides.keys()
    counted = count(name, schema_with_history())
    found = [counted.dense_params, counted.active_params, counted.forward_flops_per_row, counted.train_flops_per_row]
    stored = json.loads(GOLDEN.read_text())
    if os.environ.get("RECSCALE_WRITE_GOLDEN"):
        stored[name] = found
        GOLDEN.write_text(json.dumps(stored, sort_keys=True).replace("], ", "],\n") + "\n")
    assert found == stored[name]


def test_sparse_and_separated_presets_are_the_dense_shapes():
    """Sparse ones add their routers and use a share of the experts; separation moves half of the tokens to the user."""
    schema = reference_schema()
    for size in NAMES:
        dense, separated = (count(f"{name}_{size}", schema) for name in ("rankmixer", "ug_rankmixer"))
        assert separated.dense_params == dense.dense_params
        # Of the blocks; the head is per candidate.
        blocks = dense.forward_flops_candidate - separated.forward_flops_candidate
        assert blocks == separated.forward_flops_user - dense.forward_flops_user > 0
    for dense, sparse, shares in (
        ("rankmixer", "rankmixer_moe", (0.25, 0.3)),
        ("tokenmixer_large", "tokenmixer_large_moe", (0.5, 0.56)),
    ):
        sizes = [name.removeprefix(f"{sparse}_") for name in list_presets() if name.startswith(sparse)]
        assert {"100k", "1m", "10m", "100m", "1b"} <= set(sizes)
        for size in ("1m", "10m", "100m", "1b"):
            own, plain = count(f"{sparse}_{size}", schema), count(f"{dense}_{size}", schema)
            assert plain.dense_params < own.dense_params < 1.05 * plain.dense_params
            assert shares[0] < own.active_params / own.dense_params < shares[1]
    assert "tokenmixer_large_moe_15b" in list_presets()


@pytest.mark.parametrize(
    ("name", "printed"),
    [(f"{m}_{n}", p) for m, sizes in STARTER_SIZES.items() for n, p in zip(NAMES, sizes.split(), strict=False)],
)
def test_starter_sizes(name, printed):
    digits, unit = printed[:-1], UNITS[printed[-1]]
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    assert abs(count(name, reference_schema()).dense_params / unit - float(digits)) <= half
