"""Shapes near a target: within 3 % wherever the models can be, and friendly to hardware.

A sweep that is repeated must find the shapes it ran before: the first offers in several settings lie in offers.json;
`RECSCALE_WRITE_GOLDEN=1 pytest tests/models/test_size_space.py -k before` writes them anew.
"""

import itertools
import json
import os
from pathlib import Path

import pytest

from recscale.models import count, list_models, size_space
from recscale.models.inputs import Field, Schema, Sequence, reference_schema
from recscale.models.sizing import mlp_shapes, solve_affine, solve_increasing


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
    "mmoe": [dict(tower=()), dict(tower=(8, 8), experts=4)],
    "wukong": [dict(layers=3)],
}


def first_offers(name):
    """[[config, target, schema, offers]]: the first six offers in several settings, as JSON has them."""
    if name in SIZED:
        settings = [(None, target, REFERENCE, dict(encoder_share=0.4)) for target in (3e5, 2e7)]
        name = f"{name}+rankmixer"
    else:
        settings = [(None, target, REFERENCE, {}) for target in (1e5, 1e6, 2e7, 4e8)] + [(None, 3e4, SMALL, {})]
        settings += [(config, target, REFERENCE, {}) for config in CONFIGURED.get(name, ()) for target in (2e5, 2e7)]
    found = [
        [
            config,
            target,
            len(schema.fields),
            list(itertools.islice(size_space(name, schema, config, target, **split), 6)),
        ]
        for config, target, schema, split in settings
    ]
    return json.loads(json.dumps(found))


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
    assert solve_affine(lambda x: 7 * x + 1000, 73, 1) is None
    assert solve_increasing(lambda x: x * x, 101, 1) == 10
    assert solve_increasing(lambda x: x * x, 1, 8) == 8
    assert next(iter(mlp_shapes(lambda widths: sum(widths), 3, 24))) == (8, 8, 8)
    assert list(mlp_shapes(lambda widths: 5, 0, 24)) == [()]
