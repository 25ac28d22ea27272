"""What a model file registers: its config, how to build it, and its closed forms."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .counts import Flops, Params
from .inputs.history import TokenShape


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """A backbone: reads fields, and the tokens of a sequence encoder if there is one.

    Every callable takes the `TokenShape` of those tokens last (`NO_TOKENS` for none):
    build(config, schema, tokens, *, rngs, dtype) -> Backbone; count_params / count_flops(config, schema, tokens);
    size_space(schema, config, target_dense_params, tokens) -> overrides of the config, hardware-friendly first.
    """

    config: type
    build: Callable[..., Any]
    count_params: Callable[..., Params]
    count_flops: Callable[..., Flops]
    size_space: Callable[..., Iterable[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """A sequence encoder; alone it stands in front of a DLRM-MLP.

    build(config, schema, *, rngs, dtype) -> SequenceEncoder; token_shape(config, schema) -> TokenShape;
    count_params / count_flops(config, schema).
    """

    config: type
    build: Callable[..., Any]
    token_shape: Callable[..., TokenShape]
    count_params: Callable[..., Params]
    count_flops: Callable[..., Flops]


@dataclasses.dataclass(frozen=True)
class RankerSpec:
    """A unified architecture: reads the schema's histories itself, so no encoder goes in front of it.

    build(config, schema, *, rngs, dtype) -> Ranker; count_params / count_flops(config, schema);
    size_space(schema, config, target_dense_params) -> overrides of the config, hardware-friendly first.
    """

    config: type
    build: Callable[..., Any]
    count_params: Callable[..., Params]
    count_flops: Callable[..., Flops]
    size_space: Callable[..., Iterable[dict[str, Any]]]


def freeze(config_type: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A frozen config dataclass from a mapping, strictly.

    Missing keys keep their defaults; lists become tuples; everything else must already have the declared type.

    Raises:
        ValueError: an unknown key (the nearest is named), or a value of another type.
    """
    hints = typing.get_type_hints(config_type)
    known = [field.name for field in dataclasses.fields(config_type)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}{nearest(key, known)}")
    return config_type(**{key: _typed(f"{where}.{key}", value, hints[key]) for key, value in values.items()})


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name and the whole list."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    return f"{guess} Known: {', '.join(known)}"


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
