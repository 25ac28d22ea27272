"""Data sets by name: from the `data` section of a run configuration to a `Source`.

Adding one = one file with a callable `SourceRequest -> Source` and one line in `DATA_SETS`. Other distributions add
theirs under the entry-point group `recscale.datasets`, or are named as `package.module:attribute`. Each set's code is
imported only when it is asked for.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recscale.pallas_kernels import names

from .metrics import find
from .source import DataConfig, Source, SourceRequest

GROUP = "recscale.datasets"
STORED = "stored"  # a log that `recscale data import` made, in the folder data.root
DATA_SETS = {
    "known_truth": "recscale.scaling.data.known_truth.source:known_truth",
    STORED: "recscale.scaling.data.stored_log.source:stored",
}
_MEMBERS = ("schema", "requests", "candidates", "on_device", "total_rows", "batches",
            "batch", "iterate", "holdout", "evaluate", "facts")  # fmt: skip


def list_sources() -> list[str]:
    """Names `make_source` knows: those of this package, then those that other distributions bring."""
    return names.available(GROUP, DATA_SETS)


def make_source(
    data_config: Mapping[str, Any] | ConfigDict,
    *,
    requests: int,
    candidates: int = 1,
    cache_dir: str | Path | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Source:
    """The `Source` a run reads.

    Args:
        data_config: the keys of `DataConfig`; only `name` is required.
        requests, candidates: R of the global batch, and C.
        cache_dir: folder of converted copies and stored truth; None = beside the data, or none.
        host, hosts: this process's share of every batch.

    Raises:
        KeyError: unknown name or unknown key; the message names the nearest one.
        ValueError: the module or attribute of an address does not exist, or what it returns is no `Source`.
        FileNotFoundError, ValueError: what the set's own loader says about its files.
    """
    config = _parse(data_config)
    known = list_sources()
    if config.name not in known and ":" not in config.name:
        raise KeyError(f"unknown data set {config.name!r}{names.nearest(config.name, known)}")
    make = names.load(GROUP, config.name, DATA_SETS, "data set")
    cache = Path(cache_dir) if cache_dir is not None else None
    source = make(SourceRequest(config, requests, candidates, cache, host, hosts))
    lacking = [member for member in _MEMBERS if not hasattr(source, member)]
    if lacking:
        found = f"an object of type {type(source).__name__}"
        raise ValueError(f"data set {config.name!r} gave {found}, no Source: it lacks {', '.join(lacking)}")
    if config.extra_tables:
        source.schema = source.schema.with_extra_tables(config.extra_tables)
    if config.metrics and "metrics" not in inspect.signature(source.evaluate).parameters:
        raise ValueError(f"data set {config.name!r} evaluates no further metrics: data.metrics must be empty")
    return source


def use_log(config: ConfigDict, root: str) -> None:
    """Points a configuration at the folder of an imported log, or at whatever folder its own data set reads."""
    config.data.root = root
    if config.data.name == "known_truth" and (Path(root) / "meta.json").is_file():
        config.data.name, config.data.preset = STORED, ""


def pin_log(config: ConfigDict) -> None:
    """Notes in a run's configuration which stored log it reads, so that another log is another run.

    Raises:
        FileNotFoundError, ValueError: there is no stored log in `data.root`.
    """
    if config.data.name != STORED or config.data.get("log"):
        return
    from .stored_log.packed import PackedLog
    from .stored_log.source import stored_folder

    with config.unlocked():
        config.data.log = PackedLog(stored_folder(config.data.root)).identity


def _parse(data_config: Mapping[str, Any] | ConfigDict) -> DataConfig:
    plain = dict(data_config.items())
    known = [field.name for field in dataclasses.fields(DataConfig)]
    for key in plain:
        if key not in known:
            raise KeyError(f"unknown key {key!r} in the data configuration{names.nearest(key, known)}")
    if not plain.get("name"):
        raise KeyError(f"the data configuration names no data set; known: {', '.join(list_sources())}")
    given = {key: value for key, value in plain.items() if value is not None}
    for key in ("history_length", "holdout_rows", "root", "embedding_width", "embedding_rows"):
        given[key] = given.get(key) or None
    given["overrides"] = dict(given.get("overrides", {}).items())
    given |= {key: tuple(given.get(key, ())) for key in ("metrics", "extra_tables")}
    for metric in given["metrics"]:
        find(metric)
    return DataConfig(**given)
