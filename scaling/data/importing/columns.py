"""Columns of a packed log written piece by piece, and numbers that are transformed by what training showed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from recscale.scaling.data.stored_log.vocabulary import FIRST_ID

_PIECE = 1 << 20
# Quantiles and the card's figures are taken from so many evenly spaced training rows at most.
_SAMPLE = 1 << 21


class ColumnFile:
    """A `.npy` file that grows; its header is completed when it is closed.

    Args:
        path: of the file. dtype: of its values. shape: of one entry, () for a number.
    """

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._dtype, self._shape = path, np.dtype(dtype).newbyteorder("<"), shape
        self.length = 0
        self._file = path.open("wb")
        self._header()

    def append(self, values: Shaped[np.ndarray, ...]) -> None:
        """Adds entries [n, *shape]."""
        self.length += len(values)
        np.ascontiguousarray(values, self._dtype).tofile(self._file)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        # NumPy pads a header for any length of the first axis, so it can be written over.
        shape = (self.length, *self._shape)
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, described)


@dataclasses.dataclass(frozen=True)
class DenseRule:
    """How a number becomes what a model reads: everything that was learnt from the training rows.

    Attributes:
        transform: none, log1p, standard or buckets. mean, std: of "standard". edges: of buckets, ascending.
        fill: what takes the place of a missing number, or None for an indicator beside a 0.
    """

    transform: str
    mean: float = 0.0
    std: float = 1.0
    edges: tuple[float, ...] = ()
    fill: float | None = None

    @property
    def width(self) -> int:
        return 2 if self.fill is None and self.transform != "buckets" else 1

    @property
    def vocabulary(self) -> int | None:
        """Table rows of buckets: padding, unknown, one a bucket, missing."""
        return FIRST_ID + len(self.edges) + 2 if self.transform == "buckets" else None

    def apply(self, raw: Float[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
        """float32 [n, width], or int32 ids [n] of buckets; NaN is missing."""
        missing = np.isnan(raw)
        if self.transform == "buckets":
            ids = FIRST_ID + np.searchsorted(np.asarray(self.edges), raw, side="right")
            return np.where(missing, (self.vocabulary or 1) - 1, ids).astype(np.int32)
        value = np.where(missing, 0.0 if self.fill is None else self.fill, raw).astype(np.float64)
        if self.transform == "log1p":
            value = np.sign(value) * np.log1p(np.abs(value))
        elif self.transform == "standard":
            value = (value - self.mean) / self.std
        if self.fill is None:
            value = np.where(missing, 0.0, value)
            return np.stack([value, missing], axis=1).astype(np.float32)
        return value.astype(np.float32)[:, None]


def learn_rule(
    transform: str | tuple[float, ...], missing: str | float | None, train: Float[np.ndarray, " n"]
) -> DenseRule:
    """The rule of a dense field from its raw training values; sums run in order, so equal rows give equal bytes."""
    fill = None if missing == "indicator" else float(missing) if isinstance(missing, int | float) else 0.0
    if not isinstance(transform, str):
        return DenseRule("buckets", edges=transform)
    if transform.startswith("quantile:"):
        count = int(transform.partition(":")[2])
        there = sample(train)
        there = there[~np.isnan(there)]
        edges = np.unique(np.quantile(there, np.arange(1, count) / count)) if there.size else np.empty(0)
        return DenseRule("buckets", edges=tuple(float(edge) for edge in edges))
    if transform != "standard":
        return DenseRule(transform, fill=fill)
    rows, total, squares = 0, 0.0, 0.0
    for start in range(0, len(train), _PIECE):
        piece = np.asarray(train[start : start + _PIECE], np.float64)
        piece = piece[~np.isnan(piece)] if fill is None else np.where(np.isnan(piece), fill, piece)
        rows, total = rows + piece.size, total + float(piece.sum())
    mean = total / max(rows, 1)
    for start in range(0, len(train), _PIECE):
        piece = np.asarray(train[start : start + _PIECE], np.float64)
        piece = piece[~np.isnan(piece)] if fill is None else np.where(np.isnan(piece), fill, piece)
        squares += float(np.square(piece - mean).sum())
    std = (squares / max(rows, 1)) ** 0.5
    return DenseRule(transform, mean=mean, std=std or 1.0, fill=fill)


def transform_file(raw: Path, target: Path, rule: DenseRule) -> None:
    """Writes the column of a dense field from its raw numbers."""
    values = np.load(raw, mmap_mode="r")
    column = ColumnFile(target, np.int32 if rule.vocabulary else np.float32, () if rule.vocabulary else (rule.width,))
    for start in range(0, len(values), _PIECE):
        column.append(rule.apply(values[start : start + _PIECE]))
    column.close()


def sample(values: Shaped[np.ndarray, " n"], most: int = _SAMPLE) -> Shaped[np.ndarray, " m"]:
    """At most so many values, evenly spaced."""
    return np.asarray(values[:: max(-(-len(values) // most), 1)])
