"""Sparse experts that ReLU gates open: any number of a token's experts (RankMixer, arXiv 2507.15551, after 2412.14711).

    v_t = sum_e relu(x R_t + c_t)_e * E_te(x)

Experts, paths and letters: see `per_token_moe.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from . import param
from .dispatch import one_hot
from .per_token import PerTokenDense
from .per_token_moe import PerTokenExperts, capacity_of, choose_path, row_mean


class ReLURouting(NamedTuple):
    """What a ReLU-routed layer reports about its infer router, as means over the rows that are no padding.

    gate: float32 [], mean gate, what the penalty is made of; active: float32 [T], share of open experts on the rows
    that run on this router; opened: float32 [T, E], share of those rows that opened the expert; cut: float32 [], share
    of open gates that `serve_cap` or a full capacity cut.
    """

    gate: Array
    active: Array
    opened: Array
    cut: Array


class Gating(NamedTuple):
    """Which router of a `ReLUMoE` a pass uses, and the rows that "rows" leaves to the train router: bool [B]."""

    gates_from: Literal["infer", "train", "train_alone", "mean", "rows"] = "infer"
    by_train: Array | None = None


class ReLUMoE(nnx.Module):
    """v_t = sum_e relu(x R_t + c_t)_e * E_te(x) + b2_t with two routers: x [T, B, D] -> [T, B, D].

    Serving uses the infer router; `gating.gates_from` says what a training pass uses:
        "infer", "train"   one of them
        "train_alone"      the train router, and the report is about it
        "mean"             (G_train + G_infer) / 2
        "rows"             G_train on the rows marked by `gating.by_train` bool [B], G_infer on the others

    Args:
        tokens, width, hidden: T, D, F of the dense network; every expert has F/E.
        experts: E.
        two_routers: False leaves the train router out.
        serve_cap: most experts a token of a row may open in evaluation; None is all. The largest gates stay.
        active_share: expected share of open experts, which sizes capacities.
        path: "auto" is masked while training (dense training, sparse inference); in evaluation as everywhere.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        *,
        experts: int,
        two_routers: bool = True,
        serve_cap: int | None = None,
        active_share: float = 1.0,
        activation: str = "gelu",
        init: str = "lecun_normal",
        path: str = "auto",
        capacity_factor: float = 1.25,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if hidden % experts:
            raise ValueError(f"a hidden width of {hidden} does not divide into {experts} experts; make it a multiple")
        choose_path(path, training=True)
        self.serve_cap, self.path = serve_cap, path
        self.active_share, self.capacity_factor, self.dtype = active_share, capacity_factor, dtype
        self.experts = PerTokenExperts(
            tokens,
            width,
            hidden // experts,
            experts,
            kind="ffn",
            activation=activation,
            init=init,
            fans=(width, hidden),
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        self.bias = param.constant((tokens, width), ("tokens", "embed"))
        self.infer_router = _relu_router(tokens, width, experts, rngs)
        self.train_router = _relu_router(tokens, width, experts, rngs) if two_routers else None

    def __call__(
        self,
        x: Float[Array, "T B D"],
        *,
        training: bool = False,
        gating: Gating | None = None,
        valid: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "T B D"], ReLURouting]:
        """valid: rows that are no padding; the others open no expert and count nowhere."""
        gating = gating or Gating()
        infer = jax.nn.relu(self._train(x) if gating.gates_from == "train_alone" else self.infer_router(x))
        gates = self._gates(x, infer, gating)
        if valid is not None:
            gates = jnp.where(valid[None, :, None], gates, 0.0)
        y, cut = self._apply(x, gates, training)
        own = jnp.ones(x.shape[1], bool) if valid is None else valid
        if gating.by_train is not None:
            own = own & ~gating.by_train
        active = row_mean((infer > 0).mean(axis=-1, dtype=jnp.float32), own)
        opened = row_mean((infer > 0).astype(jnp.float32), own)
        routing = ReLURouting(row_mean(infer, valid).mean(), active, opened, cut)
        return y + self.bias[...].astype(self.dtype)[:, None], routing

    def _train(self, x: Array) -> Array:
        if self.train_router is None:
            raise ValueError("two_routers=False left the train router out, so its gates cannot be used")
        return self.train_router(x)

    def _gates(self, x: Array, infer: Array, gating: Gating) -> Array:
        if gating.gates_from in ("infer", "train_alone"):
            return infer
        train = jax.nn.relu(self._train(x))
        if gating.by_train is not None:
            return jnp.where(gating.by_train[None, :, None], train, infer)
        return train if gating.gates_from == "train" else (train + infer) / 2

    def _apply(self, x: Array, gates: Array, training: bool) -> tuple[Array, Array]:
        """The gated sum, and the share of open gates that was cut."""
        cap = None if training else self.serve_cap
        path = self.path
        if path == "auto":
            path = "masked" if training else choose_path("auto", training)
        if path == "masked" and cap is None:
            return self.experts.masked(x, gates), jnp.zeros((), jnp.float32)
        experts = gates.shape[-1]
        ids = jax.lax.top_k(jax.lax.stop_gradient(gates), cap or experts)[1]
        chosen = one_hot(ids, experts)
        open_, kept = (gates > 0).sum(dtype=jnp.float32), jnp.where(chosen.any(axis=2), gates, 0.0)

        def cut_share(computed: Array) -> Array:
            return (open_ - computed) / jnp.maximum(open_, 1.0)  # nothing open, nothing cut

        if path == "masked":
            return self.experts.masked(x, kept), cut_share((kept > 0).sum(dtype=jnp.float32))
        picked = jnp.where(chosen, gates[:, :, None], 0.0).sum(axis=-1)
        ids = jnp.where(picked > 0, ids, experts)
        computed = (picked > 0).sum(dtype=jnp.float32)
        if path == "ragged":
            y = self.experts.ragged(x, ids, picked)
        else:
            capacity = capacity_of(x.shape[1], self.active_share, self.capacity_factor)
            y, dropped = self.experts.capacity(x, ids, picked, capacity)
            computed = computed - dropped
        return y, cut_share(computed)


def _relu_router(tokens: int, width: int, experts: int, rngs: nnx.Rngs) -> PerTokenDense:
    """Kernel a tenth of the usual scale and bias 1: gates start near 1, so step 0 is close to the dense model."""
    router = PerTokenDense(tokens, width, experts, std_scale=0.1, axes=("embed", "routes"), rngs=rngs)
    assert router.bias is not None
    router.bias[...] = jnp.ones_like(router.bias[...])
    return router
