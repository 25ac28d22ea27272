"""Things by name: those of this package, those that another distribution brings, and any object by its address.

A table maps names to "module:attribute" texts. Another distribution adds names through an entry-point group
(`recscale.models`, `recscale.datasets`, `recscale.forms`, `recscale.metrics`, `recscale.executors`,
`recscale.kernels`); a name that holds a colon is an address itself, `package.module:attribute`. Nothing is imported
before it is asked for, so a worker process resolves a name just as the planner did.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

# Longer lists of known names are not printed whole.
_LISTED = 12


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that `name` most likely means, and all of them, or the three nearest
    of many.

    Of dotted names the last part counts as much as the whole.
    """
    known = [str(other) for other in known]
    if not known:
        return ". Known: none"
    first, *others = sorted(known, key=functools.partial(_likeness, name), reverse=True)
    shown = f"Known: {', '.join(known)}" if len(known) <= _LISTED else f"Also near: {', '.join(others[:2])}"
    return f"; did you mean {first!r}? {shown}"


def closest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`. Raises ValueError if there is none to choose from."""
    return max(known, key=functools.partial(_likeness, name))


def _likeness(name: str, candidate: str) -> float:
    whole = difflib.SequenceMatcher(None, name, candidate).ratio()
    last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return max(whole, last) + 0.5 * min(whole, last)


def available(group: str, table: Mapping[str, str]) -> list[str]:
    """Names that `load` takes: those of the table, then those that other distributions bring, without addresses."""
    return [*table, *(name for name in _brought(group) if name not in table)]


def load(group: str, name: str, table: Mapping[str, str], what: str) -> Any:
    """The object called `name`: of `table`, of a distribution that declares it under `group`, or at that address.

    Args:
        group: entry-point group.
        name: a name, or `package.module:attribute`.
        table: name -> "module:attribute" of this package; these names cannot be taken by others.
        what: what such a thing is called in messages, e.g. "model".

    Raises:
        ValueError: there is no such name (the nearest is named), or its module or attribute does not exist.
    """
    if name in table:
        return _at(table[name], what, name)
    brought = _brought(group)
    if name in brought:
        return _at(brought[name].value, what, name)
    if ":" in name:
        return _at(name, what, name)
    known = available(group, table)
    raise ValueError(f"there is no {what} {name!r}{nearest(name, known)}; or name one as package.module:attribute")


def origin(group: str, name: str, table: Mapping[str, str]) -> dict[str, str] | None:
    """{"name", "address", "distribution", "version"} of a name from elsewhere; None for one of this package.

    The distribution and version of an address are those of the distribution its top package came with, "" if unknown.
    """
    if name in table:
        return None
    entry = _brought(group).get(name)
    if entry is not None and entry.dist is not None:
        return {"name": name, "address": entry.value, "distribution": entry.dist.name, "version": entry.dist.version}
    top = name.partition(":")[0].partition(".")[0]
    found = importlib.metadata.packages_distributions().get(top, [""])[0]
    version = importlib.metadata.version(found) if found else ""
    return {"name": name, "address": name, "distribution": found, "version": version}


@functools.cache
def _brought(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}


def _at(address: str, what: str, name: str) -> Any:
    module, _, attribute = address.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module missing inside the one that is named is that module's own fault, and its own message is better.
        if error.name and not (module + ".").startswith(error.name + "."):
            raise
        raise ValueError(f"{what} {name!r}: there is no module {module!r} to import it from") from error
    try:
        return functools.reduce(getattr, attribute.split("."), found)
    except AttributeError as error:
        raise ValueError(f"{what} {name!r}: {module} has no attribute {attribute!r}") from error
