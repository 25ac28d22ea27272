"""Schema, request-major batches, embedding tables, tokenizers and the rules of histories."""

from .batch import (
    Batch,
    CandidateInputs,
    CandidateSide,
    Events,
    History,
    Inputs,
    Output,
    UserInputs,
    UserSide,
    join_fields,
)
from .schema import Content, Field, Schema, Sequence, Task, reference_schema

__all__ = [
    "Batch",
    "Content",
    "CandidateInputs",
    "CandidateSide",
    "Events",
    "Field",
    "History",
    "Inputs",
    "Output",
    "Schema",
    "Sequence",
    "Task",
    "UserInputs",
    "UserSide",
    "join_fields",
    "reference_schema",
]
