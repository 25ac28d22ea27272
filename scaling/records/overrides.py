"""Laying {dotted key: value} strictly over a ConfigDict: unknown keys and wrong types are errors, never new fields."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from recscale.pallas_kernels.names import closest

# Sections that hold settings of somebody else's vocabulary (fields of the data set's own configuration): new keys are
# taken there as they are, and checked by their owner.
OPEN_SECTIONS = ("data.overrides",)

# Tuples of names that a configuration holds only where they are set, so that runs without them keep their ids.
OPTIONAL = ("data.metrics", "data.extra_tables")


class OverrideError(ValueError):
    """A key or value that does not fit the configuration."""


def leaves(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of every setting, in the order of the configuration or of its plain dictionary."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, ConfigDict | dict):
            flat.update(leaves(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of the configuration with the overrides laid over it, values converted to the settings' types.

    An int becomes a float where a float is expected; nothing else is converted. None is accepted only by a setting
    that is None or optional.

    Raises:
        OverrideError: unknown key (the nearest one is named), a section given as a value, or a value of a wrong type.
    """
    config = copy.deepcopy(config)
    config.update_from_flattened_dict({key: _typed(config, key, value) for key, value in overrides.items()})
    return config


def parse(config: ConfigDict, assignments: Iterable[str]) -> dict[str, Any]:
    """Overrides from `key=value` texts. The existing value's type reads the text (`1e6` is an int where an int is
    expected); where there is none, a Python literal if it is one, else the text itself.

    Raises:
        OverrideError: no `=`, an unknown key, or a text the type cannot read.
    """
    overrides: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise OverrideError(f"--set {text!r} is not key=value, for example --set training.lr=0.001")
        parent, name = _locate(config, key)
        if key in OPTIONAL:
            overrides[key] = _names(key, tuple(filter(None, map(str.strip, value.split(",")))))
            continue
        overrides[key] = _read(key, value.strip(), parent.get_type(name) if name in parent else None)
    return overrides


def _locate(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The section that holds a key, and the key's name in it."""
    section, _, name = key.rpartition(".")
    node: Any = config
    for part in section.split(".") if section else []:
        if not isinstance(node, ConfigDict) or part not in node:
            raise _unknown(config, key)
        node = node[part]
    if not isinstance(node, ConfigDict) or not (name in node or section in OPEN_SECTIONS or key in OPTIONAL):
        raise _unknown(config, key)
    if name in node and isinstance(node[name], ConfigDict) and key not in OPEN_SECTIONS:
        inside = ", ".join(f"{key}.{inner}" for inner in node[name])
        raise OverrideError(f"{key!r} is a section of the configuration, not a setting; its settings are {inside}")
    return node, name


def _names(key: str, value: Any) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise OverrideError(f"{key} = {value!r}, expected a tuple of names")
    return tuple(value)


def _unknown(config: ConfigDict, key: str) -> OverrideError:
    known = leaves(config)
    hint = closest(key, known)
    where = f" (architecture {config.architecture!r})" if key.startswith("model.") and "architecture" in config else ""
    return OverrideError(f"unknown configuration key {key!r}{where}; the nearest key is {hint!r} = {known[hint]!r}")


def _typed(config: ConfigDict, key: str, value: Any) -> Any:
    """The value as the setting's type, or an error that names both."""
    parent, name = _locate(config, key)
    if key in OPTIONAL:
        return _names(key, value)
    if name not in parent:
        return value
    expected, current = parent.get_type(name), parent[name]
    if isinstance(value, np.generic):  # np.logspace and the like; the plan stores plain values
        value = value.item()
    if isinstance(current, ConfigDict):
        if not isinstance(value, Mapping):
            raise OverrideError(f"{key} = {value!r} is {type(value).__name__}, expected a dictionary of settings")
        return ConfigDict(dict(value))
    if expected is type(None) or (value is None and current is None):
        return value
    if expected is float and type(value) is int:
        return float(value)
    if expected is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not expected:
        mend = ""
        if expected is int and isinstance(value, float) and value.is_integer():
            mend = f"; write {int(value)}"
        raise OverrideError(
            f"{key} = {value!r} is {type(value).__name__}, expected {expected.__name__} (now {current!r}){mend}"
        )
    return value


def _read(key: str, text: str, expected: type | None) -> Any:
    """A text as a value of the expected type (None: literal, else the text)."""
    if expected is str:
        return text
    try:
        literal = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError) as error:
        if expected in (None, type(None)):
            return text
        raise OverrideError(f"--set {key}={text}: {text!r} is not a value of type {expected.__name__}") from error
    if expected is int and type(literal) is float and literal.is_integer():
        return int(literal)
    return literal
