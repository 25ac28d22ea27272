"""DCNv2 (arXiv 2008.13535): cross layers, then (or beside) an MLP.

    x_0 = x = [x_user, x_candidate], d = d_in
    full       x_{l+1} = x_0 * (x_l W + b) + x_l
    low rank   x_{l+1} = x_0 * (x_l V U + b) + x_l
    mixture    x_{l+1} = x_0 * (sum_i g_i act(act(x_l V_i) C_i) U_i + b) + x_l,   g = softmax(x_l W_g)
    stacked    logits = towers(MLP(x_L))          parallel    logits = towers([x_L, MLP(x_0)])

Letters: L cross layers, E experts, `rank` their width, F_1.. MLP widths. The gate is applied at rank width, so mixing
experts costs no product of its own. The first product of x_0 is split exactly into a user half, once per request, and
a candidate half.

The width of the cross layers is fixed by the fields: only the MLP grows with size, which any scaling plot must say.

Closed forms per cross layer: full d^2 + d parameters, 2*d^2 FLOPs; low rank 2*d*rank + d, 4*d*rank;
mixture E*(2*d*rank + rank^2) + d + d*E, 2*E*(2*d*rank + rank^2) + 2*d*E.

Flags: rank (None = full), experts (1 = no gate, no C_i, no activation), structure ("stacked"),
cross_activation ("tanh").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import BackboneSpec, flat_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Output, Schema, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import NO_TOKENS, RequestTokens, RowTokens, TokenShape
from recscale.models.layers import param
from recscale.models.layers.dense import MLP, SplitDense, mlp_flops, mlp_params, repeat_user
from recscale.models.layers.hidden import Hidden, HiddenOptions, hidden_params
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import Activation, activation
from recscale.models.layers.towers import tower_flops, tower_params
from recscale.models.options import Options, require_sizes
from recscale.models.ranker import Backbone
from recscale.models.sizing import dense_params, mlp_widths

# Cross parts `size_space` considers, largest first: (layers, rank).
_CROSS_LADDER = ((3, None), (3, 64), (2, 32), (2, 16), (1, 16), (1, 8), (1, 4), (1, 2), (1, 1))
# Largest share of the parameters it gives to them.
_CROSS_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class CrossOptions(Options):
    """rank None for full matrices; experts E."""

    rank: int | None = None
    experts: int = 1
    cross_activation: Activation = "tanh"
    init: param.Init = "lecun_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts == 1 and self.cross_activation != "tanh":
            raise ValueError("cross_activation has no effect on one expert; set experts above 1 or leave it 'tanh'")


@dataclasses.dataclass(frozen=True)
class DCNv2Config(CrossOptions, HiddenOptions):
    """cross_layers L; widths of the MLP, () for none; the flags of the cross layers as in `CrossOptions`."""

    cross_layers: int = 3
    widths: tuple[int, ...] = (512, 256)
    structure: Literal["stacked", "parallel"] = "stacked"
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(cross_layers=self.cross_layers, rank=self.rank, widths=self.widths)
        if self.experts < 1 or (self.experts > 1 and self.rank is None):
            raise ValueError(f"experts={self.experts} with rank={self.rank}: a mixture needs experts >= 1 and a rank")
        if self.structure == "parallel" and not self.widths:
            raise ValueError("structure='parallel' needs an MLP, but widths is empty")


class CrossLayer(nnx.Module):
    """One cross layer on rows x_0, x_l [B, d].

    Args:
        user_width, candidate_width: the two halves of d; only the first layer is ever called in halves.
        options: see the file's docstring.
    """

    # See `layers/quantisation.py`.
    INT8_KERNELS: ClassVar[Mapping[str, bool]] = {"between": False, "outward": False}

    def __init__(
        self,
        user_width: int,
        candidate_width: int,
        options: CrossOptions,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width, rank, E, init = user_width + candidate_width, options.rank, options.experts, options.init
        self.rank, self.experts, self.act, self.dtype = rank, E, options.cross_activation, dtype
        inner = inner_width(width, rank, E)
        # x V_1 .. x V_E and the gate's x W_g are one product.
        self.inward = SplitDense(user_width, candidate_width, inner, use_bias=False, init=init, dtype=dtype, rngs=rngs)
        between = outward = None
        if rank is not None and E > 1:
            between = param.kernel(rngs, (E, rank, rank), ("experts", "rank", "rank"), init)
        if rank is not None:
            outward = param.kernel(rngs, (E, rank, width), ("experts", "rank", "features"), init)
        self.between, self.outward = between, outward
        self.bias = param.constant((width,), ("features",))

    def __call__(
        self, x0: Float[Array, "B d"], x: Float[Array, "B d"], inward: Float[Array, "B inner"] | None = None
    ) -> Float[Array, "B d"]:
        """inward: the product x V, where it was computed in halves."""
        inward = self.inward(x) if inward is None else inward
        return x0 * (self._outward(inward) + self.bias[...].astype(self.dtype)[None]) + x

    def _outward(self, y: Array) -> Array:
        if self.rank is None or self.outward is None:
            return y
        if self.between is None:
            return contract("br,rd->bd", y, self.outward[...][0], self.dtype)
        act, cut = activation(self.act), self.experts * self.rank
        h = act(y[:, :cut]).reshape(-1, self.experts, self.rank).swapaxes(0, 1)
        gate = jax.nn.softmax(y[:, cut:].astype(jnp.float32), axis=-1).astype(self.dtype)
        h = act(contract("ebr,ers->ebs", h, self.between[...], self.dtype)) * gate.T[..., None]
        return contract("ebr,erd->bd", h, self.outward[...], self.dtype)


def inner_width(width: int, rank: int | None, experts: int) -> int:
    """Columns of a cross layer's first product: d, rank, or E ranks and E gates."""
    if rank is None:
        return width
    return rank if experts == 1 else experts * rank + experts


class _State(NamedTuple):
    """x_user [R, d_u], and its products with the first cross layer and, if parallel, with the MLP; None if d_u = 0."""

    x: Array | None
    cross: Array | None
    deep: Array | None


class DCNv2(Backbone):
    """Cross layers on the flat inputs of `plan` and an MLP of `widths`, stacked or parallel."""

    def __init__(
        self, plan: FlatPlan, tasks: int, options: DCNv2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        widths, init, act = options.widths, options.init, options.activation
        self.plan, self.parallel, self.dtype = plan, options.structure == "parallel", dtype
        user, candidate = plan.user_width, plan.candidate_width
        self.cross = nnx.List(
            CrossLayer(user, candidate, options, dtype=dtype, rngs=rngs) for _ in range(options.cross_layers)
        )
        first = hidden = rest = None
        if widths:
            first = SplitDense(user, candidate, widths[0], init=init, dtype=dtype, rngs=rngs)
            hidden = Hidden(widths[0], 0, act, options)
            rest = MLP(
                widths[0], widths[1:], activation=act, options=options, first=1, init=init, dtype=dtype, rngs=rngs
            )
        self.first, self.hidden, self.rest = first, hidden, rest
        width = _head_width(plan.width, widths, options.structure)
        self.towers = options.towers(width, tasks, init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs, tokens: RequestTokens | None = None) -> _State:
        x = self.plan.join_user(user, tokens)
        deep = self.first.encode_user(x) if self.first is not None and self.parallel else None
        return _State(x, self.cross[0].inward.encode_user(x), deep)

    def score(
        self, state: _State, candidates: CandidateInputs, tokens: RowTokens | None = None, *, key: Array | None = None
    ) -> Output:
        own = self.plan.join_candidates(candidates, tokens)
        requests, count, width = own.shape
        x0 = own.reshape(requests * count, width)
        if state.x is not None:
            x0 = jnp.concatenate([repeat_user(state.x, count), x0], axis=-1)
        x0 = x0.astype(self.dtype)
        x = self.cross[0](x0, x0, self.cross[0].inward.score(state.cross, own))
        for layer in list(self.cross)[1:]:
            x = layer(x0, x)
        if self.first is not None and self.hidden is not None and self.rest is not None:
            h = self.first.score(state.deep, own) if self.parallel else self.first(x)
            valid = candidates.valid_rows
            h = self.rest(self.hidden(h, key, valid), key, valid)
            x = jnp.concatenate([x, h], axis=-1) if self.parallel else h
        return Output(logits=self.towers(x, key).reshape(requests, count, -1))


def count_params(config: DCNv2Config, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    d = plan_flat(schema, tokens).width
    head = tower_params(_head_width(d, config.widths, config.structure), len(schema.tasks), config.tower)
    deep = mlp_params(d, config.widths) + hidden_params(config.widths, config)
    return Params(dense=_cross_params(d, config) + deep + head, head=head)


def count_flops(config: DCNv2Config, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: the user half of every product of x_0 per request, all else per candidate."""
    plan = plan_flat(schema, tokens)
    d, rank, experts, widths = plan.width, config.rank, config.experts, config.widths
    inner = inner_width(d, rank, experts)
    outward = 0 if rank is None else 2 * experts * rank * (d + (rank if experts > 1 else 0))
    rest = config.cross_layers * outward + (config.cross_layers - 1) * 2 * d * inner
    total = plan.split_flops(inner)
    if config.structure == "parallel":
        total += plan.split_flops(widths[0])
        rest += mlp_flops(widths[0], widths[1:])
    else:
        rest += mlp_flops(d, widths)
    rest += tower_flops(_head_width(d, widths, config.structure), len(schema.tasks), config.tower)
    return total + Flops(candidate=rest)


def size_space(
    schema: Schema, config: DCNv2Config, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (cross_layers, rank, widths) near the target.

    A given rank keeps the cross part as configured. With rank=None it starts at the largest cross part that leaves a
    fifth of the parameters to the MLP (up to `cross_layers` full layers) and goes down in rank and depth from there.
    """
    d = plan_flat(schema, tokens).width
    ladder = [(config.cross_layers, config.rank)]
    if config.rank is None:
        ladder += [step for step in _CROSS_LADDER if step[0] <= config.cross_layers and (step[1] or 0) < d / 2]
    for layers, rank in dict.fromkeys(ladder):
        shape = dataclasses.replace(config, cross_layers=layers, rank=rank)
        if config.rank is None and _cross_params(d, shape) > _CROSS_SHARE * target_dense_params:
            continue
        params = dense_params(count_params, shape, schema, tokens)
        for widths in mlp_widths(params, len(config.widths), target_dense_params):
            yield {"cross_layers": layers, "rank": rank} | widths


def _cross_params(d: int, config: DCNv2Config) -> int:
    rank, experts = config.rank, config.experts
    outward = 0 if rank is None else experts * rank * (d + (rank if experts > 1 else 0))
    return config.cross_layers * (d * inner_width(d, rank, experts) + outward + d)


def _head_width(d: int, widths: tuple[int, ...], structure: str) -> int:
    if not widths:
        return d
    return widths[-1] + (d if structure == "parallel" else 0)


DCNV2 = BackboneSpec(DCNv2Config, flat_builder(DCNv2), count_params, count_flops, size_space)
