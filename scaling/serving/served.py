"""Loads an exported ranking model and scores candidates with it; needs jax and numpy alone (and flatbuffers, with which
jax reads programs).

A copy of this file stands in the folder of every export:

    from served import load

    model = load("exported")
    user = model.lookup_user(ids)                       ids and numbers of R requests -> vectors
    state = model.encode_user(user)                     once per request
    logits = model.score(state, model.lookup_candidates(candidate_ids))      [R, C, tasks], C candidates a request

R and C are free from call to call; each new pair compiles once. What goes in is nested dictionaries of arrays, named
and shaped as `model.manifest["inputs"]` says; a value that the log knows becomes an id by `model.ids(table, values)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

PROGRAMS = ("lookup_user", "encode_user", "lookup_candidates", "score")
MANIFEST, WEIGHTS, TABLES, VOCABULARIES = "manifest.json", "weights.npz", "tables.npz", "vocabularies.npz"
PROGRAM = "{}.jax"  # file of a program
PADDING, UNKNOWN, FIRST_ID = 0, 1, 2
FORMAT = 1


class Served:
    """An exported model. `manifest` says what it is and what it takes."""

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError(f"{folder} holds no exported model (no {MANIFEST})")
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"{folder} has format {self.manifest['format']}, this file reads {FORMAT}")
        self._weights = _arrays(folder / WEIGHTS)
        self._tables = _arrays(folder / TABLES)
        self._vocabularies = np.load(folder / VOCABULARIES)
        programs = {name: (folder / PROGRAM.format(name)).read_bytes() for name in PROGRAMS}
        self._calls = {
            name: jax.jit(jax.export.deserialize(bytearray(program)).call) for name, program in programs.items()
        }

    def lookup_user(self, user: dict[str, Any]) -> dict[str, Any]:
        """Vectors of users' fields and histories from their ids: `manifest["inputs"]["user"]` -> `["user_vectors"]`."""
        return self._calls["lookup_user"](self._tables, self._named("user", user))

    def lookup_candidates(self, candidates: dict[str, Any]) -> dict[str, Any]:
        """The same of candidates: `manifest["inputs"]["candidates"]` -> `["candidate_vectors"]`."""
        return self._calls["lookup_candidates"](self._tables, self._named("candidates", candidates))

    def encode_user(self, user: dict[str, Any]) -> list[jax.Array]:
        """Everything that no candidate changes, of R requests; for `score`."""
        return self._calls["encode_user"](self._weights, self._named("user_vectors", user))

    def score(self, state: list[jax.Array], candidates: dict[str, Any]) -> jax.Array:
        """Logits [R, C, tasks], float32."""
        return self._calls["score"](self._weights, state, self._named("candidate_vectors", candidates))

    def ids(self, table: str, values: Any) -> np.ndarray:
        """Ids of a log's values, int32: 1 for one that training did not show. Of logs with vocabularies only."""
        if table not in self.manifest["vocabularies"]:
            known = ", ".join(self.manifest["vocabularies"]) or "none"
            raise ValueError(f"there is no vocabulary of table {table!r}; those of the export: {known}")
        known = self._vocabularies[table]
        order = np.argsort(known)
        # Text is not cut to the width of the longest known value.
        values = np.asarray(values, str if known.dtype.kind == "U" else known.dtype)
        place = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
        ids = np.where(known[order[place]] == values, order[place] + FIRST_ID, UNKNOWN).astype(np.int32)
        rows = f"{table}/rows"
        return self._vocabularies[rows][ids] if rows in self._vocabularies else ids

    def _named(self, what: str, given: dict[str, Any]) -> Any:
        return _checked(given, self.manifest["inputs"][what], what)


def load(folder: Path | str) -> Served:
    """The model exported to a folder, on jax's default device.

    Raises:
        FileNotFoundError: no export. ValueError: one of another format.
    """
    return Served(folder)


def _arrays(path: Path) -> dict[str, jax.Array]:
    with np.load(path) as stored:
        return {name: jnp.asarray(stored[name]) for name in stored.files}


def _checked(given: Any, wanted: Any, where: str) -> Any:
    """The arrays that a program takes; ValueError names what is missing or too much."""
    if isinstance(wanted, str):
        return jnp.asarray(given, wanted.partition("[")[0])
    names = set(given)
    if names != set(wanted):
        missing, more = sorted(set(wanted) - names), sorted(names - set(wanted))
        raise ValueError(
            f"{where} lacks {', '.join(missing) or 'nothing'} and has unknown {', '.join(more) or 'nothing'}"
        )
    return {name: _checked(given[name], wanted[name], f"{where}.{name}") for name in wanted}
