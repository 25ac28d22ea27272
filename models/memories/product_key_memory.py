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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.inputs.batch import CandidateInputs
from recscale.models.layers.dense import Dense
from recscale.models.layers.per_token import activation

from .addressing import Addressing, freeze_module
from .hashing import HashAddressing
from .options import MemoryOptions
from .tucker import TuckerAddressing
from .usage import read_stats
from .value_table import Constant, ValueTable


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
        tokens, width: T, D.
        options: everything else, see `MemoryOptions`.
        values: a `ValueTable` to share with other layers (a pool); None makes one. "expert" and "prevalue" have two
            tables each and take no pool.

    Raises:
        ValueError: a pool of another shape, or for an operator that takes none; cores that do not divide d.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        options: MemoryOptions = MemoryOptions(),  # noqa: B008
        *,
        values: ValueTable | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        op, n, cores = options.value_op, options.sub_keys, options.tucker_cores
        self.n, self.topk, self.heads = n, options.memory_topk, options.memory_heads
        self.tokens, self.width = tokens, width
        self.read_weights, self.temperature, self.value_op = options.read_weights, options.temperature, op
        self.cores, self.values_per_token = cores, options.values_per_token
        self.expansion = options.expansion if op == "expansion" else 1
        self.join, self.act, self.dtype = options.expansion_join, options.expert_activation, dtype
        self.address: Addressing | TuckerAddressing | HashAddressing
        if options.addressing == "hash":
            self.address = HashAddressing(options, rngs=rngs)
        else:
            search = TuckerAddressing if options.score == "tucker" else Addressing
            self.address = search(tokens, width, options, dtype=dtype, rngs=rngs)
        self.fixed = options.addressing != "learned"
        if options.addressing == "random":
            freeze_module(self.address)
        self.slots = rows = options.slots * (tokens if options.values_per_token else 1)
        d, e, frozen = options.value_dim(width), options.prevalue_dim(width), options.values_frozen
        std = d**-0.5 if options.value_init_std is None else options.value_init_std
        if d % cores:
            raise ValueError(f"values are {d} wide, which {cores} tucker_cores with a slice each do not divide")
        if values is not None and op in ("prevalue", "expert"):
            raise ValueError(f"value_op={op!r} has two tables of its own and reads no shared pool")
        # A core weighs its own slice of d/m: a row of the table is then a slice.
        shape = (rows * cores, d // cores)
        self.values = values or ValueTable(*shape, std=std, frozen=frozen, rngs=rngs)
        if self.values.rows.shape != shape:
            raise ValueError(f"the shared pool has shape {self.values.rows.shape}, this layer wants {shape}")
        second = {"prevalue": e, "expert": width}.get(op)
        self.pre_values = ValueTable(rows, second, std=second**-0.5, frozen=frozen, rngs=rngs) if second else None
        inner = {"swilu": d, "prevalue": e}.get(op)
        self.project = Dense(width, inner, use_bias=False, dtype=dtype, rngs=rngs) if inner else None
        groups, axes = self.expansion if options.expansion_join == "grouped" else 1, ("hidden", "embed")
        out = None
        if op in ("swilu", "prevalue", "expansion"):
            out = Dense(groups * d, width, use_bias=False, axes=axes, dtype=dtype, rngs=rngs)
        self.out = out
        self.permutation = None if self.expansion == 1 else _permutation(self.expansion * n * n, rngs)

    def __call__(
        self,
        x: Float[Array, "T B D"],
        *,
        gate: Float[Array, "T B d"] | None = None,
        gate_fn: str = "none",
        train: bool = False,
        valid: Bool[Array, "T B"] | None = None,
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
        found = self.address(jax.lax.stop_gradient(x) if self.fixed else x, train=train, valid=flat)
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
        if held is not None and gate_fn in ("tanh", "one_plus_tanh"):
            opened = y - held if gate_fn == "one_plus_tanh" else y  # gate * tanh(read)
            stats["gate_saturated"] = _share(jnp.abs(opened) > 0.95 * jnp.abs(held), flat)
        return MemoryRead(y.astype(self.dtype).reshape(*lead, -1), stats, slots, head_weights)

    def fold(self) -> None:
        """Folds theta and key norm into constant keys, for serving."""
        self.address.fold()

    def _weights(self, scores: Array) -> Array:
        if self.read_weights == "softmax":
            return jax.nn.softmax(scores / self.temperature)
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
        if self.value_op == "expert" and self.pre_values is not None:
            opened = activation(self.act)(self.pre_values.dot(slots, x))
            return self.values.sum(slots, flat * opened), slots
        if self.pre_values is not None and self.project is not None:
            flat = flat * self.pre_values.dot(slots, self.project(x).astype(jnp.float32))
        if group is not None and self.join == "grouped" and self.out is not None:
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
        if self.value_op == "swilu" and self.project is not None:
            y = y * jax.nn.silu(self.project(x).astype(jnp.float32))
        return y if self.out is None else self.out(y)


def _share(flags: Array, valid: Array | None) -> Array:
    """Share of flags [N, d] that are set, over valid reads."""
    if valid is None:
        return jnp.mean(flags)
    return jnp.sum(flags & valid[:, None]) / jnp.maximum(jnp.sum(valid) * flags.shape[1], 1)


def _permutation(size: int, rngs: nnx.Rngs) -> Constant:
    return Constant(jax.random.permutation(rngs.params(), size).astype(jnp.int32))


def valid_tokens(candidates: CandidateInputs, tokens: int) -> Bool[Array, "T B"] | None:
    """`valid` of a read of all tokens of all candidates: bool [T, R*C], or None if no candidate is padding."""
    if candidates.valid is None:
        return None
    return jnp.broadcast_to(candidates.valid.reshape(-1), (tokens, candidates.valid.size))
