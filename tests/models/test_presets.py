"""Every preset can be built, as shapes only, and has the parameters its closed form says, and its table of sizes."""

import pytest

from recscale.models import count, list_presets
from recscale.models.inputs import Field, Schema, Sequence, reference_schema
from recscale.scaling.counting.abstract import abstract_model, tree_params

# Dense parameters on the reference schema as the size table gives them: value, unit, and half of the last digit.
STARTER_SIZES = {
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


@pytest.mark.parametrize("name", list_presets())
def test_presets_are_what_their_closed_forms_say(name):
    event = Field("event", "user", 16, 1000, table="f20")
    schema = Schema(reference_schema().fields, (Sequence("clicks", 64, (event,), timestamps=True),))
    assert tree_params(abstract_model(name, schema, None)) == count(name, schema).dense_params


@pytest.mark.parametrize(
    ("name", "printed"),
    [(f"{m}_{n}", p) for m, sizes in STARTER_SIZES.items() for n, p in zip(NAMES, sizes.split(), strict=True)],
)
def test_starter_sizes(name, printed):
    digits, unit = printed[:-1], UNITS[printed[-1]]
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    assert abs(count(name, reference_schema()).dense_params / unit - float(digits)) <= half
