"""Sizes of the serving benchmarks."""

from __future__ import annotations

import dataclasses

from recscale.models.inputs import Field, Schema, Sequence, reference_schema


@dataclasses.dataclass(frozen=True)
class ServingShape:
    """Sizes of the measured call; the defaults are those every report uses."""

    requests: int = 8
    candidates: int = 64
    width: int = 256
    tokens: int = 16
    layers: int = 2


def history_schema(events: int = 128, width: int = 48) -> Schema:
    """The reference schema with one history of S events of width A. Both MixFormers make it once per request."""
    history = Sequence("history", events, (Field("event", "user", width, vocabulary=1000),))
    return dataclasses.replace(reference_schema(), sequences=(history,))
