"""Orbax checkpoints of a group: the state, the trunk a branch left from, and where in the program it stands.

Arrays are stored in a flat dictionary keyed by their path in the state, so a checkpoint can be read without this
package. A save is visible only when complete; a torn one is ignored at the next start.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """Checkpoints below a folder, the newest two kept."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        # Saving is synchronous: on the CPU a device array and its host view are the same memory, which the next
        # step's donated buffers would overwrite under an asynchronous writer.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._folder = folder
        # A manager learns an item's handler when it saves one; a fresh process restores before it ever saved.
        handlers = {
            "position": ocp.JsonCheckpointHandler(),
            "state": ocp.StandardCheckpointHandler(),
            "trunk": ocp.StandardCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def save(self, tick: int, position: dict[str, Any], state: Any, trunk: Any | None) -> None:
        """Stores a state; `tick` grows along the program, `position` is plain JSON."""
        items = {"position": ocp.args.JsonSave(position), "state": ocp.args.StandardSave(_flat(state))}
        if trunk is not None:
            items["trunk"] = ocp.args.StandardSave(_flat(trunk))
        self._manager.save(tick, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: Any) -> tuple[dict[str, Any], Any, Any | None] | None:
        """The newest complete checkpoint as (position, state, trunk), None if there is none.

        `like` is a state whose shapes, dtypes and shardings the stored one must have.

        Raises:
            ValueError: the stored state has other arrays than this program; names the first difference.
        """
        tick = self._manager.latest_step()
        if tick is None:
            return None
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        position = self._manager.restore(tick, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
        names = ["state", "trunk"] if position["has_trunk"] else ["state"]
        self._check(tick, names, _flat(like))
        wanted = {name: ocp.args.StandardRestore(_flat(like)) for name in names}
        stored = self._manager.restore(tick, args=ocp.args.Composite(**wanted))
        trunk = _unflat(stored["trunk"], like) if position["has_trunk"] else None
        return position, _unflat(stored["state"], like), trunk

    def close(self) -> None:
        self._manager.close()

    def _check(self, tick: int, names: list[str], like: dict[str, Any]) -> None:
        metadata = self._manager.item_metadata(tick)
        for name in names:
            stored = metadata[name]
            tree = getattr(stored, "tree", stored)
            if set(tree) != set(like):
                differing = sorted(set(tree) ^ set(like))[0]
                raise ValueError(
                    f"checkpoint {self._folder}/{tick} does not fit this program: array {differing!r} is on one side "
                    "only; it was written by another configuration or version - move the folder away to start again"
                )


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _unflat(flat: dict[str, Any], like: Any) -> Any:
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [flat[jax.tree_util.keystr(path)] for path, _ in paths])
