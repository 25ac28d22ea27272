"""Exported models as a server calls them: time of `encode_user`, of `score`, and of both, from vectors to logits.

    R 8 requests, C 64 candidates each, D 256; every call waited for, so the tail is that of single calls

A name is a registered architecture, built with the sizes of the serving benchmark where its config has them and its own
defaults elsewhere, with random parameters; or the folder of an export.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.models import build, get_config, list_models, reads_history
from recscale.models.inputs import Content, Schema, reference_schema
from recscale.models.inputs.tables import EmbeddingTables
from recscale.scaling.serving.export import export_model
from recscale.scaling.serving.served import Served, load

from .serving_shape import ServingShape, history_schema
from .timing import clock

_SIZES = {"tokens": "tokens", "width": "width", "layers": "layers"}  # key of a config -> attribute of the shape
_WARMUP = 3


def measure_exported(*, names: Iterable[str], shape: ServingShape, calls: int) -> dict[str, Any]:
    """Measures and returns JSON-able figures.

    Args:
        names: architectures, or folders of exports; none given is every registered architecture.
        shape: sizes. calls: timed calls of each program.

    Returns:
        models: name -> {encode_user, score, both: {p50_ms, p99_ms}}; requests, candidates, calls.
    """
    found = {}
    for name in names or list_models():
        found[name] = _measure(load(name), shape, calls) if Path(name).is_dir() else _exported(name, shape, calls)
    return {"models": found, "requests": shape.requests, "candidates": shape.candidates, "calls": calls}


def _exported(name: str, shape: ServingShape, calls: int) -> dict[str, Any]:
    schema = _schema(name)
    config = get_config(name)
    part = config.get("backbone", config)
    with config.unlocked():
        part.update({key: getattr(shape, own) for key, own in _SIZES.items() if key in part})
    model = build(name, schema, config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    tables = EmbeddingTables(schema, rngs=nnx.Rngs(0)).arrays()
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, tables, schema, folder)
        return _measure(load(folder), shape, calls)


def _schema(name: str) -> Schema:
    """With a history for models that read one, and with content for LEMUR, which encodes it."""
    schema = history_schema() if reads_history(name) else reference_schema()
    content = Content(1000, 1000, segments=(4, 4), query_length=4, histories=("history",))
    return dataclasses.replace(schema, content=content) if name == "lemur" else schema


def _measure(model: Served, shape: ServingShape, calls: int) -> dict[str, Any]:
    sizes = {"R": shape.requests, "C": shape.candidates}
    user = _drawn(model.manifest["inputs"]["user_vectors"], sizes)
    candidates = _drawn(model.manifest["inputs"]["candidate_vectors"], sizes)
    state = model.encode_user(user)
    programs: dict[str, Callable[[], Any]] = {
        "encode_user": lambda: model.encode_user(user),
        "score": lambda: model.score(state, candidates),
        "both": lambda: model.score(model.encode_user(user), candidates),
    }
    return {name: _tail(clock(call, warmup=_WARMUP, runs=calls)) for name, call in programs.items()}


def _tail(seconds: list[float]) -> dict[str, float]:
    median, tail = np.quantile(seconds, (0.5, 0.99))
    return {"p50_ms": 1e3 * float(median), "p99_ms": 1e3 * float(tail)}


def _drawn(wanted: Any, sizes: dict[str, int]) -> Any:
    """Standard normal numbers, and ones where integers are wanted, for shapes as the manifest writes them."""
    if isinstance(wanted, dict):
        return {name: _drawn(entry, sizes) for name, entry in wanted.items()}
    kind, _, lengths = wanted.rstrip("]").partition("[")
    shape = [sizes[part] if part in sizes else int(part) for part in lengths.split(", ")]
    drawn = np.random.default_rng(0).standard_normal(shape) if kind.startswith("float") else np.ones(shape)
    return jax.device_put(drawn.astype(kind))
