"""Parameters with named axes: the one place where an architecture's `nnx.Param` comes from.

Logical axis names (`tokens`, `embed`, `hidden`, `experts`, `tasks`, `heads`, ...) are stored as the metadata
`logical_axes`; a rule table elsewhere maps them to mesh axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

# name -> (scale, mode, distribution) of jax.nn.initializers.variance_scaling. "normal" is truncated at 2 sigma, as in
# JAX's own lecun_normal and glorot_normal.
INITIALIZERS = {
    "lecun_normal": (1.0, "fan_in", "truncated_normal"),
    "lecun_uniform": (1.0, "fan_in", "uniform"),
    "he_normal": (2.0, "fan_in", "truncated_normal"),
    "xavier_normal": (1.0, "fan_avg", "truncated_normal"),
    "xavier_uniform": (1.0, "fan_avg", "uniform"),
}


def kernel(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str, ...],
    init: str = "lecun_normal",
    std_scale: float = 1.0,
) -> nnx.Param:
    """A float32 kernel [..., in, out] drawn with variance ~ 1 / fan, times `std_scale`.

    Every axis before the last two is a batch axis (tokens, experts, tasks). JAX's default would count it as receptive
    field and shrink the weights by the square root of its size.

    Raises:
        ValueError: unknown `init`, or names and axes differ in number.
    """
    if init not in INITIALIZERS:
        raise ValueError(f"init is {init!r}, expected one of {', '.join(INITIALIZERS)}")
    scale, mode, distribution = INITIALIZERS[init]
    draw = jax.nn.initializers.variance_scaling(
        scale, mode, distribution, in_axis=-2, out_axis=-1, batch_axis=tuple(range(len(shape) - 2))
    )
    return _param(std_scale * draw(rngs.params(), shape, jnp.float32), logical_axes)


def constant(shape: tuple[int, ...], logical_axes: tuple[str, ...], value: float = 0.0) -> nnx.Param:
    """A float32 parameter filled with `value`: biases (0) and norm gains (1)."""
    return _param(jnp.full(shape, value, jnp.float32), logical_axes)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], logical_axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2): small lookup tables such as time buckets and positions."""
    return _param(std * jax.random.normal(rngs.params(), shape, jnp.float32), logical_axes)


def _param(value: jax.Array, logical_axes: tuple[str, ...]) -> nnx.Param:
    if len(logical_axes) != value.ndim:
        raise ValueError(f"parameter of shape {value.shape} has {len(logical_axes)} axis names: {logical_axes}")
    return nnx.Param(value, logical_axes=logical_axes)
