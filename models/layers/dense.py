"""Layers whose weights are shared by every token or row: y = x W + b, and networks of them.

SwiGLU(x) = ((x W_u) * silu(x W_g)) W_o            W_u, W_g [D,F]  W_o [F,D], without biases
"""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from . import param
from .hidden import DropoutOptions, Hidden
from .matmul import product
from .per_token import activation


class Dense(nnx.Module):
    """x [..., in] -> [..., out]; in*out + out parameters, 2*in*out FLOPs per row."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        use_bias: bool = True,
        init: str = "lecun_normal",
        std_scale: float = 1.0,
        axes: tuple[str, str] = ("embed", "hidden"),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = param.kernel(rngs, (width, out), axes, init, std_scale)
        self.bias = param.constant((out,), (axes[1],)) if use_bias else None

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        rows = x.reshape(-1, x.shape[-1])
        y = product(rows, self.kernel, self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], y.shape[-1])


class FFN(nnx.Module):
    """act(x W1 + b1) W2 + b2 with the same weights for every token: x [..., D] -> [..., D]."""

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int | None = None,
        *,
        activation: str = "gelu",
        init: str = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.act = activation
        self.up = Dense(width, hidden, init=init, dtype=dtype, rngs=rngs)
        self.down = Dense(hidden, out or width, init=init, axes=("hidden", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows out"]:
        return self.down(activation(self.act)(self.up(x)))


class SwiGLU(nnx.Module):
    """x [..., D] -> [..., D]; 3*D*F parameters, 6*D*F FLOPs per row. `scales` multiply the std of (up, gate, out)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        init: str = "lecun_normal",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def dense(inputs: int, out: int, scale: float, axes: tuple[str, str] = ("embed", "hidden")) -> Dense:
            return Dense(inputs, out, use_bias=False, init=init, std_scale=scale, axes=axes, dtype=dtype, rngs=rngs)

        self.up = dense(width, hidden, scales[0])
        self.gate = dense(width, hidden, scales[1])
        self.out = dense(hidden, width, scales[2], ("hidden", "embed"))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return self.out(self.up(x) * activation("silu")(self.gate(x)))


class MLP(nnx.Module):
    """act(... act(x W_1 + b_1) ...): x [..., width] -> [..., widths[-1]], the activation after every layer.

    options: dropout and batch norm of every layer, for x [B, width]. first: number of the first layer in its model.
    """

    def __init__(
        self,
        width: int,
        widths: tuple[int, ...],
        *,
        activation: str = "relu",
        options: DropoutOptions = DropoutOptions(),  # noqa: B008
        first: int = 0,
        init: str = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        pairs = pairwise((width, *widths))
        self.layers = nnx.List(Dense(a, b, init=init, dtype=dtype, rngs=rngs) for a, b in pairs)
        self.hidden = nnx.List(Hidden(out, first + i, activation, options) for i, out in enumerate(widths))

    def __call__(
        self, x: Float[Array, "*rows width"], key: Array | None = None, valid: Bool[Array, " B"] | None = None
    ) -> Float[Array, "*rows out"]:
        """key: given in training only. valid: rows that are no padding."""
        for layer, hidden in zip(self.layers, self.hidden, strict=True):
            x = hidden(layer(x), key, valid)
        return x


def mlp_params(width: int, widths: tuple[int, ...]) -> int:
    """Parameters of `MLP`."""
    return sum(a * b + b for a, b in pairwise((width, *widths)))


def mlp_flops(width: int, widths: tuple[int, ...]) -> int:
    """Forward FLOPs of `MLP` per row."""
    return 2 * sum(a * b for a, b in pairwise((width, *widths)))


class SplitDense(nnx.Module):
    """x W + b for x = [x_user, x_candidate], split exactly: x_user W_user once per request, the rest per candidate.

    One kernel [d_u + d_c, F]; its first d_u rows belong to the user side. A side of width 0 costs nothing.
    """

    def __init__(
        self,
        user_width: int,
        candidate_width: int,
        out: int,
        *,
        use_bias: bool = True,
        init: str = "lecun_normal",
        axes: tuple[str, str] = ("embed", "hidden"),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if candidate_width < 1:
            raise ValueError(f"candidate width is {candidate_width}, expected at least 1; else nothing depends on it")
        self.user_width, self.dtype = user_width, dtype
        self.kernel = param.kernel(rngs, (user_width + candidate_width, out), axes, init)
        self.bias = param.constant((out,), (axes[1],)) if use_bias else None

    def __call__(self, x: Float[Array, "B d"]) -> Float[Array, "B F"]:
        """The whole product on rows that are already joined: [B, d_u + d_c] -> [B, F]."""
        return self._add_bias(product(x, self.kernel, self.dtype))

    def encode_user(self, x: Float[Array, "R d_u"] | None) -> Float[Array, "R F"] | None:
        """x_user W_user: [R, d_u] -> [R, F]; None when the user side is empty."""
        if not self.user_width or x is None:
            return None
        return product(x, self.kernel, self.dtype, inputs=slice(self.user_width))

    def score(self, state: Float[Array, "R F"] | None, x: Float[Array, "R C d_c"]) -> Float[Array, "RC F"]:
        """Adds the candidate part and the bias: [R, F] and [R, C, d_c] -> [R*C, F]."""
        requests, candidates, width = x.shape
        rows = x.reshape(requests * candidates, width)
        y = product(rows, self.kernel, self.dtype, inputs=slice(self.user_width, None))
        return self._add_bias(y if state is None else y + repeat_user(state, candidates))

    def _add_bias(self, y: Array) -> Array:
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None]


def repeat_user(x: Float[Array, "R d"], candidates: int) -> Float[Array, "RC d"]:
    """[R, d] -> [R*C, d]: every candidate row sees its request's vector."""
    if candidates == 1:
        return x
    requests, width = x.shape
    return jnp.broadcast_to(x[:, None], (requests, candidates, width)).reshape(requests * candidates, width)
