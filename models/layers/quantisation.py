"""Weight-only int8 after training (W8A16): a model transform that works on every architecture.

    served = quantize(model)            the same model with int8 kernels; encode_user, score and __call__ as before
    stored_bytes(served)                what its variables take

One symmetric scale per (token, expert and) output channel, s = max_in |W| / 127, so |W - s q| <= s/2; activations stay
as they are. Quantised are the kernels of `Dense`, `SplitDense` and `PerTokenDense` layers, wherever they sit, and those
that other modules name in `INT8_KERNELS` (experts); norms, biases, routers, towers, tokenizers and everything else keep
their float32 parameters. Granularity and choice of layers are not
published (arXiv 2602.10455), so the choice of layers is an argument.

The result is an ordinary `nnx` module: its state splits, merges and is checkpointed like any other, with int8 arrays in
it. It serves and does not train: differentiating raises. `nnx.eval_shape(lambda: quantize(build(...)))` gives the
shapes a checkpoint is restored into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.inputs.tokenizers import Tokenizer
from recscale.pallas_kernels.w8a16_matmul import dequantize, quantize_int8, w8a16_matmul

from .dense import Dense, SplitDense
from .per_token import PerTokenDense
from .towers import Towers

Path = tuple[Any, ...]


class Int8Values(nnx.Variable):
    """int8 weights."""


class Int8Scale(nnx.Variable):
    """float32 scales of int8 weights, one per output channel."""


class Int8Kernel(nnx.Module):
    """What stands in for a layer's kernel [..., in, out]; multiplies through `w8a16_matmul`.

    Args:
        kernel: the float parameter. transposed: it is stored [..., out, in].
        implementation, interpret: see `w8a16_matmul`.
    """

    def __init__(
        self,
        kernel: nnx.Param,
        *,
        transposed: bool = False,
        implementation: str | None = None,
        interpret: bool = False,
    ):
        weights, axes = kernel[...], kernel.get_metadata().get("logical_axes")
        if transposed:
            weights = weights.swapaxes(-2, -1)
            axes = axes and (*axes[:-2], axes[-1], axes[-2])
        values, scale = quantize_int8(weights)
        # Split over a mesh as the float kernel was.
        self.values, self.scale = Int8Values(values), Int8Scale(scale)
        if axes is not None:
            self.values.set_metadata(logical_axes=axes)
            self.scale.set_metadata(logical_axes=(*axes[:-2], axes[-1]))
        self.transposed, self.implementation, self.interpret = transposed, implementation, interpret

    def product(self, x: Float[Array, "*T B in"], dtype: DTypeLike, inputs: slice) -> Float[Array, "*U B out"]:
        """See `recscale.models.layers.matmul.Kernel`."""
        values = self.values[...][..., inputs, :]
        per_token = values.ndim == 3
        if per_token and x.ndim == 2:
            x = jnp.broadcast_to(x[None], (values.shape[0], *x.shape))
        return w8a16_matmul(
            x.astype(dtype),
            values,
            self.scale[...],
            out_dtype=dtype,
            token_first=per_token,
            implementation=self.implementation,
            interpret=self.interpret,
        )

    def __getitem__(self, index) -> Array:
        """The float32 weights it stands for, stored as the kernel was, for code that multiplies it in its own way.

        Correct, and no faster than float weights: the int8 product is `product`.
        """
        weights = dequantize(self.values[...], self.scale[...])
        return (weights.swapaxes(-2, -1) if self.transposed else weights)[index]


def quantize(
    model: nnx.Module,
    *,
    skip: Callable[[Path, nnx.Module], bool] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> nnx.Module:
    """A copy of `model` with int8 kernels; `model` itself is left as it is.

    Args:
        model: any module with such layers.
        skip: called with the path and the module of everything in the model; True keeps that module and what is in
            it as it is. None: `keep_float`.
        implementation, interpret: see `recscale.pallas_kernels.w8a16_matmul`.

    Raises:
        ValueError: the model has no such layer outside of what is skipped.
    """
    skip = skip or keep_float
    model = nnx.clone(model)
    modules = dict(nnx.iter_modules(model))
    skipped = {path for path, module in modules.items() if skip(path, module)}
    found = 0
    for path, layer in modules.items():
        if any(path[:depth] in skipped for depth in range(len(path) + 1)):
            continue
        for name, transposed in _kernels(layer).items():
            kernel = getattr(layer, name)
            if isinstance(kernel, nnx.Param):  # not None, nor quantised already
                served = Int8Kernel(kernel, transposed=transposed, implementation=implementation, interpret=interpret)
                setattr(layer, name, served)
                found += 1
    if not found:
        raise ValueError(f"{type(model).__name__} has no dense or per-token layer outside of what is skipped")
    return model


def _kernels(layer: nnx.Module) -> Mapping[str, bool]:
    """Names of a layer's kernels, and whether they are stored [..., out, in]."""
    if isinstance(layer, Dense | SplitDense):
        return {"kernel": False}
    if isinstance(layer, PerTokenDense):
        return {"kernel": layer.transposed}
    return getattr(layer, "INT8_KERNELS", {})


def keep_float(path: Path, module: nnx.Module) -> bool:
    """The default choice: tokenizers, towers and routers stay float32."""
    named = bool(path) and "router" in str(path[-1])
    return named or isinstance(module, Tokenizer | Towers)


def stored_bytes(model: nnx.Module, *kinds: type[nnx.Variable]) -> int:
    """Bytes of a model's variables, real or abstract: all of them, or those of the given kinds."""
    state = nnx.state(model, *((nnx.Any(*kinds),) if kinds else ()))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
