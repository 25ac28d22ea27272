"""Product-key memory: a sparse read of K slots per head out of M = n*n, found exactly in O(n).

PKM (arXiv 1907.05242), Memory and Memory+ (2412.09764), UltraMem (2411.12364), UltraMemV2 (2508.18756), PEER
(2407.04153) and MSN (2602.07526) are configurations of this one layer.

    g, slot     = the K best slots of each head                      `addressing`
    w [N,H,K]   = softmax(g / tau) within a head, or g, sigmoid(g), relu(g)
    y [N,d]     = sum over heads and k of w * V[slot]                heads are summed: one bag of J = H*K hits

Value operators (out has width D except for "bag", where it has d):

    bag        y                                                     gated if the caller gives a gate: gate * f(y)
    swilu      (y * silu(x W1)) W2                                   W1 [D,d]  W2 [d,D]
    prevalue   (sum_j w_j <x P, U[slot_j]> V[slot_j]) W_o            P [D,e]  U [M,e]  W_o [d,D]
    expert     sum_j w_j act(<u_j, x>) v_j                           u, v [M,D]: an MLP of J of its M hidden units
    expansion  X*M virtual slots on M rows: a fixed permutation maps id' to row id' mod M, group id' div M;
               grouped: each group's bag has its own W_o [d,D]; summed: one W_o

values_per_token: one table of T*M rows, ids offset by t*M.

Letters: T tokens, B rows, N = T*B reads, D token width, H heads, K slots per head, n sub-keys per axis, M = n*n slots,
p key width, d value width, X expansion.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.inputs.batch import CandidateInputs
from recscale.models.layers.dense import Dense
from recscale.models.layers.per_token import activation

from .addressing import Addressing, freeze_module, require_known
from .options import MemoryOptions
from .tucker import TuckerAddressing
from .usage import read_stats
from .value_table import Constant, ValueTable

Array = jax.Array

READ_WEIGHTS = ("softmax", "none", "sigmoid", "relu")
VALUE_OPS = ("bag", "swilu", "prevalue", "expert", "expansion")
JOINS = ("grouped", "summed")
SCORES = ("additive", "tucker")
ADDRESSINGS = ("learned", "random")


class MemoryRead(NamedTuple):
    """y [T, B, out]; stats: named diagnostics of the read, see `usage.read_stats`; slots int32 [N, J], rows of the
    table that were read, -1 = none; weights [N, H, K], of all cores together."""

    y: Array
    stats: dict[str, Array]
    slots: Array
    weights: Array


class ProductKeyMemory(nnx.Module):
    """One memory layer on token-major activations: x [T, B, D] -> [T, B, d or D].

    Args:
        n, topk, heads, key_dim, value_dim: n, K, H, p, d.
        tokens, width: T, D.
        read_weights, temperature: how scores become weights.
        value_op, prevalue_width, expert_activation, expansion, expansion_join: see the file's head.
        values: a `ValueTable` to share with other layers (a pool); None makes one. "expert" and "prevalue" have two
            tables each and take no pool.
        value_init_std: None is 1/sqrt d. values_frozen: values stay as drawn.
        values_per_token: T tables of M rows.
        addressing: "learned", or "random" for frozen query and keys.
        score: "additive" or "tucker", the latter with tucker_rank and tucker_cores.
        address: further flags of `Addressing`.
    """

    def __init__(
        self,
        n: int,
        topk: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        tokens: int,
        width: int,
        read_weights: str = "softmax",
        temperature: float = 1.0,
        value_op: str = "bag",
        prevalue_width: int | None = None,
        expert_activation: str = "gelu",
        expansion: int = 4,
        expansion_join: str = "grouped",
        values: ValueTable | None = None,
        value_init_std: float | None = None,
        values_frozen: bool = False,
        values_per_token: bool = False,
        addressing: str = "learned",
        score: str = "additive",
        tucker_rank: int = 2,
        tucker_cores: int = 1,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **address: Any,
    ):
        require_known(("read_weights", read_weights, READ_WEIGHTS), ("value_op", value_op, VALUE_OPS))
        require_known(("expansion_join", expansion_join, JOINS), ("score", score, SCORES))
        require_known(("addressing", addressing, ADDRESSINGS))
        self.n, self.topk, self.heads, self.tokens, self.width = n, topk, heads, tokens, width
        self.value_dim = width if value_op == "expert" else value_dim
        self.read_weights, self.temperature, self.value_op = read_weights, temperature, value_op
        self.cores, self.values_per_token = tucker_cores, values_per_token
        self.expansion = expansion if value_op == "expansion" else 1
        self.join, self.act, self.dtype = expansion_join, expert_activation, dtype
        sub_keys = n * math.isqrt(self.expansion)
        if score == "tucker":
            self.address = TuckerAddressing(
                tokens, width, sub_keys, topk, heads, key_dim, rank=tucker_rank, cores=tucker_cores,
                dtype=dtype, rngs=rngs, **address,
            )  # fmt: skip
        else:
            self.address = Addressing(tokens, width, sub_keys, topk, heads, key_dim, dtype=dtype, rngs=rngs, **address)
        self.hashed = addressing == "random"
        if self.hashed:
            freeze_module(self.address)
        rows = n * n * (tokens if values_per_token else 1)
        self.slots = rows
        make = dict(frozen=values_frozen, rngs=rngs)
        d, std = self.value_dim, self.value_dim**-0.5 if value_init_std is None else value_init_std
        if d % tucker_cores:
            raise ValueError(f"values are {d} wide, which {tucker_cores} tucker_cores with a slice each do not divide")
        e = prevalue_width or d
        if values is not None and value_op in ("prevalue", "expert"):
            raise ValueError(f"value_op={value_op!r} has two tables of its own and reads no shared pool")
        # A core weighs its own slice of d/m: a row of the table is then a slice.
        self.values = values or ValueTable(rows * tucker_cores, d // tucker_cores, std=std, **make)
        wanted = (rows * tucker_cores, d // tucker_cores)
        if self.values.rows.shape != wanted:
            raise ValueError(f"the shared pool has shape {self.values.rows.shape}, this layer wants {wanted}")
        second = {"prevalue": e, "expert": width}.get(value_op)
        self.pre_values = ValueTable(rows, second, std=second**-0.5, **make) if second else None
        kwargs = dict(use_bias=False, dtype=dtype, rngs=rngs)
        self.project = Dense(width, {"swilu": d, "prevalue": e}[value_op], **kwargs) if self._projects else None
        groups = self.expansion if expansion_join == "grouped" else 1
        has_out = value_op in ("swilu", "prevalue", "expansion")
        self.out = Dense(groups * d, width, axes=("hidden", "embed"), **kwargs) if has_out else None
        self.permutation = None if self.expansion == 1 else _permutation(self.expansion * n * n, rngs)

    @property
    def _projects(self) -> bool:
        return self.value_op in ("swilu", "prevalue")

    def __call__(
        self,
        x: Array,
        *,
        gate: Array | None = None,
        gate_fn: str = "none",
        train: bool = False,
        valid: Array | None = None,
    ) -> MemoryRead:
        """Reads the memory for every token of every row.

        Args:
            x: [T, B, D]; T may differ from `tokens` where nothing is per token.
            gate, gate_fn: out = gate * f(y), f one of `sparse_gather`'s gates; gate [T, B, d], value_op "bag" only.
            train: use and update batch statistics, refresh singular vectors.
            valid: bool [T, B]; others read nothing and count nowhere.
        """
        if gate is not None and (self.value_op != "bag" or self.cores > 1):
            raise ValueError(f"a gate needs value_op='bag' and one core, found {self.value_op!r} and {self.cores}")
        flat = None if valid is None else valid.reshape(-1)
        found = self.address(jax.lax.stop_gradient(x) if self.hashed else x, train=train, valid=flat)
        reads, lead = found.ids.shape[0], x.shape[:-1]
        weights = self._weights(found.scores)  # [N, H, K] or [N, m, H, K]
        ids = found.ids.reshape(reads, -1)
        if flat is not None:
            ids = jnp.where(flat[:, None], ids, -1)
            weights = jnp.where(flat.reshape(-1, *(1,) * (weights.ndim - 1)), weights, 0.0)
        rows = x.reshape(reads, -1)
        held = None if gate is None else gate.reshape(reads, -1)
        y, slots = self._read(rows, ids, weights, held, gate_fn)
        head_weights = weights if weights.ndim == 3 else weights.mean(axis=1)
        stats = read_stats(slots, head_weights, self.slots)
        if gate_fn in ("tanh", "one_plus_tanh"):
            opened = y - held if gate_fn == "one_plus_tanh" else y  # gate * tanh(read)
            stats["gate_saturated"] = _share(jnp.abs(opened) > 0.95 * jnp.abs(held), flat)
        return MemoryRead(y.astype(self.dtype).reshape(*lead, -1), stats, slots, head_weights)

    def fold(self) -> None:
        """Folds theta and key norm into constant keys, for serving."""
        self.address.fold()

    def _weights(self, scores: Array) -> Array:
        if self.read_weights == "softmax":
            return jax.nn.softmax(scores / self.temperature, axis=-1)
        return {"none": lambda g: g, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}[self.read_weights](scores)

    def _read(self, x: Array, ids: Array, weights: Array, gate: Array | None, gate_fn: str) -> tuple[Array, Array]:
        """(out [N, .], physical slots int32 [N, J])."""
        reads = ids.shape[0]
        slots, group = ids, None
        if self.permutation is not None:
            virtual = jnp.where(ids >= 0, jnp.take(self.permutation[...], ids, mode="clip"), -1)
            slots, group = jnp.where(ids >= 0, virtual % (self.n * self.n), -1), virtual // (self.n * self.n)
        if self.values_per_token:
            token = jnp.arange(reads, dtype=jnp.int32) // (reads // self.tokens)
            slots = jnp.where(slots >= 0, slots + (token * (self.n * self.n))[:, None], -1)
        flat = weights.reshape(reads, -1)
        if self.cores > 1:
            return self._join(self._read_cores(slots, group, weights), x), slots
        if self.value_op == "expert":
            opened = activation(self.act)(self.pre_values.dot(slots, x))
            return self.values.sum(slots, flat * opened), slots
        if self.value_op == "prevalue":
            flat = flat * self.pre_values.dot(slots, self.project(x).astype(jnp.float32))
        if group is not None and self.join == "grouped":
            bags = [self.values.sum(jnp.where(group == k, slots, -1), flat) for k in range(self.expansion)]
            return self.out(jnp.concatenate(bags, axis=-1)), slots
        return self._join(self.values.sum(slots, flat, gate=gate, gate_fn=gate_fn), x), slots

    def _read_cores(self, slots: Array, group: Array | None, weights: Array) -> Array:
        """Core c reads slice c of every slot with its own weights: [N, d], or [N, X*d] grouped by expansion."""
        m, reads = self.cores, slots.shape[0]
        ids = jnp.where(slots[:, None] >= 0, slots[:, None] * m + jnp.arange(m)[None, :, None], -1)
        flat = weights.reshape(reads * m, -1)
        groups = [None] if group is None or self.join == "summed" else list(range(self.expansion))
        bags = []
        for k in groups:
            own = ids if k is None else jnp.where((group == k)[:, None], ids, -1)
            bags.append(self.values.sum(own.reshape(reads * m, -1), flat).reshape(reads, -1))
        return jnp.concatenate(bags, axis=-1)

    def _join(self, y: Array, x: Array) -> Array:
        if self.value_op == "swilu":
            y = y * jax.nn.silu(self.project(x).astype(jnp.float32))
        return y if self.out is None else self.out(y)


def _share(flags: Array, valid: Array | None) -> Array:
    """Share of flags [N, d] that are set, over valid reads."""
    if valid is None:
        return jnp.mean(flags)
    return jnp.sum(flags & valid[:, None]) / jnp.maximum(jnp.sum(valid) * flags.shape[1], 1)


def _permutation(size: int, rngs: nnx.Rngs) -> Constant:
    return Constant(jax.random.permutation(rngs.params(), size).astype(jnp.int32))


def valid_tokens(candidates: CandidateInputs, tokens: int) -> Array | None:
    """`valid` of a read of all tokens of all candidates: bool [T, R*C], or None if no candidate is padding."""
    if candidates.valid is None:
        return None
    return jnp.broadcast_to(candidates.valid.reshape(-1), (tokens, candidates.valid.size))


def memory_layer(
    options: MemoryOptions,
    tokens: int,
    width: int,
    *,
    values: ValueTable | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
) -> ProductKeyMemory:
    """The layer a config's flags describe; `values` is another layer's table to share."""
    o = options
    address = dict(
        query=o.query,
        query_hidden=o.query_hidden,
        query_per_token=o.query_per_token,
        query_shared_by_heads=o.query_shared_by_heads,
        query_norm=None if o.query_norm == "none" else o.query_norm,
        key_norm=None if o.key_norm == "none" else o.key_norm,
        norm_gain_power=o.norm_gain_power,
        key_init=o.key_init,
    )
    if o.score == "additive":
        address |= dict(
            score_scale=o.score_scale,
            keys_per_token=o.keys_per_token,
            keys_shared_by_heads=o.keys_shared_by_heads,
            theta=o.theta,
            theta_order=o.theta_order,
            theta_noise=o.theta_noise,
            freeze_base_keys=o.freeze_base_keys,
        )
    return ProductKeyMemory(
        o.sub_keys,
        o.memory_topk,
        o.memory_heads,
        o.key_width,
        o.value_dim(width),
        tokens=tokens,
        width=width,
        read_weights=o.read_weights,
        temperature=o.temperature,
        value_op=o.value_op,
        prevalue_width=o.prevalue_width,
        expert_activation=o.expert_activation,
        expansion=o.expansion,
        expansion_join=o.expansion_join,
        values=values,
        value_init_std=o.value_init_std,
        values_frozen=o.values_frozen,
        values_per_token=o.values_per_token,
        addressing=o.addressing,
        score=o.score,
        tucker_rank=o.tucker_rank,
        tucker_cores=o.tucker_cores,
        dtype=dtype,
        rngs=rngs,
        **address,
    )
