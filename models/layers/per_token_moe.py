"""Sparse experts of their own for every token, on token-major activations [T, B, D].

Expert e of token t is a slice of width f = F/E of the token's feed-forward network, so all experts open with gates 1
are the dense network of hidden width F. Gates multiply the hidden activation, which costs no product:

    "ffn"      v_t = sum_e (g_te * act(x W1_te + b1_te)) W2_te       the owner adds the output bias, outside the gates
    "swiglu"   v_t = sum_e (g_te * silu(x Wg_te) * (x Wu_te)) Wo_te

Routers, float32:

    `ReLUMoE`   g = relu(x R_t + c_t): any number of experts is open, see `relu_moe.py`
    `TopKMoE`   y = alpha * sum over the k best of g_e v_e, g = softmax of their logits, + a shared expert, always on
                (TokenMixer-Large, arXiv 2602.06563)

All kernels are stored [T, E, f, D]: D is the wider of the two, and XLA's CPU backend multiplies out gradients that end
in a wide axis 1.5 times faster. Paths, chosen by `path`:

    masked     all experts are computed, closed ones times 0: the reference; cost of the dense network
    capacity   every expert computes at most C rows, a batched product; what overflows is dropped and counted
    ragged     rows sorted by expert, `pallas_kernels.grouped_matmul`; nothing is dropped
    auto       accelerators: ragged. CPUs, where XLA's ragged product runs every expert: capacity while training, masked
               in evaluation, where a row's score must not depend on the rows beside it

Letters: T tokens, B rows, D width, E experts, k selections, f hidden width of an expert, C capacity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from recscale.models.options import Options, refuse_unused
from recscale.pallas_kernels.grouped_matmul import grouped_matmul
from recscale.pallas_kernels.targets import current_platform

from . import param
from .dispatch import Assignment, by_capacity, by_sorting, collect, dispatch, one_hot, spread
from .matmul import contract
from .per_token import PerTokenSwiGLU, activation

PATHS = ("auto", "masked", "capacity", "ragged")

# Capacities are multiples of this, which vector units prefer.
_CAPACITY_STEP = 8

# Tokens whose experts are computed together at fixed capacity.
_TOKENS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class ExpertOptions(Options):
    """expert_path: how experts are computed; capacity_factor: places of an expert over its mean number of rows;
    balance_weight: of the loss that evens out the rows of softmax-routed experts."""

    expert_path: Literal["auto", "masked", "capacity", "ragged"] = "auto"
    capacity_factor: float = 1.25
    balance_weight: float = 0.0

    def check_capacity(self) -> None:
        """ValueError for a capacity factor that leaves no place, or that nothing reads."""
        if self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor is {self.capacity_factor}, expected above 0")
        if self.expert_path in ("masked", "ragged"):
            reason = f"expert_path={self.expert_path!r} has no capacity; take 'capacity' or 'auto'"
            refuse_unused(self, reason, capacity_factor=self.capacity_factor)


def choose_path(path: str, training: bool) -> str:
    """What "auto" means on the present device."""
    if path not in PATHS:
        raise ValueError(f"expert_path is {path!r}, expected one of {', '.join(PATHS)}")
    if path != "auto":
        return path
    if current_platform() != "cpu":
        return "ragged"
    return "capacity" if training else "masked"


def capacity_of(rows: int, share: float, factor: float) -> int:
    """Places of one expert: `factor` times its mean number of rows, never more than all rows."""
    return min(rows, _CAPACITY_STEP * math.ceil(factor * share * rows / _CAPACITY_STEP - 1e-9))


class PerTokenExperts(nnx.Module):
    """Weights of E experts per token and the three ways to apply them.

    Args:
        tokens, width, hidden, experts: T, D, f (of one expert), E.
        kind: "ffn" or "swiglu". activation: of "ffn".
        fans: (D, F) of the dense network the experts are slices of; they decide the initial scale.
        scales: multiply the standard deviations of (up, gate, out); "ffn" has no gate.
        implementation: of `grouped_matmul`.
    """

    # See `quantisation.py`: which kernels may become int8, and whether they are stored [..., out, in].
    INT8_KERNELS: ClassVar[Mapping[str, bool]] = {"up": True, "gate": True, "out": False}

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        experts: int,
        *,
        kind: str = "swiglu",
        activation: str = "gelu",
        init: str = "lecun_normal",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        fans: tuple[int, int] | None = None,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kind not in ("ffn", "swiglu"):
            raise ValueError(f"kind of expert is {kind!r}, expected 'ffn' or 'swiglu'")
        fans = fans or (width, hidden)
        shape, axes = (tokens, experts, width, hidden), ("tokens", "experts", "hidden", "embed")
        self.experts, self.act, self.implementation, self.dtype = experts, activation, implementation, dtype
        swiglu = kind == "swiglu"
        self.up = param.kernel(rngs, shape, axes, init, scales[0], transposed=True, fans=fans)
        gate = param.kernel(rngs, shape, axes, init, scales[1], transposed=True, fans=fans) if swiglu else None
        self.gate = gate
        self.bias = None if swiglu else param.constant((tokens, experts, hidden), axes[:3])
        out = (tokens, experts, hidden, width)
        self.out = param.kernel(rngs, out, axes, init, scales[2], fans=(fans[1], fans[0]))

    def masked(self, x: Float[Array, "T B D"], gates: Float[Array, "T B E"]) -> Float[Array, "T B D"]:
        """All experts: x [T, B, D], gates [T, B, E] -> [T, B, D]."""
        h = self._hidden(lambda w: contract("tbd,tefd->tebf", x, w, self.dtype), lambda b: b[:, :, None])
        h = h * gates.swapaxes(1, 2)[..., None].astype(self.dtype)
        return contract("tebf,tefd->tbd", h, self.out[...], self.dtype)

    def capacity(
        self, x: Float[Array, "T B D"], ids: Int[Array, "T B k"], gates: Float[Array, "T B k"], capacity: int
    ) -> tuple[Float[Array, "T B D"], Float[Array, ""]]:
        """At most `capacity` rows an expert: ids and gates [T, B, k] -> [T, B, D], and how many were dropped.

        A few tokens at a time: XLA's CPU backend multiplies a batch of small matrices on one thread, but runs products
        that do not depend on each other side by side.
        """
        groups = [slice(t, t + _TOKENS_AT_ONCE) for t in range(0, x.shape[0], _TOKENS_AT_ONCE)]
        parts = [self._capacity(tokens, x[tokens], ids[tokens], gates[tokens], capacity) for tokens in groups]
        return jnp.concatenate([y for y, _ in parts]), jnp.stack([dropped for _, dropped in parts]).sum()

    def _capacity(self, tokens: slice, x: Array, ids: Array, gates: Array, capacity: int) -> tuple[Array, Array]:
        assignment, dropped = by_capacity(ids, self.experts, capacity)
        batches = (x.shape[0], self.experts, capacity, -1)
        z = dispatch(x.astype(self.dtype), assignment).reshape(batches)
        h = self._hidden_at_once(z, tokens)
        h = h * spread(gates.astype(self.dtype), assignment).reshape(batches[:-1])[..., None]
        y = contract("tecf,tefd->tecd", h, self.out[...][tokens], self.dtype)
        return collect(y.reshape(-1, y.shape[-1]), assignment), dropped

    def ragged(
        self, x: Float[Array, "T B D"], ids: Int[Array, "T B k"], gates: Float[Array, "T B k"]
    ) -> Float[Array, "T B D"]:
        """Rows sorted by expert: ids and gates [T, B, k] -> [T, B, D]."""
        assignment, sizes = by_sorting(ids, self.experts)
        z = dispatch(x.astype(self.dtype), assignment)
        h = self._hidden(
            lambda w: self._grouped(z, w.swapaxes(-2, -1), sizes), lambda b: self._bias_of_places(b, ids, assignment)
        )
        h = h * spread(gates.astype(self.dtype), assignment)[:, None]
        return collect(self._grouped(h, self.out[...], sizes), assignment)

    def _hidden(self, product: Callable[[Array], Array], place: Callable[[Array], Array]) -> Array:
        """Hidden activation; `product(kernel)` multiplies the rows, `place(bias)` brings a bias to their layout."""
        if self.gate is not None:
            return activation("silu")(product(self.gate[...])) * product(self.up[...])
        return activation(self.act)(product(self.up[...]) + place(self._biases()))

    def _biases(self) -> Array:
        assert self.bias is not None  # whatever has no gate has biases
        return self.bias[...].astype(self.dtype)

    def _hidden_at_once(self, z: Array, tokens: slice) -> Array:
        """Hidden activation of rows [T, E, C, D] of some tokens. One product for gate and up together: products of one
        expert are small, and XLA's CPU backend takes a tenth less for both gradients of one twice as wide."""
        spec, up = "tecd,tefd->tecf", self.up[...][tokens]
        if self.gate is None:
            place = self._biases()[tokens][:, :, None]
            return activation(self.act)(contract(spec, z, up, self.dtype) + place)
        both = contract(spec, z, jnp.concatenate([self.gate[...][tokens], up], axis=2), self.dtype)
        gate, up = jnp.split(both, 2, axis=-1)
        return activation("silu")(gate) * up

    def _grouped(self, z: Array, w: Array, sizes: Array) -> Array:
        w = w.reshape(-1, *w.shape[-2:])
        return grouped_matmul(z, w, sizes, implementation=self.implementation)

    def _bias_of_places(self, bias: Array, ids: Array, assignment: Assignment) -> Array:
        """[T, E, f] -> [N, f]."""
        token = jnp.arange(ids.shape[0], dtype=ids.dtype)[:, None, None]
        group = jnp.minimum(token * self.experts + ids, ids.shape[0] * self.experts - 1).reshape(-1)
        group = jnp.take(group, assignment.selections, mode="clip")
        return jnp.take(bias.reshape(-1, bias.shape[-1]), group, axis=0, mode="clip")


class TopKRouting(NamedTuple):
    """What a top-k layer reports: load float32 [T, E_r], rows of every routed expert; dropped, their share lost to a
    full capacity; balance and z: losses without their weights."""

    load: Array
    dropped: Array
    balance: Array
    z: Array


def top_k_gates(
    logits: Float[Array, "T B E"], k: int, norm: str = "selected"
) -> tuple[Int[Array, "T B k"], Float[Array, "T B k"]]:
    """ids int32 and gates float32 [T, B, k] of the k largest logits [T, B, E].

    norm="selected": softmax over the k logits; "all": softmax over all E, of which k are kept as they are.
    """
    ids = jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]
    values = logits if norm == "selected" else jax.nn.softmax(logits, axis=-1)
    # Picked by comparison: the gradient of a gather would be a scatter.
    picked = jnp.where(one_hot(ids, logits.shape[-1]), values[:, :, None], 0.0).sum(axis=-1)
    return ids, jax.nn.softmax(picked, axis=-1) if norm == "selected" else picked


class TopKMoE(nnx.Module):
    """y_t = alpha * sum over the selected of g_te E_te(x_t), + E_t,shared(x_t):   x [T, B, D] -> [T, B, D].

    Args:
        tokens, width, hidden: T, D, F of the dense network; every expert has F/E.
        experts, active: E and K, both counting the shared expert where there is one.
        shared: whether one expert is always on; without it all E are routed and K are selected.
        pooled: all tokens choose from one pool of T*E experts, one of them shared, instead of E of their own.
        gate_scale: alpha; None is E/K. gate_norm: see `top_k_gates`.
        kind, activation, init, scales, fans, implementation: see `PerTokenExperts`; an "ffn" has an output bias here.
        path, capacity_factor: see the file.

    Raises:
        ValueError: sizes that do not divide, or a single renormalised gate: it is the constant 1, so its router would
            never learn.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        *,
        experts: int,
        active: int,
        shared: bool = True,
        pooled: bool = False,
        gate_scale: float | None = None,
        gate_norm: str = "selected",
        kind: str = "swiglu",
        activation: str = "gelu",
        init: str = "lecun_normal",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        fans: tuple[int, int] | None = None,
        path: str = "auto",
        capacity_factor: float = 1.25,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_top_k(hidden, experts, active, shared=shared, gate_norm=gate_norm)
        self.gate_norm, self.alpha = gate_norm, experts / active if gate_scale is None else gate_scale
        self.path, self.capacity_factor, self.dtype, self.pooled = path, capacity_factor, dtype, pooled
        choose_path(path, training=True)
        f, fans = hidden // experts, fans or (width, hidden)
        if pooled:
            tokens, experts = 1, experts * tokens
        self.routed, self.selected = experts - shared, active - shared
        self.experts = PerTokenExperts(
            tokens,
            width,
            f,
            self.routed,
            kind=kind,
            activation=activation,
            init=init,
            scales=scales,
            fans=fans,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        always = None
        if shared:
            always = PerTokenSwiGLU(tokens, width, f, init=init, scales=scales, fans=fans, dtype=dtype, rngs=rngs)
        self.shared = always
        self.bias = param.constant((tokens, width), ("tokens", "embed")) if kind == "ffn" else None
        # "routes", not "experts": every device routes all rows it has, so only what its experts give is exchanged.
        self.router = param.kernel(rngs, (tokens, width, self.routed), ("tokens", "embed", "routes"), "lecun_normal")

    def __call__(
        self, x: Float[Array, "T B D"], *, training: bool = False, valid: Bool[Array, " B"] | None = None
    ) -> tuple[Float[Array, "T B D"], TopKRouting]:
        """valid: rows that are no padding; the others choose no expert and count nowhere."""
        shape = x.shape
        if self.pooled:
            x = x.reshape(1, -1, shape[-1])
            valid = None if valid is None else jnp.tile(valid, shape[0])
        logits = contract("tbd,tde->tbe", x, self.router[...], jnp.float32)
        ids, gates = top_k_gates(logits, self.selected, self.gate_norm)
        if valid is not None:
            ids = jnp.where(valid[None, :, None], ids, self.routed)
        y, dropped = self._apply(x, ids, self.alpha * gates, choose_path(self.path, training))
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)[:, None]
        if self.shared is not None:
            y = y + self.shared(x)
        chosen = one_hot(ids, self.routed).any(axis=2)
        share = row_mean(chosen.astype(jnp.float32), valid) / self.selected
        mean_probability = row_mean(jax.nn.softmax(logits, axis=-1), valid)
        rows = x.shape[1] if valid is None else jnp.maximum(valid.sum(), 1)
        return y.reshape(shape), TopKRouting(
            load=chosen.sum(axis=1, dtype=jnp.float32),
            dropped=dropped / (rows * x.shape[0] * self.selected),
            balance=self.routed * (share * mean_probability).sum(axis=-1).mean(),
            z=row_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), valid).mean(),
        )

    def _apply(self, x: Array, ids: Array, gates: Array, path: str) -> tuple[Array, Array]:
        nothing = jnp.zeros((), jnp.float32)
        if path == "masked":
            dense = jnp.where(one_hot(ids, self.routed), gates[..., None], 0.0).sum(axis=2)
            return self.experts.masked(x, dense), nothing
        if path == "ragged":
            return self.experts.ragged(x, ids, gates), nothing
        return self.experts.capacity(x, ids, gates, self._capacity(x.shape[1]))

    def _capacity(self, rows: int) -> int:
        return capacity_of(rows, self.selected / self.routed, self.capacity_factor)

    def places(self, rows: int) -> int | None:
        """Rows that all experts of a token compute together in a training step of so many rows, at fixed capacity; None
        on another path."""
        return self.routed * self._capacity(rows) if choose_path(self.path, training=True) == "capacity" else None


def row_mean(x: Float[Array, "T B ..."], valid: Bool[Array, " B"] | None) -> Float[Array, "T ..."]:
    """Mean over the rows that are no padding, 0 if there is none: [T, B, ...] -> [T, ...]. valid None: over all."""
    if valid is None:
        return x.mean(axis=1)
    own = valid.reshape(1, -1, *(1,) * (x.ndim - 2))
    return jnp.where(own, x, 0).sum(axis=1) / jnp.maximum(valid.sum(), 1)


def top_k_report(
    routing: Sequence[TopKRouting], weights: Mapping[str, float]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Losses and stats of several layers, as means over them; `weights` of the losses "balance" and "z"."""
    if not routing:
        return {}, {}
    stats = {
        "dropped_share": jnp.stack([r.dropped for r in routing]).mean(),
        "router_balance": jnp.stack([r.balance for r in routing]).mean(),
        "router_z": jnp.stack([r.z for r in routing]).mean(),
    }
    losses = {f"router_{name}": weight * stats[f"router_{name}"] for name, weight in weights.items() if weight}
    return losses, stats


def check_top_k(hidden: int, experts: int, active: int, *, shared: bool = True, gate_norm: str = "selected") -> None:
    """Raises ValueError for sizes `TopKMoE` cannot have."""
    if gate_norm not in ("selected", "all"):
        raise ValueError(f"gate_norm is {gate_norm!r}, expected 'selected' or 'all'")
    if hidden % experts:
        raise ValueError(f"a hidden width of {hidden} does not divide into {experts} experts; make it a multiple")
    if not shared < active <= experts:
        raise ValueError(
            f"active is {active} of {experts} experts (shared expert: {shared}), expected more and at most"
        )
    if active - shared == 1 and gate_norm == "selected":
        raise ValueError(
            f"active={active} selects one routed expert, whose renormalised gate is the constant 1: its router would "
            "get no gradient. Select more, or use gate_norm='all'"
        )
