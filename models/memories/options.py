"""Flags of a product-key memory that every architecture carrying one inherits, and its closed forms.

Letters: T tokens, D token width, H memory heads, K slots read per head, n sub-keys per axis, M = n*n slots, p key width
per axis, d value width, X expansion factor, r Tucker rank, m Tucker cores. tq, tk, tv are T if that part is per token,
else 1.

    parameters   values   tv*M*d                     keys   tk*H*2*n*p  (times X^(1/2) with an expansion, r with Tucker)
                 query    tq*D*H*2p                  norms  4p each with a bias, 2p without
                 theta    right 2*H*p*p, left 2*H*n*n
                 swilu 2*D*d   prevalue M*e + D*e + d*D   expert 2*M*D instead of values   expansion X*d*D, summed d*D
    FLOPs / row  T * [4*D*p*H (query) + 4*n*p*H (scores) + 2*H*K*d (read)]; see `memory_flops` for the options
    FLOPs / step theta 4*H*n*p*p or 4*H*n*n*p: per step, not per row, and nothing once folded for serving
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from recscale.models.counts import Flops, Params
from recscale.models.layers.per_token import Activation
from recscale.models.options import Options, refuse_unused, require_sizes

from .axis_norm import axis_norm_params


@dataclasses.dataclass(frozen=True)
class MemoryOptions(Options):
    """Flags of the memory; defaults are the common additive bag.

    memory_slots: M; n is the integer whose square is nearest, and n*n slots exist.
    memory_heads, memory_topk: H and K. Heads are summed.
    key_width: p. value_width: d; None takes D.
    score: "additive" or "tucker" (UltraMem, arXiv 2411.12364), with tucker_rank r and tucker_cores m.
    query: "linear" or "mlp" (query_hidden wide, None: D); query_per_token: weights of its own for every token;
        query_shared_by_heads: one query for all heads.
    query_norm, key_norm: norms of the halves; None, which a sweep writes "none", leaves one out; "batch" keeps running
        statistics. norm_gain_power: gains start at p^-g.
    score_scale: "inv_sqrt" (1/sqrt p), "none", or "learned" (one scalar that starts at 1/sqrt p).
    read_weights: of the K scores g of a head: softmax(g / temperature), g itself, sigmoid(g), relu(g).
    value_op: what is made of the slots: "bag" weighted sum; "swilu" (y * silu(x W1)) W2 (arXiv 2412.09764);
        "prevalue" weights times <x P, U[slot]>, then W_o (arXiv 2508.18756; prevalue_width e, None: d);
        "expert" sum of w act(<u, x>) v (arXiv 2407.04153); "expansion" X*M virtual slots (arXiv 2411.12364), joined
        "grouped" or "summed".
    keys_per_token, values_per_token, keys_shared_by_heads: who has keys and values of its own.
    theta: over-parameterised keys (arXiv 2602.07526): "right_dxd" mixes features, "left_nxn" mixes keys; theta_order
        says whether the key norm comes after or before; theta_noise is added to the identity; freeze_base_keys trains
        theta alone.
    key_init: "normal" (std 1/sqrt p) or "uniform" (+-1/sqrt p). value_init_std: None is 1/sqrt d.
    addressing: "learned"; "random" freezes query and keys as drawn, a control whose addresses crowd on a part of the
        slots; "hash" reads slots by a uniform hash of the token's bits, without queries and keys, see `hashing.py`.
    values_frozen: values stay as drawn, a control.
    """

    memory_slots: int = 1024
    memory_heads: int = 1
    memory_topk: int = 8
    key_width: int = 16
    value_width: int | None = None
    score: Literal["additive", "tucker"] = "additive"
    tucker_rank: int = 2
    tucker_cores: int = 1
    query: Literal["linear", "mlp"] = "linear"
    query_hidden: int | None = None
    query_per_token: bool = False
    query_shared_by_heads: bool = False
    query_norm: Literal["layer", "rms", "batch", "none"] | None = "layer"
    key_norm: Literal["layer", "rms", "none"] | None = "layer"
    norm_gain_power: float = 0.0
    score_scale: Literal["inv_sqrt", "none", "learned"] = "inv_sqrt"
    read_weights: Literal["softmax", "none", "sigmoid", "relu"] = "softmax"
    temperature: float = 1.0
    value_op: Literal["bag", "swilu", "prevalue", "expert", "expansion"] = "bag"
    prevalue_width: int | None = None
    expert_activation: Activation = "gelu"
    expansion: int = 4
    expansion_join: Literal["grouped", "summed"] = "grouped"
    keys_per_token: bool = False
    values_per_token: bool = False
    keys_shared_by_heads: bool = False
    theta: Literal["none", "right_dxd", "left_nxn"] = "none"
    theta_order: Literal["ln_after", "ln_before"] = "ln_after"
    theta_noise: float = 0.0
    freeze_base_keys: bool = False
    key_init: Literal["normal", "uniform"] = "normal"
    value_init_std: float | None = None
    addressing: Literal["learned", "random", "hash"] = "learned"
    values_frozen: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_sizes(
            memory_slots=self.memory_slots,
            memory_heads=self.memory_heads,
            memory_topk=self.memory_topk,
            key_width=self.key_width,
            value_width=self.value_width,
            query_hidden=self.query_hidden,
        )
        require_sizes(
            prevalue_width=self.prevalue_width,
            expansion=self.expansion,
            tucker_rank=self.tucker_rank,
            tucker_cores=self.tucker_cores,
        )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, expected a number above 0")
        for name, value in (("value_init_std", self.value_init_std), ("theta_noise", self.theta_noise)):
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        if self.memory_topk > self.virtual_sub_keys:
            raise ValueError(
                f"memory_topk is {self.memory_topk}, but memory_slots={self.memory_slots} has only n = "
                f"{self.virtual_sub_keys} sub-keys per axis; lower it or add slots"
            )
        if self.theta == "left_nxn" and self.freeze_base_keys:
            raise ValueError("theta='left_nxn' with freeze_base_keys never moves a key that was not read; train keys")
        if self.freeze_base_keys and self.theta == "none":
            raise ValueError("freeze_base_keys without theta leaves nothing to train; use addressing='random' for that")
        if self.addressing == "random" and self.query_norm == "batch":
            raise ValueError(
                "addressing='random' with query_norm='batch' is no fixed hash: its statistics move the addresses; "
                "take query_norm='layer'"
            )
        if self.addressing == "learned" and self.memory_topk == 1 and self.read_weights == "softmax":
            raise ValueError(
                "memory_topk=1 with read_weights='softmax' weighs its only slot by 1: query and keys would get no "
                "gradient; take more slots, other weights or addressing='random'"
            )
        root = math.isqrt(self.expansion)
        if self.value_op == "expansion" and root * root != self.expansion:
            raise ValueError(f"expansion is {self.expansion}, expected a square: both axes grow by its root")
        if self.score == "tucker" and (self.theta != "none" or self.keys_per_token or self.keys_shared_by_heads):
            raise ValueError("score='tucker' has keys of its own per head: no theta, no per-token or shared keys")
        if self.score == "additive" and self.tucker_cores > 1:
            raise ValueError(f"tucker_cores is {self.tucker_cores}, but score is 'additive'")
        if self.tucker_cores > 1 and self.value_op in ("prevalue", "expert"):
            raise ValueError(f"tucker_cores is {self.tucker_cores}: cores weigh slices of a bag, not {self.value_op!r}")

        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """ValueError for a flag of a form that was not chosen."""
        if self.query != "mlp":
            refuse_unused(self, "a linear query has no hidden layer; set query='mlp'", query_hidden=self.query_hidden)
        if self.score != "tucker":
            refuse_unused(self, "scores are additive; set score='tucker'", tucker_rank=self.tucker_rank)
        else:
            refuse_unused(self, "Tucker scores are not scaled; set score='additive'", score_scale=self.score_scale)
        if self.theta == "none":
            reason = "there is no theta; set theta"
            refuse_unused(self, reason, theta_order=self.theta_order, theta_noise=self.theta_noise)
        if self.read_weights != "softmax":
            reason = f"read_weights={self.read_weights!r} has no temperature; set 'softmax'"
            refuse_unused(self, reason, temperature=self.temperature)
        if self.addressing == "hash":
            self._refuse_search()
        if self.value_op != "prevalue":
            refuse_unused(self, "set value_op='prevalue'", prevalue_width=self.prevalue_width)
        if self.value_op != "expert":
            refuse_unused(self, "set value_op='expert'", expert_activation=self.expert_activation)
        if self.value_op != "expansion":
            reason = "set value_op='expansion'"
            refuse_unused(self, reason, expansion=self.expansion, expansion_join=self.expansion_join)

    def _refuse_search(self) -> None:
        """ValueError for a flag of queries, keys or scores, of which a hash has none."""
        names = """key_width score query query_per_token query_shared_by_heads query_norm key_norm norm_gain_power
            score_scale temperature keys_per_token keys_shared_by_heads theta key_init"""
        for name in names.split():
            refuse_unused(self, "a hash has no queries and keys; set addressing", **{name: getattr(self, name)})

    @property
    def sub_keys(self) -> int:
        """n: the integer whose square is nearest to `memory_slots`."""
        return round(math.sqrt(self.memory_slots))

    @property
    def virtual_sub_keys(self) -> int:
        """Sub-keys per axis the query meets: n, times sqrt X with an expansion."""
        return self.sub_keys * (math.isqrt(self.expansion) if self.value_op == "expansion" else 1)

    @property
    def slots(self) -> int:
        """M = n*n, of one token's table."""
        return self.sub_keys**2

    def value_dim(self, width: int) -> int:
        """d."""
        return width if self.value_op == "expert" else self.value_width or width

    def prevalue_dim(self, width: int) -> int:
        """e."""
        return self.prevalue_width or self.value_dim(width)

    def out_width(self, width: int) -> int:
        """Width of what a read returns."""
        return self.value_dim(width) if self.value_op == "bag" else width

    @property
    def query_heads(self) -> int:
        return 1 if self.query_shared_by_heads else self.memory_heads


def memory_values(options: MemoryOptions, tokens: int, width: int) -> int:
    """Parameters of the value tables of one pool, trained or not."""
    M, d = options.slots * (tokens if options.values_per_token else 1), options.value_dim(width)
    if options.value_op == "expert":
        return 2 * M * width
    return M * d + (M * options.prevalue_dim(width) if options.value_op == "prevalue" else 0)


def memory_params(options: MemoryOptions, tokens: int, width: int, *, own_values: bool = True) -> Params:
    """Parameters of one memory; `own_values=False` for a layer that reads another layer's pool."""
    o, T, D, H, p = options, tokens, width, options.memory_heads, options.key_width
    d, n = o.value_dim(D), o.virtual_sub_keys
    trained = o.addressing == "learned"
    outputs, hidden = o.query_heads * 2 * p, o.query_hidden or D
    query = D * outputs if o.query == "linear" else D * hidden + hidden * outputs
    query *= T if o.query_per_token else 1
    key_heads = 1 if o.keys_shared_by_heads else H
    key_tables = key_heads * (T if o.keys_per_token else 1)
    keys = key_tables * 2 * n * p * (o.tucker_rank if o.score == "tucker" else 1)
    theta = {"none": 0, "right_dxd": 2 * p * p, "left_nxn": 2 * n * n}[o.theta] * key_tables
    norms = axis_norm_params(p, o.query_norm) + axis_norm_params(p, o.key_norm)
    cores = o.tucker_cores * H * o.tucker_rank**2 if o.score == "tucker" else 0
    address = query + theta + norms + cores + (0 if o.freeze_base_keys else keys) + (o.score_scale == "learned")
    e = o.prevalue_dim(D)
    projections = {
        "bag": 0,
        "swilu": 2 * D * d,
        "prevalue": D * e + d * D,
        "expert": 0,
        "expansion": d * D * (o.expansion if o.expansion_join == "grouped" else 1),
    }[o.value_op]
    values = memory_values(o, T, D) if own_values and not o.values_frozen else 0
    return Params(
        dense=(address if trained else 0) + projections + values,
        memory=values,
        inactive=values,
        slots=o.slots * (T if o.values_per_token else 1) if own_values else 0,
    )


def memory_flops(options: MemoryOptions, tokens: int, width: int) -> Flops:
    """FLOPs of one memory: per row, and of theta once per step.

    A hash has no product at all, a random address no gradient, frozen values and frozen base keys one product less.
    """
    o, T, D, H, K, p = options, tokens, width, options.memory_heads, options.memory_topk, options.key_width
    d, n, e = o.value_dim(D), o.virtual_sub_keys, o.prevalue_dim(D)
    outputs, hidden = o.query_heads * 2 * p, o.query_hidden or D
    query = 2 * D * outputs if o.query == "linear" else 2 * D * hidden + 2 * hidden * outputs
    if o.score == "tucker":
        r, m = o.tucker_rank, o.tucker_cores
        first = 4 * H * n * r  # chooses indices only, so it has no gradient
        scores = 4 * H * n * p * r + first + 2 * H * m * (K * r * r + K * K * r)
    else:
        first, scores = 0, 4 * n * p * H
    if o.addressing == "hash":
        query = first = scores = 0
    bag = 2 * H * K * d
    read, rest = {
        "bag": (bag, 0),
        "swilu": (bag, 4 * D * d),
        "prevalue": (bag, 2 * D * e + 2 * H * K * e + 2 * d * D),
        "expert": (4 * H * K * D, 0),
        "expansion": (
            (bag * o.expansion, 2 * o.expansion * d * D) if o.expansion_join == "grouped" else (bag, 2 * d * D)
        ),
    }[o.value_op]
    key_tables = (1 if o.keys_shared_by_heads else H) * (T if o.keys_per_token else 1)
    theta = {"none": 0, "right_dxd": 4 * n * p * p, "left_nxn": 4 * n * n * p}[o.theta] * key_tables
    unneeded = 2 * (query + scores) if o.addressing == "random" else 2 * first
    unneeded += read if o.values_frozen else 0
    return Flops(
        candidate=T * (query + scores + read + rest),
        candidate_unneeded=T * unneeded,
        step=theta,
        step_unneeded=theta * (2 if o.addressing == "random" else 1 if o.freeze_base_keys else 0),
    )
