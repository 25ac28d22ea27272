"""Shapes near a target: within 3 % wherever the models can be, and friendly to hardware.

A sweep that is repeated must find the shapes it ran before: the first offers in several settings lie in offers.json;
`RECSCALE_WRITE_GOLDEN=1 pytest tests/models/test_size_space.py -k before` writes them anew.
"""

import dataclasses
import itertools
import json
import os
import zlib
from pathlib import Path

import pytest

from recscale.models import count, list_models, size_space
from recscale.models.counts import Params
from recscale.models.inputs import Field, Schema, Sequence, reference_schema
from recscale.models.sizing import (
    affine_widths,
    grains,
    interpolate,
    mlp_shapes,
    sized_by,
    solve_affine,
    solve_affine_exactly,
    solve_increasing,
    solve_widths,
    token_choices,
    widths_around,
)


def with_history(schema, table, width):
    event = Field("event", "user", width, 1000, table=table)
    return Schema(schema.fields, (Sequence("h", 50, (event,)),))


REFERENCE = with_history(reference_schema(), "f20", 16)
SMALL = with_history(
    Schema(tuple(Field(f"d{i}", "user" if i < 4 else "candidate", 8, 1000) for i in range(8))), "d5", 8
)


# Ten times the logarithm of the smallest size tried, where it is not that of the others: keys and queries of a memory
# keep their size, MDL's tokens read all fields once each. First on the reference schema, then on the small one.
SMALLEST = {"mdl": (45, 36), "pkm": (45, 42), "memory_plus": (45, 42), "msn": (40, 42)}


def best(name, schema, target, config=None):
    """The first offer within 3 %, as a solver would take it, or the nearest."""
    found = (None, float("inf"))
    for offer in itertools.islice(size_space(name, schema, config, target), 2000):
        merged = {**(config or {}), **offer}
        error = abs(count(name, schema, merged).dense_params / target - 1)
        found = min(found, (merged, error), key=lambda pair: pair[1])
        if error < 0.03:
            break
    return found


@pytest.mark.parametrize("name", [*list_models("backbone"), "sum_pooling"])
def test_reference_schema_from_ten_thousand_to_a_billion(name):
    for tenths in range(SMALLEST.get(name, (40, 30))[0], 91, 5):
        assert best(name, REFERENCE, 10 ** (tenths / 10))[1] < 0.03, tenths / 10


@pytest.mark.parametrize("name", [*list_models("backbone"), "sum_pooling"])
def test_small_schema_from_one_thousand(name):
    for tenths in range(SMALLEST.get(name, (40, 30))[1], 61, 3):
        assert best(name, SMALL, 10 ** (tenths / 10))[1] < 0.03, tenths / 10


@pytest.mark.parametrize("name", ["din", "din+rankmixer"])
def test_the_backbone_is_sized_for_the_rest(name):
    merged, error = best(name, REFERENCE, 1e5)
    assert error < 0.03 and set(merged) == {"backbone"}


SIZED = ["longer", "din", "target_attention", "sequence_transformer", "sasrec", "hstu", "stca", "twin_lite"]


@pytest.mark.parametrize("name", SIZED)
def test_an_encoder_takes_its_share_of_a_size(name):
    target = 1.2e5 if name == "longer" else 3e5
    offers = list(itertools.islice(size_space(f"{name}+rankmixer", REFERENCE, None, target, encoder_share=0.4), 300))
    counts = [count(f"{name}+rankmixer", REFERENCE, offer) for offer in offers]
    assert min(abs(found.dense_params / target - 1) for found in counts) < 0.03
    assert counts[0].encoder_params == pytest.approx(0.4 * target, rel=0.12)


GOLDEN = Path(__file__).with_name("offers.json")

# Configurations that are sized in another way than the default one.
CONFIGURED = {
    "rankmixer": [dict(tokens=8), dict(experts=4), dict(experts=4, router="topk"), dict(ffn="shared", layers=4)],
    "tokenmixer_large": [dict(tokenizer="cut"), dict(tokenizer="cut", heads=4), dict(experts=8, active=4)],
    "ug_rankmixer": [dict(tokens=12, user_tokens=4)],
    "ug_tokenmixer_large": [dict(tokenizer="cut", tokens=12, user_tokens=4)],
    "dlrm_mlp": [dict(widths=(1,)), dict(widths=(1, 1), interaction="dot")],
    "dcnv2": [dict(rank=8, experts=2), dict(widths=()), dict(cross_layers=2, structure="parallel")],
    "hiformer": [dict(heads=2, layers=3)],
    "autoint": [dict(heads=4, layers=1)],
    "dhen_lite": [dict(modules=("fm", "linear")), dict(modules=("linear", "attention")), dict(modules=("cross",))],
    "mmoe": [dict(tower=()), dict(tower=(8, 8), experts=4), dict(experts=100)],
    "wukong": [dict(layers=3)],
}


def first_offers(name):
    """[[config, target, fields, number and checksum of all offers, the first six]] in several settings."""
    if name in SIZED:
        settings = [(None, target, REFERENCE, dict(encoder_share=0.4)) for target in (3e5, 2e7)]
        name = f"{name}+rankmixer"
    else:
        settings = [(None, target, REFERENCE, {}) for target in (1e5, 1e6, 2e7, 4e8)] + [(None, 3e4, SMALL, {})]
        settings += [(config, target, REFERENCE, {}) for config in CONFIGURED.get(name, ()) for target in (2e5, 2e7)]
    found = []
    for config, target, schema, split in settings:
        offers = list(itertools.islice(size_space(name, schema, config, target, **split), 600))
        checksum = zlib.crc32("".join(sorted(map(str, offers))).encode())  # whatever their order
        found.append([config, target, len(schema.fields), len(offers), checksum, offers[:6]])
    return json.loads(json.dumps(found))  # lists for tuples, as is stored


@pytest.mark.parametrize("name", [*list_models("backbone"), "onetrans_lite", "hyformer", "mixformer", *SIZED])
def test_the_first_offers_are_those_of_before(name):
    found, stored = first_offers(name), json.loads(GOLDEN.read_text())
    if os.environ.get("RECSCALE_WRITE_GOLDEN"):
        stored[name] = found
        GOLDEN.write_text(json.dumps(stored, sort_keys=True).replace(", [", ",\n [") + "\n")
    assert all(offers for *_, offers in found)
    assert found == stored[name]


def test_an_encoder_is_sized_in_front_of_a_fixed_backbone():
    backbone = {"backbone": {"layers": 1, "width": 32, "hidden": 40}}
    offers = list(size_space("din+rankmixer", REFERENCE, backbone, 2e5, fixed="backbone"))
    assert offers and all(set(offer) == {"encoder"} for offer in offers)
    assert count("din+rankmixer", REFERENCE, backbone | offers[0]).dense_params == pytest.approx(2e5, rel=0.05)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("rankmixer", {"encoder_share": 0.5}, "no sequence encoder in front"),
        ("sum_pooling+rankmixer", {"fixed": "backbone"}, "an encoder without a size of its own"),
        ("din+rankmixer", {"encoder_share": 1.5}, "size.encoder_share is 1.5, expected a number between 0 and 1"),
        ("din+rankmixer", {"fixed": "encoder"}, "size.fixed is 'encoder', expected 'backbone'"),
        ("din+rankmixer", {"encoder_share": 0.5, "fixed": "backbone"}, "set one of them"),
    ],
)
def test_what_cannot_be_split_is_refused(name, split, message):
    with pytest.raises(ValueError, match=message):
        next(size_space(name, REFERENCE, None, 1e5, **split))


def test_a_part_without_room_for_the_other_is_refused():
    """As many parameters as the target leave none."""
    encoder = count("din+rankmixer", REFERENCE).encoder_params
    backbone = count("din+rankmixer", REFERENCE).dense_params - encoder
    for target, split, part in ((encoder, {}, "encoder"), (backbone, {"fixed": "backbone"}, "backbone")):
        with pytest.raises(ValueError, match=f"the {part} alone has {target} dense parameters, the target is"):
            next(size_space("din+rankmixer", REFERENCE, None, target, **split))
        assert next(size_space("din+rankmixer", REFERENCE, None, target + 3000, **split))
    for share in (0, 1):
        with pytest.raises(ValueError, match=f"size.encoder_share is {share}, expected a number between"):
            next(size_space("din+rankmixer", REFERENCE, None, 3e5, encoder_share=share))


@pytest.mark.parametrize("target", [1e7, 1e8, 1e9])
def test_large_shapes_suit_matrix_units(target):
    shape, _ = best("rankmixer", REFERENCE, target)
    assert shape["width"] % 128 == 0 and shape["hidden"] % 64 == 0
    for name in ("dlrm_mlp", "dcnv2"):
        assert all(width % 64 == 0 for width in best(name, REFERENCE, target)[0]["widths"])


def test_configured_sizes_are_kept():
    fixed = dict(tokens=8, layers=3)
    for offer in itertools.islice(size_space("rankmixer", REFERENCE, fixed, 1e6), 20):
        assert offer["tokens"] == 8 and "layers" not in offer
    low_rank = dict(rank=16, cross_layers=2)
    assert {(o["cross_layers"], o["rank"]) for o in size_space("dcnv2", REFERENCE, low_rank, 1e6)} == {(2, 16)}


@pytest.mark.parametrize(
    "flags",
    [
        dict(mixer="all_share"),
        dict(mixer="all_concat"),
        dict(ffn="shared"),
        dict(tokenizer="group"),
        dict(mixer="self_attention"),
    ],
    ids=str,
)
def test_ablations_can_be_sized_too(flags):
    assert best("rankmixer", REFERENCE, 1e6, flags)[1] < 0.03


def test_solvers():
    assert solve_affine(lambda x: 7 * x + 3, 73, 1) == 10
    assert solve_affine(lambda x: 7 * x + 3, 73, 8) == 8
    assert solve_affine(lambda x: 7 * x + 3, 12, 1) == 1
    assert solve_affine(lambda x: 7 * x + 1000, 73, 1) is None
    assert solve_affine_exactly(lambda x: 7 * x + 3, 76.5) == 10.5
    for target, expected in ((101, 10), (100, 10), (110, 10), (111, 11), (1, 1), (2, 1), (3, 2), (4, 2), (16, 4)):
        assert solve_increasing(lambda x: x * x, target, 1) == expected, target
    for target, expected in ((1, 8), (64, 8), (159, 8), (161, 16), (5000, 72)):
        assert solve_increasing(lambda x: x * x, target, 8) == expected, target
    assert next(iter(mlp_shapes(lambda widths: sum(widths), 3, 24))) == (8, 8, 8)
    assert list(mlp_shapes(lambda widths: 5, 0, 24)) == [()]
    assert list(affine_widths(lambda x: 7 * x + 3, 7 * 21 + 3)) == [24, 20, 21]
    assert list(affine_widths(lambda x: 7 * x + 3, 7 * 21 + 3, unit=3)) == [24, 21]
    assert list(affine_widths(lambda x: 7 * x + 3, 7 * 2 + 3)) == [2]  # a step of 4 would double it
    assert list(affine_widths(lambda x: 10**5 * x, 2e7)) == [192]


def test_steps_of_widths():
    """Steps are 8, 4, 2, 1 below 1e7 parameters, those of matrix units from there on."""
    assert grains(1e7 - 1) == (8, 4, 2, 1) and grains(1e7) == (64,) and grains(1e7, (128, 64)) == (128, 64)
    assert widths_around(4, 1e4) == [4, 5, 3, 6, 7, 2, 8, 1]
    assert set(widths_around(23, 1e4)) == set(range(5, 47))
    assert set(widths_around(24, 1e4)) == set(range(8, 49, 8)) and set(widths_around(79, 1e4)) == set(range(16, 161, 8))
    assert widths_around(80, 1e4) == [80, 96, 64, 112, 128, 48, 144, 160, 32, 16]
    assert set(widths_around(48, 1e4, multiple=12)) == {24, 48, 72, 96}
    assert widths_around(256, 1e7) == [256, 384, 128, 512] and set(widths_around(128, 1e7)) == {128, 256}
    assert set(widths_around(127, 1e7)) == set(range(16, 257, 16)) and set(widths_around(128, 1e7 - 1)) == set(
        range(32, 257, 16)
    )
    assert widths_around(256, 1e7, large=64)[:3] == [256, 320, 192]


def test_interpolation_between_known_sizes():
    points = {1e6: 64.0, 1e4: 16.0, 1e8: 512.0}
    for target, width in ((1e3, 16), (1e4, 16), (1e5, 32), (1e6, 64), (1e7, 64 * 8**0.5), (1e8, 512), (1e9, 512)):
        assert interpolate(target, points) == pytest.approx(width)


def test_numbers_of_tokens():
    """Powers of two around the one that suits the size: 4, 8, 16, 32."""
    for target, suits in ((3e4 - 1, 4), (3e4, 8), (3e5 - 1, 8), (3e5, 16), (3e8 - 1, 16), (3e8, 32)):
        assert token_choices(range(1, 80), target) == [(suits // 2, 0.5), (suits, 0.0), (2 * suits, 0.5)]
    assert token_choices(range(33, 70), 1e4) == [(64, 0.0)] and token_choices([5, 6, 7], 1e4) == [(7, 0.0)]
    assert token_choices([2, 8, 16], 1e4) == [(2, 0.0)]
    assert token_choices([3, 6, 7, 9, 16], 1e6) == [(16, 0.0)]


def test_widths_that_are_solved_for():
    """Parameters A*B: shapes within a factor of two of their ideal in the given order, then the least distorted, last
    what misses the target by more than a quarter."""

    def found(target, *shapes):
        offers = solve_widths([(dict(A=A), "B", ideal) for A, ideal in shapes], lambda s: s["A"] * s["B"], target)
        return [(offer["A"], offer["B"]) for offer in offers]

    assert found(400, (10, 40.0), (20, 10.0), (5, 40.0)) == [(10, 40), (20, 16), (20, 20), (5, 80)]
    assert found(400, (10, 19.0), (20, 40.0)) == [(20, 20), (10, 40), (20, 16)]
    assert found(396, (100, 1.0), (10, 100.0), (40, 9.0)) == [(40, 8), (40, 10), (10, 40), (100, 4), (100, 8)]
    assert found(156, (13, 12.0)) == [(13, 12), (13, 8)]


def test_encoders_of_one_width():
    """Friendly widths come first among those within a tenth of the target; the rest by how far they are off."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int = 1
        step: int = 1

    def offers(params, target, **config):
        count = lambda config, schema: Params(dense=params(config.width))  # noqa: E731
        sized = sized_by(lambda config, width: {"width": width}, count, lambda config: config.step)
        return [offer["width"] for offer in sized(REFERENCE, Config(**config), target)]

    assert offers(lambda w: 10 * w, 420) == [40, 42]
    assert offers(lambda w: w * w, 23**2) == [24, 22, 23]
    assert offers(lambda w: w * w, 21**2) == [20, 21, 24]
    assert offers(lambda w: w * w, 26**2) == [26, 24]
    assert offers(lambda w: 10 * w, 420, step=5) == [40]
    any_width = sized_by(lambda config, width: {"width": width}, lambda config, schema: Params(dense=10 * config.width))
    assert [offer["width"] for offer in any_width(REFERENCE, Config(), 410)] == [40, 41]
