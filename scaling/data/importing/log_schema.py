"""The schema file of a log: a TOML file read, checked against the shipped JSON Schema, and turned into plain objects.

Every refusal names file and line. What the keys mean stands in `log_schema.json`, which editors can use as well.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jsonschema

from recscale.pallas_kernels.names import nearest

SPLIT_PARTS = ("train", "valid", "test")
DEFAULT_LENGTH = 64
DEFAULT_MAX_LENGTH = 8


class LogSchemaError(ValueError):
    """A schema file that cannot be used; the text names file, line and mend."""


@dataclasses.dataclass(frozen=True)
class TableFiles:
    """Files of one table, and how they are written."""

    files: tuple[str, ...]
    format: str = "auto"
    delimiter: str | None = None
    header: bool = True
    names: tuple[str, ...] = ()
    quote: str = '"'
    encoding: str = "utf-8"
    decimal: str = "."


@dataclasses.dataclass(frozen=True)
class TimeSpec:
    column: str
    unit: str | None = None
    zone: str = "UTC"
    earliest: str = "1990-01-01"
    latest: str = "2100-01-01"


@dataclasses.dataclass(frozen=True)
class ExplodeSpec:
    column: str
    names: tuple[str, ...]
    separator: str | None = None
    inner: str | None = None


@dataclasses.dataclass(frozen=True)
class JoinSpec:
    table: TableFiles
    on: str
    required: bool = False


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    name: str
    column: str
    positive: str | None = None
    valid: str | None = None
    mask: str | None = None
    weight: float | None = None


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    name: str
    column: str
    side: str
    kind: str
    type: str | None = None
    group: str | None = None
    min_count: int = 1
    hash: int | None = None
    vocabulary: str | None = None
    shared: str | None = None
    missing: str | float | None = None
    transform: str | tuple[float, ...] = "none"
    separator: str | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    size: int | None = None

    @property
    def table(self) -> str:
        return self.shared or self.name

    @property
    def buckets(self) -> bool:
        """Whether a dense column becomes ids of buckets."""
        return not isinstance(self.transform, str) or self.transform.startswith("quantile:")


@dataclasses.dataclass(frozen=True)
class HistorySpec:
    """`columns`: event field -> column of its list, empty unless the lists stand in the row."""

    name: str
    fields: tuple[str, ...]
    source: str | None = None
    where: str | None = None
    key: str | None = None
    time: str | None = None
    length: int = DEFAULT_LENGTH
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    separator: str | None = None
    order: str = "oldest first"


@dataclasses.dataclass(frozen=True)
class SplitSpec:
    by: str = "time"
    train: float = 0.8
    valid: float = 0.1
    test: float = 0.1
    valid_from: str | None = None
    test_from: str | None = None
    last: int | None = None
    column: str | None = None
    parts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class NegativesSpec:
    within: str
    per_positive: int = 4
    law: str = "popularity:0.75"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class LogSchema:
    """A checked schema file.

    Attributes:
        path: the file. plain: its content. lines: (keys from the top) -> line, for refusals.
    """

    path: Path
    plain: dict[str, Any]
    lines: Mapping[tuple[str, ...], int]
    name: str
    log: TableFiles
    explode: ExplodeSpec | None
    where: str | None
    unique: tuple[str, ...]
    ties: tuple[str, ...]
    time: TimeSpec | None
    user: str | None
    request: tuple[str, ...]
    columns: Mapping[str, str]
    joins: Mapping[str, JoinSpec]
    labels: tuple[LabelSpec, ...]
    fields: tuple[FieldSpec, ...]
    histories: tuple[HistorySpec, ...]
    domain: tuple[str, float] | None
    split: SplitSpec
    negatives: NegativesSpec | None

    def field(self, name: str) -> FieldSpec:
        return next(field for field in self.fields if field.name == name)

    def digest(self) -> str:
        """Hash of the content; comments and order of tables' keys do not count."""
        return hashlib.sha256(json.dumps(self.plain, sort_keys=True).encode()).hexdigest()[:16]

    def error(self, keys: Iterable[str], text: str) -> LogSchemaError:
        """A refusal that names the line of a key."""
        keys = tuple(keys)
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return LogSchemaError(f"{self.path}, line {self.lines.get(keys, 1)}: {text}")


@functools.cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema of schema files."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def read_log_schema(path: Path | str) -> LogSchema:
    """Reads and checks a schema file.

    Raises:
        FileNotFoundError: no such file.
        LogSchemaError: no TOML, an unknown key (the nearest is named), a wrong value, or parts that contradict.
    """
    path = Path(path)
    if not path.is_file():
        place = shlex.quote(str(path))
        raise FileNotFoundError(f"there is no schema file {path}; `recscale data schema LOG > {place}` proposes one")
    text = path.read_text(encoding="utf-8")
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LogSchemaError(f"{path} is not TOML: {error}") from error
    lines = _lines(text)
    problems = sorted(jsonschema.Draft202012Validator(json_schema()).iter_errors(plain), key=lambda e: list(e.path))
    if problems:
        raise LogSchemaError("\n".join(_problem(path, lines, problem) for problem in problems[:5]))
    schema = _build(path, plain, lines)
    _check(schema)
    return schema


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """(keys) -> line of every table and key; inline tables' keys share their line."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line):
            table = tuple(part.strip().strip("\"'") for part in match[1].split("."))
            found.setdefault(table, number)
        else:
            # Keys of an inline table stand in the line of the key that holds it.
            outer: tuple[str, ...] = ()
            for place, match in enumerate(re.finditer(r"(?:^|[{,])\s*([\w.\"'-]+)\s*=(?!=)", line)):
                keys = tuple(part.strip().strip("\"'") for part in match[1].split("."))
                outer = keys if not place else outer
                found.setdefault((*table, *outer, *(keys if place else ())), number)
    return found


def _problem(path: Path, lines: Mapping[tuple[str, ...], int], problem: Any) -> str:
    keys = tuple(str(key) for key in problem.absolute_path)
    text = problem.message
    if problem.validator == "additionalProperties" and isinstance(problem.schema, Mapping):
        known = list(problem.schema.get("properties", {}))
        unknown = [key for key in problem.instance if key not in known]
        text = "; ".join(f"unknown key {key!r}{nearest(key, known)}" for key in unknown)
        text += f" (known: {', '.join(known)})"
        keys = (*keys, unknown[0])
    elif problem.validator == "required":
        text = f"{text} in [{'.'.join(keys) or 'the file'}]"
    elif problem.validator == "enum":
        text = f"{keys[-1]} = {problem.instance!r}{nearest(str(problem.instance), map(str, problem.validator_value))}"
        text += f"; expected one of {', '.join(map(str, problem.validator_value))}"
    else:
        described = problem.schema.get("description") if isinstance(problem.schema, Mapping) else None
        text += f" - {described}" if described else ""
    while keys and keys not in lines:
        keys = keys[:-1]
    return f"{path}, line {lines.get(keys, 1)}: {text}"


def _build(path: Path, plain: dict[str, Any], lines: dict[tuple[str, ...], int]) -> LogSchema:
    log = plain["log"]
    fields = tuple(
        FieldSpec(name, **{"column": name, **_frozen(values), "transform": _transform(values)})
        for name, values in plain["fields"].items()
    )
    users = [field.column for field in fields if field.side == "user" and field.kind == "id"]
    domain = plain.get("domain")
    split: dict[str, Any] = plain.get("split") or {"by": "time" if "time" in plain else "random"}
    return LogSchema(
        path=path,
        plain=plain,
        lines=lines,
        name=log.get("name", path.stem),
        log=_table(log),
        explode=ExplodeSpec(**_frozen(log["explode"])) if "explode" in log else None,
        where=log.get("where"),
        unique=tuple(log.get("unique", ())),
        ties=tuple(log.get("ties", ())),
        time=TimeSpec(**plain["time"]) if "time" in plain else None,
        user=plain.get("user", users[0] if users else None),
        request=tuple(plain.get("request", ())),
        columns=plain.get("columns", {}),
        joins={
            name: JoinSpec(_table(values), values["on"], values.get("required", False))
            for name, values in plain.get("joins", {}).items()
        },
        labels=tuple(LabelSpec(name, **values) for name, values in plain["labels"].items()),
        fields=fields,
        histories=tuple(_history(name, values) for name, values in plain.get("histories", {}).items()),
        domain=(domain["column"], domain.get("min_share", 0.0)) if domain else None,
        split=SplitSpec(**{**split, "parts": {k: tuple(v) for k, v in split.get("parts", {}).items()}}),
        negatives=NegativesSpec(**plain["negatives"]) if "negatives" in plain else None,
    )


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _table(values: Mapping[str, Any]) -> TableFiles:
    known = {field.name for field in dataclasses.fields(TableFiles)}
    return TableFiles(**{name: value for name, value in _frozen(values).items() if name in known})


def _transform(values: Mapping[str, Any]) -> str | tuple[float, ...]:
    transform = values.get("transform", "none")
    return transform if isinstance(transform, str) else tuple(sorted(float(x) for x in transform["bucketize"]))


def _history(name: str, values: Mapping[str, Any]) -> HistorySpec:
    values = dict(values)
    source, column = values.pop("from", None), values.pop("column", None)
    if column is not None:
        values["columns"] = {values["fields"][0]: column}
    return HistorySpec(name, source=source, **_frozen(values))


def _check(schema: LogSchema) -> None:
    """What the JSON Schema cannot say."""
    names = {field.name: field for field in schema.fields}
    if not any(field.side in ("candidate", "cross") for field in schema.fields):
        raise schema.error(("fields",), "no field is of side candidate or cross, so there is nothing to rank")
    for field in schema.fields:
        _check_field(schema, field)
    for history in schema.histories:
        here = ("histories", history.name)
        if (history.source is None) == (not history.columns):
            raise schema.error(here, f"history {history.name!r} needs either from, or column (or columns)")
        for name in history.fields:
            if name not in names:
                raise schema.error((*here, "fields"), f"{name!r} is no declared field{nearest(name, names)}")
            if names[name].kind != "id" and (history.columns or names[name].kind != "dense" or names[name].buckets):
                raise schema.error(
                    (*here, "fields"),
                    f"{name!r} is of kind {names[name].kind}; an event has fields of kind id, or dense",
                )
        if history.columns and set(history.columns) != set(history.fields):
            raise schema.error(
                here, f"columns are given for {', '.join(history.columns)}; fields: {', '.join(history.fields)}"
            )
        if not history.columns and schema.time is None:
            raise schema.error(here, "a history of events needs request times: give `time`")
        if not history.columns and (history.key or schema.user) is None:
            raise schema.error(here, "whose events? give key, or a user")
    if names.keys() & {history.name for history in schema.histories}:
        raise schema.error(("histories",), "a history is called like a field; give it another name")
    split, here = schema.split, ("split",)
    if split.by == "time" and schema.time is None:
        raise schema.error(here, 'a split by time needs `time`; use by = "random" for a log without')
    if split.by == "user" and (schema.user is None or schema.time is None):
        raise schema.error(here, "a split by user needs a user and `time`")
    if split.by in ("column", "files") and not split.parts:
        raise schema.error(here, f"by = {split.by!r} needs parts = {{train = [...], valid = [...], test = [...]}}")
    named = [value for part in split.parts.values() for value in part]
    for value in named:
        if named.count(value) > 1:
            raise schema.error((*here, "parts"), f"{value!r} stands in two parts; a row belongs to one")
    if split.by == "column" and split.column is None:
        raise schema.error(here, 'by = "column" needs column')
    if (split.valid_from is None) != (split.test_from is None):
        raise schema.error(here, "valid_from and test_from go together")
    if split.by in ("time", "user", "random") and abs(split.train + split.valid + split.test - 1) > 1e-9:
        raise schema.error(here, f"the shares add up to {split.train + split.valid + split.test:g}, expected 1")
    if split.by in ("time", "user", "random") and not split.last and min(split.train, split.valid, split.test) <= 0:
        raise schema.error(here, "every part needs a share above 0: validation chooses, test reports")
    if schema.negatives is not None:
        field = names.get(schema.negatives.within)
        if field is None or field.side != "candidate" or field.kind != "id":
            raise schema.error(("negatives", "within"), "within must name a field of side candidate and kind id")


def _check_field(schema: LogSchema, field: FieldSpec) -> None:
    def refuse(key: str, text: str) -> None:
        raise schema.error(("fields", field.name, key), f"field {field.name!r}: {text}")

    ids = field.kind in ("id", "ids")
    for key in ("type", "hash", "vocabulary", "shared"):
        if getattr(field, key) is not None and not ids:
            refuse(key, f"{key} is for kind id or ids, not {field.kind}")
    if field.transform != "none" and field.kind != "dense":
        refuse("transform", f"transform is for kind dense, not {field.kind}")
    if field.hash is not None and (field.vocabulary is not None or field.min_count > 1):
        refuse("hash", "a hashed field has no vocabulary and no min_count; keep one of them")
    if field.kind == "vector" and field.size is None:
        refuse("kind", "a vector needs size, the numbers in it")
    if field.missing is not None:
        if field.kind == "id" and field.missing not in ("row", "unknown"):
            refuse("missing", 'missing ids go to "row" (of their own) or "unknown"')
        if field.kind == "dense" and field.missing in ("row", "unknown"):
            refuse("missing", 'a missing number becomes "indicator" or a number')
        if field.kind in ("ids", "vector"):
            refuse("missing", f"a missing {field.kind} is empty; leave it out")
    if field.shared is not None:
        for other in schema.fields:
            if other.table == field.table and (other.hash, other.vocabulary) != (field.hash, field.vocabulary):
                refuse("shared", f"{other.name!r} shares the table {field.table!r} with another hash or vocabulary")
