"""The known-truth click log as a data set: batches generated inside the training step, exact metrics of the holdout."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from recscale.models.inputs import Batch
from recscale.scaling.data import metrics as further_metrics
from recscale.scaling.data.source import SourceRequest
from recscale.scaling.records.files import write_atomically

from . import recorded
from .batches import make_batch, make_schema
from .card import SAMPLE_ROWS, card
from .config import GENERATOR_VERSION, TASK_NAMES, KnownTruthConfig, preset, replace
from .evaluate import evaluate_rows, row_groups, stack_truth
from .exact import TruthRows, sample
from .world import build_world

DEFAULT_PRESET = "base"
DEFAULT_HOLDOUT_ROWS = 65_536
_READ_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Holdout:
    """What metrics need of the n holdout batches, stacked: truth, labels, groups and how they are weighted."""

    rows: TruthRows
    labels: Float[np.ndarray, "n R C Y"]
    mask: Float[np.ndarray, "n R C Y"]
    valid: Bool[np.ndarray, "n R C"]
    groups: Int[np.ndarray, "n R C"]
    weighting: str


class KnownTruthSource:
    """`Source` over one known-truth log.

    Batch k holds requests kR ... kR + R - 1 of the stream `log_seed`; `batch` may be traced, so generation runs inside
    the training step. The holdout starts at request 2^31 and covers `holdout_rows` rows whatever R and C are (what
    exceeds them in the last batch is not valid); its truth and the world's card are computed once per configuration
    and kept in memory and in `cache_dir`.

    Args:
        config: a preset's name or a configuration; overrides: fields laid over a named preset.
        requests, candidates: R and C of every batch.
        log_seed: which stream. holdout_rows: rows of the holdout.
        history_length: newest events a model is given; labels still depend on all of them. None: all.
        cache_dir: folder for stored truth; None keeps it in memory only.

    Raises:
        ValueError: unknown preset or field, a history length the log does not have, or an empty holdout.
    """

    on_device = True
    total_rows = None
    batches = None

    def __init__(
        self,
        config: str | KnownTruthConfig = DEFAULT_PRESET,
        *,
        requests: int,
        candidates: int = 1,
        log_seed: int = 0,
        holdout_rows: int = DEFAULT_HOLDOUT_ROWS,
        history_length: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
    ):
        if isinstance(config, str):
            config = preset(config, **dict(overrides or {}))
        elif overrides:
            config = replace(config, **dict(overrides))
        if holdout_rows < 1 or requests < 1 or candidates < 1:
            raise ValueError(
                "requests, candidates and holdout_rows must be positive, found "
                f"{requests}, {candidates}, {holdout_rows}"
            )
        if history_length is not None and not (config.has_history and 1 <= history_length <= config.history_max):
            have = f"1 to {config.history_max} events" if config.has_history else "no history"
            raise ValueError(f"history_length is {history_length}, but this log has {have}")
        self.config, self.log_seed = config, int(log_seed)
        self.requests, self.candidates, self.holdout_rows = requests, candidates, holdout_rows
        self.history_length, self.cache_dir = history_length, cache_dir
        self.world = build_world(config)
        whole = make_schema(config)
        self.schema = whole if history_length is None else whole.with_history_length(history_length)
        self.holdout_batches = -(-holdout_rows // (requests * candidates))

    def batch(self, index: Any) -> Batch:
        """Training batch `index` (may be traced)."""
        return make_batch(
            self.world, self.log_seed, index, self.requests, self.candidates, history_length=self.history_length
        )

    def recorded_bytes(self, batches: int) -> int:
        """Memory that `record` takes; 0 if batches are drawn in the step."""
        return recorded.recorded_bytes(self.config, batches * self.requests, self.candidates)

    def record(self, batches: int) -> recorded.Recorded | None:
        """Training batches 0 ... batches - 1 in memory, for `replay`; None if they are drawn in the step."""
        if not self.recorded_bytes(batches):
            return None
        return recorded.record(self.world, self.log_seed, batches * self.requests, self.candidates)

    def replay(self, record: recorded.Recorded, index: Any) -> Batch:
        """Training batch `index` (may be traced) of a record."""
        return recorded.replay(self.world, record, index, self.requests)

    def iterate(self, start: int) -> Iterator[Batch]:
        """Training batches start, start + 1, ... generated two ahead of the one handed out."""
        ahead = [self._make(np.int32(start + i)) for i in range(_READ_AHEAD)]
        index = start + _READ_AHEAD
        while True:
            ahead.append(self._make(np.int32(index)))
            index += 1
            yield ahead.pop(0)

    def holdout(self) -> Iterator[Batch]:
        """Holdout batches as a model sees them, all [R, C]."""
        for index in range(self.holdout_batches):
            yield self._make_holdout(np.uint32(index))

    def evaluate(self, logits: Float[np.ndarray, "batches R C Y"], metrics: Sequence[str] = ()) -> dict[str, Any]:
        """Exact metrics of holdout logits: keys of `evaluate_rows` and gauc_weighting.

        metrics: names of further metrics, evaluated on the labels drawn.
        """
        stored = self.truth
        given = stored.labels, stored.mask, stored.valid, stored.groups
        found = evaluate_rows(self.world, stored.rows, logits, *given, self.card)
        for task in range(self.config.tasks):
            mask = stored.mask[..., task] * stored.valid
            rows = logits[..., task], stored.labels[..., task]
            values = further_metrics.evaluate(metrics, *rows, mask=mask, groups=stored.groups)
            found |= {f"{name}_{TASK_NAMES[task]}": v for name, v in values.items()} if task else values
        return found | {"gauc_weighting": stored.weighting}

    def facts(self) -> dict[str, Any]:
        """Provenance: configuration, seeds, holdout and the card."""
        return {
            "name": "known_truth",
            "world": self.config.hash,
            "generator_version": GENERATOR_VERSION,
            "config": dataclasses.asdict(self.config),
            "world_seed": self.config.world_seed,
            "log_seed": self.log_seed,
            "holdout_rows": self.holdout_rows,
            "history_length": self.history_length,
            "rejected": {},
            "card": self.card,
        }

    @functools.cached_property
    def card(self) -> dict[str, Any]:
        """Constants of the world; see `card.card`."""
        return card(self.world, cache_dir=self.cache_dir)

    @functools.cached_property
    def truth(self) -> Holdout:
        """Truth, labels and groups of the holdout."""
        name = (
            f"known_truth_holdout_{self.config.hash}_{self.log_seed}_{self.requests}x{self.candidates}_"
            f"{self.holdout_rows}.npz"
        )
        path = Path(self.cache_dir) / name if self.cache_dir is not None else None
        if path is not None and path.is_file():
            # Reading compares every array with its checksum. What does not pass, for whatever reason, or has another's
            # name, is computed anew.
            with contextlib.suppress(Exception), np.load(path) as file:
                arrays = dict(file)
                if str(arrays.pop("name")) == name:
                    return _unpack(arrays)
        found = self._compute_holdout()
        if path is not None:
            buffer = io.BytesIO()
            np.savez(buffer, name=np.asarray(name), **_pack(found))  # pyright: ignore[reportArgumentType]  # no array is called allow_pickle
            write_atomically(path, buffer.getvalue())
        return found

    def _compute_holdout(self) -> Holdout:
        """Truth of the holdout, drawn in pieces of one size whatever R is, so that all sources share a program."""
        requests = self.holdout_batches * self.requests
        piece = max(1, SAMPLE_ROWS // self.candidates)
        drawn = [sample(self.world, self.log_seed, i, piece, self.candidates) for i in range(-(-requests // piece))]
        batches = [batch for batch, _ in drawn]
        shape = (self.holdout_batches, self.requests)

        def fold(values: np.ndarray) -> np.ndarray:
            return values.reshape(-1, *values.shape[2:])[:requests].reshape(*shape, *values.shape[2:])

        rows = jax.tree.map(fold, stack_truth([row for _, row in drawn]))
        groups, weighting = row_groups(batches)
        labels, mask = (fold(np.stack([getattr(b, name) for b in batches])) for name in ("labels", "label_mask"))
        valid = np.arange(requests * self.candidates).reshape(*shape, self.candidates) < self.holdout_rows
        return Holdout(rows, labels, mask, valid, fold(groups), weighting)

    @functools.cached_property
    def _make(self) -> Callable[[Any], Batch]:
        return jax.jit(self.batch)

    @functools.cached_property
    def _make_holdout(self) -> Callable[[Any], Batch]:
        def make(index: Any) -> Batch:
            sizes = self.requests, self.candidates
            batch = make_batch(self.world, self.log_seed, index, *sizes, True, self.history_length)
            row = index.astype(jnp.int32) * self.requests * self.candidates + jnp.arange(batch.valid.size)
            return dataclasses.replace(batch, valid=(row < self.holdout_rows).reshape(batch.valid.shape))

        return jax.jit(make)


def known_truth(asked: SourceRequest) -> KnownTruthSource:
    """The data set `known_truth` of a run. Of several hosts each draws, inside the step, what its devices train on.

    Raises:
        ValueError: passes or an order asked of an endless stream, or a wrong configuration of the log.
    """
    config = asked.config
    if config.passes != 1 or config.order != "time":
        raise ValueError(
            f"{config.name} is an endless stream: order is {config.order!r} and passes {config.passes}, "
            "expected 'time' and 1"
        )
    return KnownTruthSource(
        config.preset or DEFAULT_PRESET,
        requests=asked.requests,
        candidates=asked.candidates,
        log_seed=config.log_seed,
        holdout_rows=config.holdout_rows or DEFAULT_HOLDOUT_ROWS,
        history_length=config.history_length,
        overrides=config.overrides,
        cache_dir=asked.cache_dir,
    )


def _pack(holdout: Holdout) -> dict[str, np.ndarray]:
    rows = {f"row_{name}": value for name, value in vars(holdout.rows).items() if name != "parts"}
    parts = {f"part_{name}": value for name, value in holdout.rows.parts.items()}
    return rows | parts | {name: np.asarray(value) for name, value in vars(holdout).items() if name != "rows"}


def _unpack(arrays: dict[str, np.ndarray]) -> Holdout:
    def named(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    rest = {name: arrays[name] for name in ("labels", "mask", "valid", "groups")}
    rows = TruthRows(parts=named("part_"), **named("row_"))
    return Holdout(rows=rows, weighting=str(arrays["weighting"]), **rest)
