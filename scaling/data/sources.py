"""From the `data` section of a run configuration to a `Source`. Each set's code is imported only when it is
asked for.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from recscale.pallas_kernels.names import nearest

from .metrics import find
from .source import Source


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The keys a `data` section may hold. None, and 0 or "" where they mean nothing, stand for the default.

    Attributes:
        name: registered name of the set.
        preset, overrides: known-truth preset and the fields laid over it.
        log_seed: which stream of the known-truth log; the key of `order="shuffle"` elsewhere.
        root: folder (or file) of a downloaded set.
        history_length: events per history; None keeps the schema's.
        holdout_rows: rows of the holdout; of a set with validation and test splits, the most of each.
        order, passes: reading order and number of passes over the training rows of a downloaded set.
        max_dropped: largest share of rejected rows accepted.
        allow_modified: read files that are not the published ones; recorded as a warning.
        metrics: names or addresses of further metrics of the holdout; see `recscale.scaling.data.metrics`.
    """

    name: str
    preset: str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_seed: int = 0
    root: str | None = None
    history_length: int | None = None
    holdout_rows: int | None = None
    order: str = "time"
    passes: int = 1
    max_dropped: float = 0.01
    allow_modified: bool = False
    metrics: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Request:
    config: DataConfig
    requests: int
    candidates: int
    cache_dir: Path | None
    host: int
    hosts: int


def list_sources() -> list[str]:
    """Names `make_source` knows."""
    return list(_SOURCES)


def make_source(
    data_config: Mapping[str, Any],
    *,
    requests: int,
    candidates: int = 1,
    cache_dir: str | Path | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Source:
    """The `Source` a run reads.

    Args:
        data_config: mapping (a ConfigDict will do) with the keys of `DataConfig`; only `name` is required.
        requests, candidates: R of the global batch, and C.
        cache_dir: folder of converted copies and stored truth; None = beside the data, or none.
        host, hosts: this process's share of every batch.

    Raises:
        KeyError: unknown name or unknown key; the message names the nearest one.
        FileNotFoundError, ValueError: what the set's own loader says about its files.
    """
    config = _parse(data_config)
    if config.name not in _SOURCES:
        raise KeyError(unknown_name(config.name, _SOURCES))
    cache = Path(cache_dir) if cache_dir is not None else None
    source = _SOURCES[config.name](_Request(config, requests, candidates, cache, host, hosts))
    if config.metrics and "metrics" not in inspect.signature(source.evaluate).parameters:
        raise ValueError(f"data set {config.name!r} evaluates no further metrics: data.metrics must be empty")
    return source


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Text of the error about an unknown data set, with the nearest known one."""
    return f"unknown data set {name!r}{nearest(name, known)}"


def _parse(data_config: Mapping[str, Any]) -> DataConfig:
    plain = dict(data_config.items())
    known = [field.name for field in dataclasses.fields(DataConfig)]
    for key in plain:
        if key not in known:
            raise KeyError(f"unknown key {key!r} in the data configuration{nearest(key, known)}")
    if not plain.get("name"):
        raise KeyError(f"the data configuration names no data set; known: {', '.join(_SOURCES)}")
    given = {key: value for key, value in plain.items() if value is not None}
    for key in ("history_length", "holdout_rows", "root"):
        given[key] = given.get(key) or None
    given["overrides"] = dict(given.get("overrides", {}).items())
    given["metrics"] = tuple(given.get("metrics", ()))
    for metric in given["metrics"]:
        find(metric)
    return DataConfig(**given)


def _movielens_100k(asked: _Request) -> Source:
    from .importing import movielens, movielens_files
    from .stored_log.source import GrainSource

    config = asked.config
    if config.overrides:
        raise ValueError(f"{config.name} takes no overrides, found {', '.join(config.overrides)}")
    if config.root is None:
        raise FileNotFoundError(
            f"{config.name}: data.root is empty; give the folder of the data set (--data DIR). "
            f"{movielens_files.HOW_TO_GET}"
        )
    log = movielens.load(
        config.root,
        max_dropped=config.max_dropped,
        allow_modified=config.allow_modified,
        cache_dir=asked.cache_dir,
    )
    return GrainSource(
        log,
        requests=asked.requests,
        candidates=asked.candidates,
        history_length=config.history_length,
        holdout_rows=config.holdout_rows,
        order=config.order,  # type: ignore[arg-type]  (checked there)
        seed=config.log_seed,
        passes=config.passes,
        host=asked.host,
        hosts=asked.hosts,
    )


def _known_truth(asked: _Request) -> Source:
    from .known_truth.source import KnownTruthSource

    config = asked.config
    if config.passes != 1 or config.order != "time":
        raise ValueError(
            f"{config.name} is an endless stream: order is {config.order!r} and passes {config.passes}, "
            "expected 'time' and 1"
        )
    if asked.hosts != 1:
        raise ValueError(f"{config.name} is generated inside the step, sharded by the mesh; hosts must be 1")
    given = {"config": config.preset, "holdout_rows": config.holdout_rows}
    given = {key: value for key, value in given.items() if value is not None}  # the rest has the source's defaults
    return KnownTruthSource(
        requests=asked.requests,
        candidates=asked.candidates,
        log_seed=config.log_seed,
        history_length=config.history_length,
        overrides=config.overrides,
        cache_dir=asked.cache_dir,
        **given,
    )


_SOURCES: dict[str, Callable[[_Request], Source]] = {
    "known_truth": _known_truth,
    "movielens-100k": _movielens_100k,
}
