"""What happened to a published file's rows: read, kept, dropped or repaired, by reason, with examples."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from typing import Any

EXAMPLES_PER_REASON = 3
DEFAULT_MAX_DROPPED = 0.01
_EXAMPLE_CHARACTERS = 160


class Reason(enum.StrEnum):
    """Why a row was dropped or repaired; the only words a report may use."""

    UNPARSABLE = "unparsable"
    MISSING_LABEL = "missing_label"
    OUT_OF_VOCABULARY = "out_of_vocabulary"
    TIMESTAMP_OUT_OF_RANGE = "timestamp_out_of_range"
    DUPLICATE = "duplicate"
    UNEQUAL_HISTORY_LENGTHS = "unequal_history_lengths"
    FUTURE_EVENT_IN_HISTORY = "future_event_in_history"
    NO_PROFILE = "no_profile"
    MISSING_KEY = "missing_key"
    MISSING_VALUE = "missing_value"
    NOT_FINITE = "not_finite"
    WRONG_LENGTH = "wrong_length"
    USER_SIDE_DIFFERS = "user_side_differs"


class TooManyRowsDropped(ValueError):
    """More rows were rejected than the caller allows; the text carries the whole report."""


@dataclasses.dataclass
class ReadReport:
    """Counts of one table's rows, with the first three examples of every reason.

    `tables` holds the reports of side tables (profiles), whose rows are not rows of the log.
    """

    rows_read: int = 0
    dropped: Counter[Reason] = dataclasses.field(default_factory=Counter)
    repaired: Counter[Reason] = dataclasses.field(default_factory=Counter)
    examples: dict[Reason, list[str]] = dataclasses.field(default_factory=dict)
    tables: dict[str, ReadReport] = dataclasses.field(default_factory=dict)

    @property
    def rows_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def rows_kept(self) -> int:
        return self.rows_read - self.rows_dropped

    def drop(self, reason: Reason, example: str, count: int = 1) -> None:
        """Counts `count` rejected rows, keeping the example if it is among the first of its reason."""
        self.dropped[reason] += count
        self._keep(reason, example)

    def repair(self, reason: Reason, example: str, count: int = 1) -> None:
        """Counts `count` rows that were kept with a value replaced (by the unknown id, or by padding)."""
        self.repaired[reason] += count
        self._keep(reason, example)

    def check(self, name: str, max_dropped: float = DEFAULT_MAX_DROPPED) -> None:
        """Raises `TooManyRowsDropped` if more than the share `max_dropped` of the rows was rejected."""
        if self.rows_dropped > max_dropped * self.rows_read:
            share = self.rows_dropped / self.rows_read
            raise TooManyRowsDropped(
                f"{name}: {self.rows_dropped} of {self.rows_read} rows were rejected ({share:.2%}), more "
                f"than the allowed {max_dropped:.2%}.\n{self.summary()}\n"
                "Mend the file, or raise max_dropped to accept the loss."
            )

    def summary(self) -> str:
        """A few lines for a person: totals, then one line per reason with its examples."""
        lines = [f"rows read {self.rows_read}, kept {self.rows_kept}"]
        for word, counts in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, count in sorted(counts.items()):
                lines.append(f"  {word} {count}: {reason}, for example {'; '.join(self.examples.get(reason, []))}")
        for name, table in self.tables.items():
            lines += [f"{name}: " + table.summary().replace("\n", "\n  ")]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "dropped": {str(k): v for k, v in sorted(self.dropped.items())},
            "repaired": {str(k): v for k, v in sorted(self.repaired.items())},
            "examples": {str(k): list(v) for k, v in sorted(self.examples.items())},
            "tables": {name: table.to_dict() for name, table in self.tables.items()},
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> ReadReport:
        """Inverse of `to_dict`; an unknown reason is an error."""
        return cls(
            rows_read=plain["rows_read"],
            dropped=Counter({Reason(k): v for k, v in plain["dropped"].items()}),
            repaired=Counter({Reason(k): v for k, v in plain["repaired"].items()}),
            examples={Reason(k): list(v) for k, v in plain["examples"].items()},
            tables={name: cls.from_dict(table) for name, table in plain["tables"].items()},
        )

    def _keep(self, reason: Reason, example: str) -> None:
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_PER_REASON:
            kept.append(example if len(example) <= _EXAMPLE_CHARACTERS else example[:_EXAMPLE_CHARACTERS] + "...")
