"""What a run uses that is no part of recscale: models, data sets and metrics of other distributions, or by address."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recscale.models import registry
from recscale.pallas_kernels import names
from recscale.scaling.data import metrics, sources


def brought(config: ConfigDict, folder: Path | None) -> list[dict[str, str]]:
    """Kind, name, address, distribution and version of everything a run's configuration names from elsewhere.

    Of a module that lies in `folder`, beside the sweep file, the folder is noted as well: see `make_importable`.
    """
    asked = [("model", part) for part in config.architecture.split("+")]
    asked += [("data set", config.data.name), *(("metric", name) for name in config.data.get("metrics", ()))]
    found = []
    for kind, name in asked:
        origin = _origin(kind, name)
        if origin is not None:
            top = origin["address"].partition(":")[0].partition(".")[0]
            beside = folder is not None and _lies_in(top, folder)
            found.append({"kind": kind, **origin} | ({"folder": str(folder)} if beside else {}))
    return found


def make_importable(rows: Iterable[Mapping[str, Any]]) -> None:
    """Lets this process import the modules that lay beside the sweep file when these rows were planned."""
    for row in rows:
        for thing in row.get("brought", ()):
            if "folder" in thing and thing["folder"] not in sys.path:
                sys.path.insert(0, thing["folder"])


@functools.cache
def _origin(kind: str, name: str) -> dict[str, str] | None:
    if kind == "model":
        return names.origin(registry.GROUP, name, registry.MODELS | dict.fromkeys(registry.list_presets(), ""))
    if kind == "data set":
        return names.origin(sources.GROUP, name, sources.DATA_SETS)
    return names.origin(metrics.GROUP, name, dict.fromkeys(metrics.METRICS, ""))


def _lies_in(module: str, folder: Path) -> bool:
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    return any(place is not None and Path(place).parent == folder for place in places)
