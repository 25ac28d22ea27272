"""Parameters with named axes: the one place where an architecture's `nnx.Param` comes from.

Logical axis names (`tokens`, `embed`, `hidden`, `experts`, `tasks`, `heads`, ...) are stored as the metadata
`logical_axes`; a rule table elsewhere maps them to mesh axes. `decays` says whether weight decay acts on a parameter:
on matrices that multiply what they read, and on no gain, bias or embedding, whatever its rank.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

Init = Literal["lecun_normal", "lecun_uniform", "he_normal", "xavier_normal", "xavier_uniform"]

# name -> (scale, fan, distribution): variance = scale / fan, as JAX's initialisers of the same names.
INITIALIZERS = {
    "lecun_normal": (1.0, "in", "truncated_normal"),
    "lecun_uniform": (1.0, "in", "uniform"),
    "he_normal": (2.0, "in", "truncated_normal"),
    "xavier_normal": (1.0, "average", "truncated_normal"),
    "xavier_uniform": (1.0, "average", "uniform"),
}

# Standard deviation of a standard normal cut at two sigma.
_TRUNCATED_STD = 0.87962566103423978


def kernel(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str, ...],
    init: str = "lecun_normal",
    std_scale: float = 1.0,
    transposed: bool = False,
    fans: tuple[int, int] | None = None,
) -> nnx.Param:
    """A float32 kernel [..., in, out] with variance `std_scale`^2 * scale / fan.

    `shape` is [..., in, out]; `transposed=True` stores the same numbers as [..., out, in], and names the axes in that
    order. `fans` are the (in, out) of the whole layer where the kernel is a slice of one: an expert.

    Every axis before the last two is a batch axis (tokens, experts, tasks) and does not enter the fan. JAX's default
    would count it as receptive field and shrink the weights by the square root of its size.

    Raises:
        ValueError: unknown `init`, or names and axes differ in number.
    """
    if init not in INITIALIZERS:
        raise ValueError(f"init is {init!r}, expected one of {', '.join(INITIALIZERS)}")
    scale, fan, distribution = INITIALIZERS[init]
    inputs, outputs = fans or shape[-2:]
    std = std_scale * math.sqrt(scale / (inputs if fan == "in" else (inputs + outputs) / 2))
    # Drawn flat: on CPUs XLA needs seconds to compile a small draw of three axes, and the numbers are the same.
    flat = (math.prod(shape),)
    if distribution == "uniform":
        value = jax.random.uniform(rngs.params(), flat, jnp.float32, -math.sqrt(3), math.sqrt(3)) * std
    else:
        value = jax.random.truncated_normal(rngs.params(), -2, 2, flat, jnp.float32) * (std / _TRUNCATED_STD)
    value = value.reshape(shape)
    return matrix(value.swapaxes(-2, -1) if transposed else value, logical_axes)


def matrix(value: jax.Array, logical_axes: tuple[str, ...]) -> nnx.Param:
    """A parameter that multiplies what it reads, so weight decay acts on it."""
    return _param(value, logical_axes, decays=True)


def constant(shape: tuple[int, ...], logical_axes: tuple[str | None, ...], value: float = 0.0) -> nnx.Param:
    """A float32 parameter filled with `value`: biases (0) and norm gains (1). An axis named None stays whole."""
    return _param(jnp.full(shape, value, jnp.float32), logical_axes, decays=False)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], logical_axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2): learned vectors and small lookup tables, such as positions."""
    value = std * jax.random.normal(rngs.params(), (math.prod(shape),)).reshape(shape)
    return _param(value, logical_axes, decays=False)


def training_only(module: nnx.Module) -> None:
    """Marks every parameter of a module that serving never uses, so that it is counted apart."""
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(training_only=True)


def _param(value: jax.Array, logical_axes: tuple[str | None, ...], *, decays: bool) -> nnx.Param:
    if len(logical_axes) != value.ndim:
        raise ValueError(f"parameter of shape {value.shape} has {len(logical_axes)} axis names: {logical_axes}")
    return nnx.Param(value, logical_axes=logical_axes, decays=decays)
