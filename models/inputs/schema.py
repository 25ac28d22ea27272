"""What a log looks like: its fields, histories and labels, without any data.

A `Schema` is frozen and hashable, so it can be a static argument, part of a run's hash and the only thing a model
builder needs to know about a data set.

Sides (who owns a value) decide what may be computed once per request:

    user       one value per request: user, context known at request time
    candidate  one value per candidate
    cross      one value per (request, candidate) pair; computed with the candidate
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Literal, get_args

Side = Literal["user", "candidate", "cross"]

SIDES: tuple[Side, ...] = get_args(Side)

# Group of the fields that `Schema.with_extra_tables` adds.
EXTRA_TABLES = "extra"


@dataclasses.dataclass(frozen=True)
class Field:
    """One input field.

    Attributes:
        name: unique among the schema's fields.
        side: who owns the value: "user", "candidate" or "cross".
        width: width of the vector an architecture sees: embedding width, or the size of a dense field.
        vocabulary: number of table rows, padding (0) and unknown (1) included where the data set uses them;
            None makes the field dense.
        table: name of the embedding table; fields naming the same table share it. Defaults to the field's name.
        group: semantic group, used by tokenizers; fields of one group should be neighbours in the schema.
        bag: most ids per value. Above 1 the value is a set `[..., bag]`, id 0 is padding, vectors are averaged.
        ids: name under which batches hold the ids, where another field brings them; None: the field's own.
    """

    name: str
    side: Side
    width: int
    vocabulary: int | None = None
    table: str | None = None
    group: str = "default"
    bag: int = 1
    ids: str | None = None

    def __post_init__(self):
        if self.side not in SIDES:
            raise ValueError(f"field {self.name!r}: side is {self.side!r}, expected one of {', '.join(SIDES)}")
        if self.width < 1:
            raise ValueError(f"field {self.name!r}: width is {self.width}, expected at least 1")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"field {self.name!r}: vocabulary is {self.vocabulary}, expected >= 1 (None = dense)")
        if self.bag < 1 or (self.bag > 1 and self.vocabulary is None):
            raise ValueError(f"field {self.name!r}: bag is {self.bag}; a bag holds ids: give a vocabulary, bag >= 1")

    @property
    def is_dense(self) -> bool:
        return self.vocabulary is None

    @property
    def table_name(self) -> str:
        return self.table or self.name

    @property
    def ids_name(self) -> str:
        return self.ids or self.name


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One history of a request: `length` events, newest first, padded at the old end.

    Attributes:
        name: unique among the schema's sequences.
        length: padded number of events S.
        fields: event fields; their `side` must be "user". A field may share a table with a candidate field.
        timestamps: whether batches carry `delta_s`, seconds between the request and each event.
    """

    name: str
    length: int
    fields: tuple[Field, ...]
    timestamps: bool = False

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"sequence {self.name!r}: length is {self.length}, expected at least 1")
        if not self.fields:
            raise ValueError(f"sequence {self.name!r} has no event fields")
        for field in self.fields:
            if field.side != "user":
                raise ValueError(f"sequence {self.name!r}: event field {field.name!r} is not of side 'user'")

    @property
    def width(self) -> int:
        """Width A of one event: the sum of its fields' widths."""
        return sum(field.width for field in self.fields)


@dataclasses.dataclass(frozen=True)
class Content:
    """What items are made of and what requests ask for, as tokens; 0 is padding.

    Batches carry candidates' `ids["content_item"]` [R, C] and `ids["content"]` [R, C, sum(segments)], users'
    `ids["query"]` [R], equal for requests that ask the same, and `ids["query_content"]` [R, query_length], and the
    histories' `ids["content_item"]` [R, S].

    Attributes:
        items: number of items. vocabulary: token ids, padding included.
        segments: most tokens of each part of an item (title, text in its pictures, ...). query_length: of a query.
        histories: sequences whose events are such items.
    """

    items: int
    vocabulary: int
    segments: tuple[int, ...]
    query_length: int
    histories: tuple[str, ...] = ()

    def __post_init__(self):
        if self.items < 1 or self.vocabulary < 2 or not self.segments or min(*self.segments, self.query_length) < 1:
            raise ValueError(
                f"content has {self.items} items, {self.vocabulary} token ids, segments {self.segments} and queries of "
                f"{self.query_length} tokens; expected an item, two ids, and a token in each"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """One binary label; the loss is the weighted sum over tasks."""

    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Schema:
    """Fields, histories, tasks and number of domains of a log. Field order is meaningful: tokenizers follow it."""

    fields: tuple[Field, ...]
    sequences: tuple[Sequence, ...] = ()
    tasks: tuple[Task, ...] = (Task("click"),)
    domains: int = 1
    content: Content | None = None

    def __post_init__(self):
        _check_unique("field", [field.name for field in self.fields])
        _check_unique("sequence", [sequence.name for sequence in self.sequences])
        _check_unique("task", [task.name for task in self.tasks])
        if not self.tasks:
            raise ValueError("a schema needs at least one task")
        for name in self.content.histories if self.content is not None else ():
            if name not in [sequence.name for sequence in self.sequences]:
                raise ValueError(f"content names history {name!r}, and the schema has none of that name")
        shapes: dict[str, tuple[int, int]] = {}
        for field in self.table_fields():
            shape = (field.vocabulary or 0, field.width)
            if shapes.setdefault(field.table_name, shape) != shape:
                raise ValueError(
                    f"field {field.name!r} shares table {field.table_name!r} but wants (rows, width) {shape}, "
                    f"another field wants {shapes[field.table_name]}; give them equal sizes or separate tables"
                )

    def side(self, *sides: Side) -> tuple[Field, ...]:
        """Fields of the given sides, in schema order."""
        return tuple(field for field in self.fields if field.side in sides)

    @property
    def user_fields(self) -> tuple[Field, ...]:
        return self.side("user")

    @property
    def candidate_fields(self) -> tuple[Field, ...]:
        """Fields that need the candidate: sides "candidate" and "cross", in schema order."""
        return self.side("candidate", "cross")

    @property
    def width(self) -> int:
        """Total width d_in of the concatenated fields, histories not counted."""
        return sum(field.width for field in self.fields)

    def table_fields(self) -> tuple[Field, ...]:
        """Every id field, event fields of histories included, in schema order."""
        events = [field for sequence in self.sequences for field in sequence.fields]
        return tuple(field for field in (*self.fields, *events) if not field.is_dense)

    def tables(self) -> dict[str, tuple[int, int]]:
        """Table name -> (rows, width)."""
        return {field.table_name: (field.vocabulary or 0, field.width) for field in self.table_fields()}

    def embedding_params(self) -> int:
        return sum(rows * width for rows, width in self.tables().values())

    def with_history_length(self, length: int) -> Schema:
        """The same schema with every history cut to its newest `length` events."""
        cut = tuple(dataclasses.replace(s, length=min(length, s.length)) for s in self.sequences)
        return dataclasses.replace(self, sequences=cut)

    def with_extra_tables(self, names: tuple[str, ...]) -> Schema:
        """The same schema with a second field for each of these id fields, in group "extra", with a table of its own.

        Raises:
            ValueError: a name that is no id field.
        """
        known = {field.name: field for field in self.fields if not field.is_dense}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"extra tables are asked for {', '.join(unknown)}; the id fields are {', '.join(known)}")
        extra = tuple(
            dataclasses.replace(known[name], name=new, table=new, group=EXTRA_TABLES, ids=known[name].ids_name)
            for name, new in ((name, f"{name}_{EXTRA_TABLES}") for name in names)
        )
        return dataclasses.replace(self, fields=self.fields + extra)

    def to_dict(self) -> dict:
        plain = dataclasses.asdict(self)
        if plain["content"] is None:  # so that a schema without such things keeps its hash
            del plain["content"]
        for field in (*plain["fields"], *(field for sequence in plain["sequences"] for field in sequence["fields"])):
            if field["ids"] is None:
                del field["ids"]
        return plain

    def hash(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def reference_schema(fields: int = 32, width: int = 16, tasks: int = 1) -> Schema:
    """The schema counts and sizes refer to unless another is named: 32 id fields of width 16, half user-side."""
    half = fields // 2
    sides: list[Side] = ["user" if i < half else "candidate" for i in range(fields)]
    return Schema(
        fields=tuple(
            Field(f"f{i:02d}", side, width, vocabulary=1000, group=f"{side}{i // 4}") for i, side in enumerate(sides)
        ),
        tasks=tuple(Task(f"task{i}") for i in range(tasks)),
    )


def _check_unique(kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{kind} names must be unique; given twice: {', '.join(twice)}")
