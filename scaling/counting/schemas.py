"""Schemas by name for the command line: the reference one, a known-truth preset, a JSON file, an imported log."""

from __future__ import annotations

import json
from pathlib import Path

from recscale.models.inputs import Schema, reference_schema

REFERENCE = "reference"
_KNOWN_TRUTH = "known_truth:"


def load_schema(name: str = REFERENCE) -> Schema:
    """The schema called `name`.

        reference            32 id fields of width 16, half of them user-side, one task
        known_truth:PRESET   fields of a known-truth preset (smoke, dense, base, ...)
        FILE.json            what `Schema.to_dict()` wrote
        DIR                  the folder of an imported log

    Raises:
        ValueError: an unknown name, or a file that is not a schema. FileNotFoundError: no such file.
    """
    if name == REFERENCE:
        return reference_schema()
    if name.startswith(_KNOWN_TRUTH):
        from recscale.scaling.data.known_truth import make_schema, preset

        return make_schema(preset(name.removeprefix(_KNOWN_TRUTH)))
    if name.endswith(".json"):
        return _read(Path(name))
    if (Path(name) / "meta.json").is_file():
        return _read(Path(name) / "meta.json")
    raise ValueError(
        f"there is no schema {name!r}; expected {REFERENCE!r}, '{_KNOWN_TRUTH}PRESET', a .json file or the folder of "
        "an imported log"
    )


def _read(path: Path) -> Schema:
    from recscale.scaling.data.stored_log.packed import schema_from_dict

    if not path.is_file():
        raise FileNotFoundError(f"there is no schema file {path}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return schema_from_dict(plain.get("schema", plain))
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold a schema as Schema.to_dict() writes it: {error!r}") from error
