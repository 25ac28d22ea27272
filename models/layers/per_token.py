"""Layers with separate weights per token, as one batched matmul on token-major activations [T,B,D].

dense:  y_t = x_t W_t + b_t                               W [T,D,F]  b [T,F]
ffn:    y_t = act(x_t W1_t + b1_t) W2_t + b2_t            W1 [T,D,F]  W2 [T,F,D], stored [T,D,F]
swiglu: y_t = ((x_t U_t) * silu(x_t G_t)) O_t             U, G [T,D,F]  O [T,F,D], stored [T,D,F], without biases
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.pallas_kernels.per_token_ffn import fuses, per_token_ffn

from . import param
from .matmul import product

Activation = Literal["gelu", "gelu_erf", "relu", "silu", "tanh", "identity"]

# The smooth ones are recomputed in the backward pass from the input, which is kept anyway, instead of storing their
# parts ([T, B, F] each): writing and reading those takes longer than computing them again (7 % of a RankMixer step).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.checkpoint(lambda x: jax.nn.gelu(x, approximate=True)),  # the tanh form
    "gelu_erf": jax.checkpoint(lambda x: jax.nn.gelu(x, approximate=False)),
    "relu": jax.nn.relu,
    "silu": jax.checkpoint(jax.nn.silu),
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function called `name`; ValueError lists the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class PerTokenDense(nnx.Module):
    """x [T, B, in] -> [T, B, out], one matrix per token; T*(in*out + out) parameters, 2*T*in*out FLOPs per row.

    x [B, in] is read by every token. `transposed=True` stores the kernel [T, out, in]; `axes` names (in, out) always,
    and `per` T. `fans`: the (in, out) that decide the initial scale, where this is a slice of a wider layer.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        out: int,
        *,
        use_bias: bool = True,
        init: str = "lecun_normal",
        std_scale: float = 1.0,
        axes: tuple[str, str] = ("embed", "hidden"),
        per: str = "tokens",
        transposed: bool = False,
        fans: tuple[int, int] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.transposed = dtype, transposed
        stored = (per, *(reversed(axes) if transposed else axes))
        self.kernel = param.kernel(rngs, (tokens, width, out), stored, init, std_scale, transposed, fans)
        self.bias = param.constant((tokens, out), (per, axes[1])) if use_bias else None

    def __call__(self, x: Float[Array, "T B in"] | Float[Array, "B in"]) -> Float[Array, "T B out"]:
        y = product(x, self.kernel, self.dtype, transposed=self.transposed)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[:, None, :]


class PerTokenFFN(nnx.Module):
    """x [T, B, in] (or [B, in], read by every token) -> [T, B, out] through a hidden width F, both layers biased.

    Both kernels are stored [T, narrow, F]: XLA's CPU backend multiplies out the second one's gradient 1.5 times faster
    in that order, other backends do not mind.

    `implementation`: None is two products, one after the other, unless the fused operation has a kernel that was
    measured to be faster here, or RECSCALE_IMPLEMENTATION names one; a name, or `interpret`, goes through
    `recscale.pallas_kernels.per_token_ffn` (no hidden is stored, activation and biases in float32), as long as the
    kernels are floats: int8 ones multiply by themselves.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        out: int | None = None,
        *,
        activation: str = "gelu",
        init: str = "lecun_normal",
        implementation: str | None = None,
        interpret: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.act, self.implementation, self.interpret, self.dtype = activation, implementation, interpret, dtype
        out = out or width
        self.up = PerTokenDense(tokens, width, hidden, init=init, dtype=dtype, rngs=rngs)
        self.down = PerTokenDense(
            tokens, hidden, out, init=init, axes=("hidden", "embed"), transposed=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "T B in"] | Float[Array, "B in"]) -> Float[Array, "T B out"]:
        fused = self.implementation is not None or fuses(self.act)
        if not fused or not isinstance(self.up.kernel, nnx.Variable):
            return self.down(activation(self.act)(self.up(x)))
        assert self.up.bias is not None and self.down.bias is not None
        weights = [w[...] for w in (self.up.kernel, self.up.bias, self.down.kernel, self.down.bias)]
        if x.ndim == 2:
            x = jnp.broadcast_to(x, (weights[0].shape[0], *x.shape))
        return per_token_ffn(
            x.astype(self.dtype),
            *weights,
            act=self.act,
            transposed=True,
            token_first=True,
            implementation=self.implementation,
            interpret=self.interpret,
        )


class PerTokenSwiGLU(nnx.Module):
    """x [T, B, D] -> [T, B, D] (or `out`); 3*T*D*F parameters, 6*T*D*F FLOPs per row.

    `scales` multiply the standard deviations of (up, gate, out); `fans` are the (D, F) of the whole layer where this is
    a slice of one.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        out: int | None = None,
        *,
        init: str = "lecun_normal",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        fans: tuple[int, int] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def inward(scale: float) -> PerTokenDense:
            return PerTokenDense(
                tokens, width, hidden, use_bias=False, init=init, std_scale=scale, fans=fans, dtype=dtype, rngs=rngs
            )

        self.up, self.gate = inward(scales[0]), inward(scales[1])
        self.out = PerTokenDense(
            tokens,
            hidden,
            out or width,
            use_bias=False,
            init=init,
            std_scale=scales[2],
            axes=("hidden", "embed"),
            transposed=True,
            fans=None if fans is None else (fans[1], fans[0]),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "T B out"]:
        return self.out(self.up(x) * activation("silu")(self.gate(x)))
