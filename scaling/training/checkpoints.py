"""Checkpoints of a group: the state, the trunk a branch left from, and where in the program it stands.

    checkpoints/<tick>/arrays/         Orbax: {"state", "trunk"}, each a flat dictionary keyed by path in the state
    checkpoints/<tick>/interval.npz    metrics of the steps since the last line of `metrics.jsonl`
    checkpoints/<tick>/manifest.json   position, every array's shape, every file's hash; written last

A checkpoint without its manifest was cut short, and one whose files are not what the manifest says was damaged: neither
is read, and the next older one takes its place.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from recscale.scaling.processes import agreed, is_first, wait_for_all
from recscale.scaling.records.advice import advised
from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.sealed import sealed, unsealed

from .config import KEPT_CHECKPOINTS

logging.getLogger("absl").setLevel(logging.WARNING)

FORMAT = 2
MANIFEST = "manifest.json"
_ARRAYS, _INTERVAL = "arrays", "interval.npz"


class Restored(NamedTuple):
    """What a checkpoint held."""

    position: dict[str, Any]
    state: Any
    trunk: Any | None


class Checkpoints:
    """Checkpoints below a folder, the newest two kept.

    Attributes:
        folder: where they are.
        discarded: {"checkpoint": tick, "reason": why} of those `restore` could not use.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
        # Saving is synchronous: on the CPU a device array and its host view are the same memory, which the next
        # step's donated buffers would overwrite under an asynchronous writer.
        self._arrays = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self.discarded: list[dict[str, Any]] = []

    def save(self, tick: int, position: dict[str, Any], state: Any, trunk: Any | None) -> None:
        """Stores a state; `tick` grows along the program, `position` is plain JSON but for its `interval`, the metrics
        of an unfinished logging interval: name -> array [steps, ...]. Every process writes the parts it holds, all must
        call; the first writes the rest."""
        interval, position = position.get("interval", {}), {k: v for k, v in position.items() if k != "interval"}
        folder, trees = self.save_arrays(tick, state, trunk)
        if is_first():
            self._seal(folder, position, interval, trees)
        wait_for_all(f"checkpoint {tick} is whole")

    def _seal(self, folder: Path, position: dict[str, Any], interval: dict[str, Any], trees: dict[str, Any]) -> None:
        """Writes what lies beside the arrays, the manifest last, and deletes the checkpoints that it replaces."""
        np.savez(folder / _INTERVAL, **interval)  # pyright: ignore[reportArgumentType]  # none is allow_pickle
        manifest = {
            "format": FORMAT,
            "position": position,
            "arrays": {name: _shapes(tree) for name, tree in trees.items()},
            "files": {str(path.relative_to(folder)): _hash(path) for path in _files(folder)},
        }
        write_atomically(folder / MANIFEST, sealed(manifest, indent=1))
        self.drop_old()

    def save_arrays(self, tick: int, state: Any, trunk: Any | None) -> tuple[Path, dict[str, Any]]:
        """Stores the arrays alone, which is no checkpoint yet; returns its folder, and them by tree and path."""
        folder = self.folder / str(tick)
        if is_first():
            _remove(folder)
            folder.mkdir()
        wait_for_all(f"checkpoint {tick} begins")
        trees = {name: _flat(tree) for name, tree in (("state", state), ("trunk", trunk)) if tree is not None}
        self._arrays.save(folder / _ARRAYS, args=ocp.args.StandardSave(trees))
        return folder, trees

    def drop_old(self) -> None:
        """Deletes all but the newest checkpoints."""
        for old in self.ticks()[KEPT_CHECKPOINTS:]:
            _remove(self.folder / str(old))

    def restore(
        self, like: Any, unfit: Callable[[dict[str, Any]], str | None] = lambda position: None
    ) -> Restored | None:
        """The newest checkpoint that is whole and fits, as `Restored`; None if there is none to go on from.

        Newer ones are listed in `discarded`; they are in the way until `drop_discarded`. The first process decides for
        all. Meshes and numbers of processes need not be those that wrote it.

        Args:
            like: a state whose shapes, dtypes and shardings the stored one must have.
            unfit: position -> why the run cannot go on from there, or None.

        Raises:
            ValueError: the stored state has other arrays than this program (names the first difference), or `unfit`
                raises it.
        """
        (tick,) = agreed(self._newest(unfit) if is_first() else 0)
        return None if tick < 0 else self._read(int(tick), like)

    def drop_discarded(self) -> None:
        """Deletes what `restore` could not use."""
        for each in self.discarded:
            _remove(self.folder / str(each["checkpoint"]))

    def close(self) -> None:
        self._arrays.close()

    def _newest(self, unfit: Callable[[dict[str, Any]], str | None]) -> int:
        """The newest checkpoint that is whole and fits, -1 if there is none; newer ones go to `discarded`."""
        for tick in self.ticks():
            manifest, reason = self.verified(tick)
            if manifest is not None:
                reason = unfit(manifest["position"])
            if reason is None:
                return tick
            self.discarded.append({"checkpoint": tick, "reason": reason})
        return -1

    def _read(self, tick: int, like: Any) -> Restored:
        folder = self.folder / str(tick)
        manifest = unsealed((folder / MANIFEST).read_bytes()) or {}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        flat = _flat(like)
        for stored in manifest["arrays"].values():
            here = _shapes(flat)
            differing = sorted(name for name in stored.keys() | here.keys() if stored.get(name) != here.get(name))
            if differing:
                name = differing[0]
                raise ValueError(
                    f"checkpoint {folder} does not fit this program: array {name!r} is {stored.get(name, 'absent')} "
                    f"there, {here.get(name, 'absent')} here; another version wrote it. To train from the beginning, "
                    f"delete them: {advised('rm', '-r', self.folder)}"
                )
        wanted = {name: flat for name in manifest["arrays"]}
        trees = self._arrays.restore(folder / _ARRAYS, args=ocp.args.StandardRestore(wanted))
        with np.load(folder / _INTERVAL) as stored:
            position = manifest["position"] | {"interval": dict(stored)}
        trunk = _unflat(trees["trunk"], like) if "trunk" in trees else None
        return Restored(position, _unflat(trees["state"], like), trunk)

    def verified(self, tick: int) -> tuple[dict[str, Any] | None, str | None]:
        """The manifest of a checkpoint whose files are all as they were written, or why there is none."""
        folder = self.folder / str(tick)
        path = folder / MANIFEST
        if not path.exists():
            return None, f"no {MANIFEST}: saving it was cut short"
        manifest = unsealed(path.read_bytes())
        if manifest is None or "format" not in manifest:
            return None, f"{MANIFEST} is damaged"
        if manifest["format"] != FORMAT:
            return None, f"its format is {manifest['format']}, this version's {FORMAT}"
        for name, written in manifest["files"].items():
            if not (folder / name).is_file():
                return None, f"{name} is missing"
            if _hash(folder / name) != written:
                return None, f"{name} is not as it was written"
        return manifest, None

    def ticks(self) -> list[int]:
        """Newest first."""
        return sorted((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), reverse=True)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, the manifest first: what is left of it if this is cut short is no checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _shapes(flat: dict[str, Any]) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in flat.items()}


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _unflat(flat: dict[str, Any], like: Any) -> Any:
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [flat[jax.tree_util.keystr(path)] for path, _ in paths])
