"""Writes a trained model as programs that run anywhere jax runs: `jax.export` artefacts, arrays and a manifest.

    <out>/encode_user.jax, score.jax              from vectors to logits; R requests and C candidates are symbols
    <out>/lookup_user.jax, lookup_candidates.jax  from ids to vectors
    <out>/weights.npz, tables.npz                 arrays of the model, embedding tables
    <out>/vocabularies.npz                        of an imported log: the values of each table in id order
    <out>/manifest.json                           written last: what it is, and what the programs take
    <out>/served.py                               loads all this with jax and numpy

Programs take and give plain dictionaries and lists, so that no class of ours stands in a file. Between the two calls
lies a flat list of arrays.

With `w8a16` the model's kernels are stored as int8 with a float32 scale per output channel and multiplied as such: a
weight is off by half a scale at most, 1/254 of the largest of its channel. See `recscale.models.layers.quantisation`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from recscale.models.inputs import CandidateInputs, CandidateSide, Events, History, Schema, UserInputs, UserSide
from recscale.models.inputs.batch import ItemContent, QueryContent
from recscale.models.inputs.tables import embed_candidates, embed_user, table_lookup
from recscale.models.layers.quantisation import quantize
from recscale.scaling.counting.abstract import abstract_batch
from recscale.scaling.data.stored_log.source import GrainSource
from recscale.scaling.records import provenance
from recscale.scaling.records.files import replacing, write_atomically
from recscale.scaling.records.runs import read_record
from recscale.scaling.training.model_files import loaded, restore_model

from . import served

SYMBOLS = "R, C"
_VERSIONS = ("recscale", "jax", "flax", "numpy")
_INT8 = "int8 kernels, one scale per output channel: each weight within half a scale of the trained one"


def export_run(
    run_dir: Path | str,
    out: Path | str,
    *,
    root: str | None = None,
    platforms: Sequence[str] = (),
    w8a16: bool = False,
) -> dict[str, Any]:
    """Exports the model that a run left; returns the manifest.

    Args:
        run_dir: folder of a run. out: folder to write. root: folder of its data set, None = its own.
        platforms: "cpu", "cuda", "tpu": where the programs are to run; none given is the one of this process.
        w8a16: int8 kernels.

    Raises:
        FileNotFoundError: no run, no model, or no data set. ValueError: `out` holds something else, or the model has no
            kernel that can be int8.
    """
    trainer, state, source = restore_model(run_dir, root)
    model, tables, schema = loaded(trainer, state, source)
    record = read_record(Path(run_dir)) or {}
    about = {
        "architecture": record["config"]["architecture"],
        "config": record["config"]["model"],
        "run_id": record["run_id"],
        "metrics": record.get("metrics", {}),
    }
    vocabularies = source.vocabularies() if isinstance(source, GrainSource) else {}
    arrays = tables.arrays()
    return export_model(
        model, arrays, schema, out, platforms=platforms, w8a16=w8a16, about=about, vocabularies=vocabularies
    )


def export_model(
    model: Any,
    tables: Mapping[str, Any],
    schema: Schema,
    out: Path | str,
    *,
    platforms: Sequence[str] = (),
    w8a16: bool = False,
    about: Mapping[str, Any] | None = None,
    vocabularies: Mapping[str, Shaped[np.ndarray, " n"]] | None = None,
) -> dict[str, Any]:
    """Exports a model of `recscale.models` with its tables; see `export_run`.

    Args:
        model, tables, schema: a ranker, table name -> rows [V, width], what its inputs look like.
        about: further entries of the manifest.
        vocabularies: table -> values in id order, from id 2 on; "<table>/rows" -> row of each id, where ids are hashed.
    """
    out = _empty(Path(out))
    if w8a16:
        model = quantize(model, implementation="xla")  # runs on every platform
    graph, weights = nnx.split(model)
    leaves, tree = jax.tree.flatten(weights)
    named = {f"{k:04d}": leaf for k, leaf in enumerate(leaves)}
    exported = _programs(graph, tree, named, tables, schema, tuple(platforms))
    for name, program in exported.items():
        write_atomically(out / served.PROGRAM.format(name), bytes(program.serialize(vjp_order=0)))
    vocabularies = vocabularies or {}
    for name, arrays in ((served.WEIGHTS, named), (served.TABLES, tables), (served.VOCABULARIES, vocabularies)):
        with replacing(out / name) as temporary, open(temporary, "wb") as handle:
            stored: Any = {key: _stored(array) for key, array in arrays.items()}
            np.savez(handle, **stored)
    write_atomically(out / Path(served.__file__).name, Path(served.__file__).read_bytes())
    taken = {name: _written(_arguments(program)) for name, program in exported.items()}
    manifest = {
        "format": served.FORMAT,
        **(about or {}),
        "tasks": [task.name for task in schema.tasks],
        "symbols": {"R": "requests of a call", "C": "candidates of each request"},
        "inputs": {
            "user": taken["lookup_user"][1],
            "user_vectors": taken["encode_user"][1],
            "candidates": taken["lookup_candidates"][1],
            "candidate_vectors": taken["score"][2],
        },
        "state": taken["score"][1],
        "platforms": list(exported["score"].platforms),
        "vocabularies": [name for name in vocabularies if not name.endswith("/rows")],
        "schema": schema.to_dict(),
        "weights": _INT8 if w8a16 else "float",
        "versions": provenance.versions(_VERSIONS),
        "date": provenance.now(),
    }
    write_atomically(out / served.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _programs(
    graph: Any, tree: Any, weights: Mapping[str, Any], tables: Mapping[str, Any], schema: Schema, platforms: tuple
) -> dict[str, jax.export.Exported]:
    """The four programs, with symbols for R and C."""
    symbols: Any = jax.export.symbolic_shape(SYMBOLS)
    batch = abstract_batch(schema, *symbols)

    def export(call: Callable[..., Any], *arguments: Any) -> jax.export.Exported:
        return jax.export.export(jax.jit(call), platforms=platforms or None)(*arguments)

    def lookup_user(tables, user):
        return _plain(embed_user(schema, _user_side(user), table_lookup(tables)))

    def lookup_candidates(tables, side):
        return _plain(embed_candidates(schema, CandidateSide(**side), table_lookup(tables)))

    def merged(weights):
        return nnx.merge(graph, jax.tree.unflatten(tree, [weights[name] for name in sorted(weights)]))

    def state_of(weights, user):
        return merged(weights).encode_user(_user_inputs(user))

    def encode_user(weights, user):
        return jax.tree.leaves(state_of(weights, user))

    def score(weights, state, side):
        state = jax.tree.unflatten(state_tree, state)
        content = {"content": ItemContent(**side["content"])} if "content" in side else {}
        return merged(weights).score(state, CandidateInputs(**{**side, **content})).logits

    shapes, rows = jax.tree.map(_shape, (dict(weights), dict(tables)))
    side, own = _plain(batch.user), _plain(batch.candidates)
    user = jax.eval_shape(lookup_user, rows, side)
    vectors = jax.eval_shape(lookup_candidates, rows, own)
    states, state_tree = jax.tree.flatten(jax.eval_shape(state_of, shapes, user))
    return {
        "lookup_user": export(lookup_user, rows, side),
        "encode_user": export(encode_user, shapes, user),
        "lookup_candidates": export(lookup_candidates, rows, own),
        "score": export(score, shapes, states, vectors),
    }


def _plain(value: Any) -> Any:
    """Nested dictionaries of what a batch or its inputs hold; what is None is left out."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    return value


def _user_side(plain: Mapping[str, Any]) -> UserSide:
    return UserSide(**{**plain, "histories": {name: History(**h) for name, h in plain["histories"].items()}})


def _user_inputs(plain: Mapping[str, Any]) -> UserInputs:
    histories = {name: Events(**history) for name, history in plain["histories"].items()}
    content = {"content": QueryContent(**plain["content"])} if "content" in plain else {}
    return UserInputs(**{**plain, "histories": histories, **content})


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _arguments(program: jax.export.Exported) -> tuple[Any, ...]:
    """Shapes of a program's arguments, in their dictionaries."""
    return jax.tree.unflatten(program.in_tree, program.in_avals)[0]


def _written(tree: Any) -> Any:
    """Shapes as text, `float32[R, C, 16]`, in the same dictionaries."""
    return jax.tree.map(lambda aval: f"{aval.dtype}[{', '.join(map(str, aval.shape))}]", tree)


def _stored(array: Any) -> np.ndarray:
    """As NumPy's files hold it without pickling: values of a vocabulary that are text as fixed-width text."""
    array = np.asarray(array)
    return array.astype(str) if array.dtype == object else array


def _empty(out: Path) -> Path:
    """The folder to write to; one with something else in it is left alone."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / served.MANIFEST).exists())):
        raise ValueError(f"{out} holds something else than an exported model; name a new folder")
    (out / served.MANIFEST).unlink(missing_ok=True)
    return out
