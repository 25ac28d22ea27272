"""Settings of any config: which values fit a declared type, how they are said, and what is handed on."""

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Literal

import pytest
from tiny_models import config_of, config_type

from recscale.models import freeze_config, list_models
from recscale.models.options import Options, freeze, group_of


@dataclasses.dataclass(frozen=True)
class Group(Options):
    rate: float = 0.5
    word: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Config(Group):
    size: int = 3
    sizes: tuple[int, ...] = (1,)
    maybe: int | None = None
    either: bool | Literal["split"] = False
    name: str = "n"


@pytest.mark.parametrize(
    "values",
    [
        dict(rate=0.25),
        dict(word="b"),
        dict(size=0),
        dict(sizes=()),
        dict(sizes=(2, 3)),
        dict(maybe=None),
        dict(maybe=4),
        dict(either=True),
        dict(either="split"),
        dict(name=""),
    ],
    ids=str,
)
def test_values_that_fit(values):
    assert dataclasses.asdict(freeze(Config, values)) == dataclasses.asdict(Config()) | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(rate="1"), r"config.rate is '1' \(str\), expected float"),
        (dict(rate=True), "expected float"),
        (dict(rate=None), "expected float"),
        (dict(word="c"), "expected 'a', 'b'"),
        (dict(size=True), "expected int"),
        (dict(size=1.0), "expected int"),
        (dict(size=None), "expected int"),
        (dict(sizes=2), "expected a tuple of int"),
        (dict(sizes=(2, "3")), "expected a tuple of int"),
        (dict(maybe="4"), "expected int or None"),
        (dict(either=1), "expected bool or 'split'"),
        (dict(either="splitt"), "expected bool or 'split'"),
        (dict(name=3), "expected str"),
        (dict(rat=3), "config has no key 'rat'; did you mean 'rate'"),
    ],
    ids=str,
)
def test_values_that_do_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        freeze(Config, values)


def test_lists_become_tuples_and_whole_rates_floats():
    found = freeze(Config, dict(sizes=[4, 5], rate=2))
    assert found.sizes == (4, 5) and isinstance(found.rate, float) and found.rate == 2.0


def test_words_are_checked_when_a_config_is_made_directly():
    for wrong, message in ((dict(word="c"), "word is 'c', expected 'a', 'b'"), (dict(either="c"), "bool or 'split'")):
        with pytest.raises(ValueError, match=message):
            Config(**wrong)
    assert Config(word="b", either="split").word == "b"


def test_a_group_takes_its_own_flags():
    assert group_of(Config(rate=0.75, word="b", size=9), Group) == Group(0.75, "b")


def refused(name):
    """Sizes and shares out of range that the config of an architecture refuses: {flag: values}."""
    kind, found = config_type(name), {}
    for flag, hint in typing.get_type_hints(kind).items():
        for one in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]:
            sizes = typing.get_origin(one) is tuple and typing.get_args(one)[0] is int
            values = [0, -1] if one is int else [-0.1, 1.0] if one is float else [(0,), (1, 0)] if sizes else []
            for value in values:
                try:
                    freeze_config(name, config_of(name, {flag: value}))
                except ValueError:
                    found.setdefault(flag, []).append(value)
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("name", list_models())
def test_sizes_and_shares_out_of_range_are_refused(name):
    """refused.json says which, so that none is let in again; run with RECSCALE_WRITE_GOLDEN=1 this writes it anew."""
    golden = Path(__file__).with_name("refused.json")
    stored = json.loads(golden.read_text())
    if os.environ.get("RECSCALE_WRITE_GOLDEN"):
        stored[name] = refused(name)
        golden.write_text(json.dumps(stored, sort_keys=True).replace("}, ", "},\n") + "\n")
    assert refused(name) == stored[name]


# Where 0 switches a part off, or is the first of a count.
ZERO_MEANS = {"inner", "time_buckets", "reader_layers", "inter_residual_every", "mem_layers", "memory_count"}
# Refused by name as well, once there is a schema to read it against.
AGAINST_A_SCHEMA = {"recent", "user_tokens", "max_length"}


def sizes_of(name: str) -> list[tuple[str, bool]]:
    hints = typing.get_type_hints(config_type(name))
    flags = [field.name for field in dataclasses.fields(config_type(name))]
    whole = [flag for flag in flags if "int" in str(hints[flag])]
    return [(f, "tuple" in str(hints[f])) for f in whole if f not in ZERO_MEANS | AGAINST_A_SCHEMA]


@pytest.mark.parametrize("name", list_models())
def test_a_size_of_nothing_is_refused_by_its_name(name):
    for flag, many in sizes_of(name):
        for size in (0, -1):
            with pytest.raises(ValueError, match=flag):
                freeze_config(name, config_of(name, {flag: (size,) if many else size}))
