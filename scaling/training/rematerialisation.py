"""Rematerialisation: what the backward pass computes again instead of keeping it, block by block of any model.

    none     everything is kept
    dots     results of matrix products and the inputs of every block are kept
    blocks   the inputs of every block alone

Blocks are what a model holds in a list called `blocks`; it needs to know nothing of this.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

Remat = Literal["none", "dots", "blocks"]


def rematerialise(model: nnx.Module, remat: Remat) -> None:
    """Has the blocks of a model compute again what `remat` does not keep. Changes this object, not its class."""
    if remat != "none":
        for block in _blocks(model):
            block.__class__ = _recomputed(type(block), remat)


def check_remat(model: nnx.Module, remat: Remat, rows: bool) -> None:
    """Raises ValueError if `remat` cannot be of a (possibly abstract) model. rows: it has values that train by rows."""
    if remat != "none" and not _blocks(model):
        raise ValueError(f"training.remat={remat} would be ignored: {type(model).__name__} has no blocks. Leave it out")
    if remat != "none" and rows:
        raise ValueError(
            f"training.remat={remat} does not go with memory values that train by rows: their reads are recorded on "
            "the way (training.value_update=dense_adam would do)"
        )


def _blocks(model: nnx.Module) -> list[nnx.Module]:
    found = {}
    for _, node in nnx.iter_graph(model):
        for block in getattr(node, "blocks", ()) if isinstance(node, nnx.Module) else ():
            if callable(block):
                found[id(block)] = block
    return list(found.values())


@functools.cache
def _recomputed(kind: type, remat: Remat) -> type:
    """A subclass whose public methods are rematerialised, each where it is not called by another."""
    names = [
        name for name in dir(kind) if name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))
    ]
    methods = {name: getattr(kind, name) for name in names if inspect.isfunction(inspect.getattr_static(kind, name))}
    return type(kind.__name__, (kind,), {name: _wrapped(method, remat) for name, method in methods.items()})


# Blocks inside a method that is rematerialised.
_inside: set[int] = set()


def _wrapped(method: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The method with its arrays traced; flags, functions and the like stay as they are."""
    policy = jax.checkpoint_policies.dots_saveable if remat == "dots" else None

    @functools.wraps(method)
    def recomputed(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _inside:
            return method(self, *args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def called(arrays: list[jax.Array]) -> Any:
            given = [*leaves]
            for place, array in zip(places, arrays, strict=True):
                given[place] = array
            args, kwargs = jax.tree.unflatten(structure, given)
            _inside.add(id(self))
            try:
                return method(self, *args, **kwargs)
            finally:
                _inside.discard(id(self))

        return jax.checkpoint(called, policy=policy)([leaves[place] for place in places])

    return recomputed
