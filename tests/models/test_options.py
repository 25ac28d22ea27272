"""Settings of any config: which values fit a declared type, how they are said, and what is handed on."""

import dataclasses
from typing import Literal

import pytest

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
