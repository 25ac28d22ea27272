"""The replica axis of a training step: P runs of one shape, all at once or one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Dense parameters from which on replicas of plain matrices take turns. Five on one core, 256 rows, milliseconds each:
# an MLP of 2.0e3 parameters .10 in turn and .05 together, of 1.6e4 .24 and .26, of 6.4e4 .74 and 1.05.
_ALONE_FROM = 12_000


def take_turns(model: nnx.Module) -> bool:
    """Whether replicas of a (possibly abstract) model are faster one after the other, on a CPU.

    Together, products of one input with many matrices become a single larger one, which is what a small model needs.
    Products per token do not (a RankMixer of 2.7e3 parameters: .37 ms in turn, .53 together; of 5.0e4: 2.0 and 2.9),
    and the activations of a larger model no longer fit the cache.
    """
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    per_token = any(leaf.ndim > 2 and leaf.shape[0] > 1 for leaf in leaves)  # towers of one task are no more than one
    return jax.default_backend() == "cpu" and (per_token or sum(leaf.size for leaf in leaves) >= _ALONE_FROM)


def map_replicas(
    function: Callable[..., Any], in_axes: tuple[int | None, ...], replicas: int, one_by_one: bool
) -> Callable[..., Any]:
    """vmap over the replica axis, or one replica after the other; a single replica runs without it.

    An axis of size 1 keeps XLA from folding transposes into the gradients' products: 5 % of a RankMixer step on CPU.
    """
    own = [place for place, axis in enumerate(in_axes) if axis == 0]

    def called(args: Sequence[Any], mine: Sequence[Any]) -> Any:
        given = dict(enumerate(args)) | dict(zip(own, mine, strict=True))
        return function(*given.values())

    if replicas > 1 and one_by_one:
        return lambda *args: jax.lax.map(lambda mine: called(args, mine), [args[place] for place in own])
    if replicas > 1:
        return jax.vmap(function, in_axes=in_axes)

    def single(*args: Any) -> Any:
        mine = [jax.tree.map(lambda v: v[0], args[place]) for place in own]
        return jax.tree.map(lambda v: v[None], called(args, mine))

    return single


def finite(grads: Any) -> jax.Array:
    """Per replica [P], whether every gradient is finite.

    Values are written only then. It also makes their update depend on the whole backward pass, so that XLA knows that
    all reads of a table are over and does not copy it before the write.
    """
    found = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(grads)]
    return functools.reduce(jnp.logical_and, found)


def per_replica(alive: jax.Array, rate: jax.Array, update: jax.Array) -> jax.Array:
    """rate * update per replica, 0 where the replica is dead (its update may be NaN)."""
    shape = (-1, *(1,) * (update.ndim - 1))
    return jnp.where(alive.reshape(shape), rate.reshape(shape) * update, 0.0)
