"""Sweep files: Python files with `get_config()` and `get_sweep()`, and `get_report()` or `get_rates()` if wanted.

    get_config() -> ConfigDict        the base configuration of every run
    get_sweep() -> list of points     what varies, built from the combinators
    get_report() -> dict              options of the report: form, axes, target, truth, ... (optional)
    get_rates() -> dict               options of `rate_search`, around each point's `training.lr` (optional)

A sweep file is named by its path (it may import modules that lie beside it), as a module of an installed package
(`my_lab.sweeps.widths`) or, for those that come with recscale, by its name alone (`quickstart`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from recscale.pallas_kernels.names import closest

_REQUIRED = ("get_config", "get_sweep")


class SweepFileError(ValueError):
    """A sweep file that is missing, does not import, or lacks what a sweep file must define."""


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """An imported sweep file. `name` is the file's name without its ending; results go to `runs/<name>` by default.

    `folder`: the file's own where it was named by its path, so that modules beside it can be imported; else None.
    """

    name: str
    path: Path
    module: ModuleType
    folder: Path | None = None

    def config(self, **arguments: Any) -> ConfigDict:
        """What `get_config` returns, checked to be a ConfigDict."""
        return self._checked("get_config", arguments, ConfigDict, "an ml_collections ConfigDict")

    def points(self, **arguments: Any) -> list[dict[str, Any]]:
        """What `get_sweep` returns, checked to be a non-empty list of flat dictionaries with string keys."""
        points = self._checked("get_sweep", arguments, list, "a list of dictionaries {dotted key: value}")
        if not points:
            raise SweepFileError(f"{self.path}: get_sweep() returned no points; a sweep of one run is [{{}}]")
        for i, point in enumerate(points):
            if not isinstance(point, Mapping) or not all(isinstance(key, str) for key in point):
                raise SweepFileError(f"{self.path}: point {i} of get_sweep() is {point!r}, not {{dotted key: value}}")
        return [dict(point) for point in points]

    def report(self) -> dict[str, Any]:
        """Options of the report, empty if the file gives none."""
        return self._options("get_report", "a dictionary of report options") or {}

    def rates(self) -> dict[str, Any] | None:
        """Options of the search for rates that comes first; None if the file asks for none."""
        return self._options("get_rates", "a dictionary of options of `rate_search`")

    def _options(self, name: str, wanted: str) -> dict[str, Any] | None:
        return self._checked(name, {}, dict, wanted) if hasattr(self.module, name) else None

    def _checked(self, name: str, arguments: Mapping[str, Any], kind: type, wanted: str) -> Any:
        function: Callable[..., Any] = getattr(self.module, name)
        value = function(**arguments)
        if not isinstance(value, kind):
            raise SweepFileError(f"{self.path}: {name}() returned {type(value).__name__}, expected {wanted}")
        return value


def load(name: str | Path) -> SweepFile:
    """Imports a sweep file.

    Args:
        name: path of a Python file, `package.module`, or the name of a sweep file of recscale's own.

    Raises:
        SweepFileError: no such file or name (installed names are listed), the import failed (the cause is chained), or
            `get_config` or `get_sweep` is missing.
    """
    path, folder = _find(str(name)), None
    if path is None:
        module = _guarded(str(name), lambda: importlib.import_module(str(name)))
        path = Path(module.__file__ or str(name))
    else:
        folder = None if path in installed().values() else path.parent
        module = _import(path, folder)
    missing = [required for required in _REQUIRED if not callable(getattr(module, required, None))]
    if missing:
        lacking = " and no ".join(f"{name}()" for name in missing)
        raise SweepFileError(f"{path} defines no {lacking}; a sweep file needs both get_config() and get_sweep()")
    return SweepFile(path.stem, path, module, folder)


def installed() -> dict[str, Path]:
    """Name -> path of the sweep files that come with the package."""
    folder = Path(__file__).parents[1]
    return {path.stem: path for path in sorted(folder.rglob("*.py")) if "\ndef get_sweep(" in path.read_text("utf-8")}


def papers() -> dict[str, Path]:
    """Name -> path of the files that hold a paper's orderings: sweep files, and others that run a study."""
    folder = Path(__file__).parents[1] / "papers"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if "\n\ndef get_" in path.read_text("utf-8")}


def _find(name: str) -> Path | None:
    """The file of a path or a name; None if `name` is a module of an installed package."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    known = installed()
    if name in known:
        return known[name]
    if _is_module(name):
        return None
    if path.suffix == ".py" or len(path.parts) > 1:
        raise SweepFileError(f"no sweep file {path} (in {Path.cwd()}); installed sweep files are {', '.join(known)}")
    raise SweepFileError(
        f"no sweep file and no installed sweep {name!r}; nearest installed name is {closest(name, known)!r} "
        f"(installed: {', '.join(known)}); a file of your own is named by its path"
    )


def _is_module(name: str) -> bool:
    try:
        return "." in name.strip(".") and importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _import(path: Path, folder: Path | None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_recscale_sweep_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SweepFileError(f"{path} is not a Python file; a sweep file ends in .py")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[spec.name] = module  # dataclasses and pickling inside the file look their module up
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as for a script: it stays, for what the file names is imported later
    try:
        _guarded(str(path), lambda: loader.exec_module(module))
    except SweepFileError:
        del sys.modules[spec.name]
        raise
    return module


def _guarded(what: str, importing: Callable[[], Any]) -> Any:
    try:
        return importing()
    except Exception as error:
        raise SweepFileError(f"{what} failed to import: {type(error).__name__}: {error}") from error
