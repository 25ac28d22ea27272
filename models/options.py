"""Settings: frozen dataclasses whose words are checked when one is made, alone or from a mapping.

An architecture's config is flat, and is every option group whose flags it has: `RankMixerConfig(NormOptions, ...)`. A
group stands beside the module it configures, which takes it whole, so a builder hands its config on as that group.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from recscale.pallas_kernels.names import nearest

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of option groups and configs. A subclass that checks more does so after `super().__post_init__()`.

    Raises:
        ValueError: a flag declared as a `Literal` has another value.
    """

    def __post_init__(self) -> None:
        defaults = _defaults(type(self))  # a config is made thousands of times while a size is looked for
        for name, hint in _choices(type(self)):
            value = getattr(self, name)
            if value is not defaults[name] and not _fits(value, hint):
                raise ValueError(f"{name} is {value!r}, expected {_describe(hint)}")


def require_sizes(**sizes: int | tuple[int, ...] | None) -> None:
    """Raises ValueError if one of these named sizes is below 1: a number, a tuple of them, or None for unset."""
    for name, value in sizes.items():
        each = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(size < 1 for size in each):
            raise ValueError(f"{name} is {value}, expected at least 1{' everywhere' if len(each) > 1 else ''}")


def require_positive(**numbers: float) -> None:
    """Raises ValueError if one of these named numbers is not above 0."""
    for name, value in numbers.items():
        if not value > 0.0:
            raise ValueError(f"{name} is {value:g}, expected a number above 0")


def require_share(**shares: float) -> None:
    """Raises ValueError if one of these named numbers is not in [0, 1)."""
    for name, value in shares.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is {value}, expected a share in [0, 1)")


def refuse_unused(config: Any, reason: str, **flags: Any) -> None:
    """Raises ValueError for the first of these flags (name=value) of a config that is not at its default.

    reason: why they have no effect there, and the mend.
    """
    defaults = _defaults(type(config))
    for name, value in flags.items():
        if value != defaults[name]:
            raise ValueError(f"{name} is {value!r} and has no effect: {reason}, or leave it at {defaults[name]!r}")


def group_of(config: Any, group: type[T]) -> T:
    """The flags of one option group alone, of a config that has them."""
    return group(**{field.name: getattr(config, field.name) for field in dataclasses.fields(typing.cast(Any, group))})


def freeze(config_type: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """A frozen config dataclass from a mapping, strictly.

    Missing keys keep their defaults; lists become tuples; everything else must already have the declared type.

    Raises:
        ValueError: an unknown key (the nearest is named), or a value of another type.
    """
    hints = _hints(config_type)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where} has no key {key!r}{nearest(key, hints)}")
    return config_type(**{key: _typed(f"{where}.{key}", value, hints[key]) for key, value in values.items()})


@functools.cache
def _hints(config_type: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


@functools.cache
def _defaults(config_type: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config_type)}


@functools.cache
def _choices(config_type: type) -> list[tuple[str, Any]]:
    """Fields that take one of some words, and their types."""

    def chosen(hint: Any) -> bool:
        return typing.get_origin(hint) is typing.Literal or any(map(chosen, typing.get_args(hint)))

    return [(name, hint) for name, hint in _hints(config_type).items() if chosen(hint)]


def _typed(where: str, value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if not _fits(value, hint):
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}), expected {_describe(hint)}")
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is typing.Literal:
        return ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a tuple of {_describe(args[0])}"
    return "None" if hint is type(None) else hint.__name__
