"""DLRM-MLP (arXiv 1906.00091): an MLP on the concatenated fields, the plain baseline of ranking papers.

    h_0 = x = [x_user, x_candidate]     h_l = relu(h_{l-1} W_l + b_l)     logits = towers(h_L)

Letters: d_in = F_0 width of all fields, F_1..F_L layer widths, Y tasks, T tokens and D their width (interaction="dot").
The first product is split exactly, x W_1 = x_user W_user + x_candidate W_candidate, its user half once per request.

interaction="dot" (the DLRM of the paper): numeric fields go through a bottom MLP, one per side (so that the user's runs
once per request), to a token of width D; every id field is a token; all pairwise dots join x. Fields whose width is not
D are projected. History tokens join x only.

Closed forms (interaction="none"):
    params = sum_l (F_{l-1}*F_l + F_l) + Y*(F_L + 1)          flops = 2*sum_l F_{l-1}*F_l + 2*Y*F_L
interaction="dot" adds T*(T-1)/2 inputs, 2*T^2*D FLOPs (the whole Gram matrix, as executed), bottom MLPs, projections.

Undisclosed -> flag (default): the tower the comparison papers used -> widths; interaction ("none"); init; tower (()).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from recscale.models.architecture import BackboneSpec, builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Field, Output, Schema, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import NO_TOKENS, RequestTokens, RowTokens, TokenShape
from recscale.models.layers.dense import MLP, Dense, SplitDense, mlp_flops, mlp_params, repeat_user
from recscale.models.layers.hidden import Hidden, HiddenOptions, hidden_params
from recscale.models.layers.matmul import contract
from recscale.models.layers.param import Init
from recscale.models.layers.per_token import Activation
from recscale.models.layers.towers import tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Backbone
from recscale.models.sizing import dense_params, mlp_widths


@dataclasses.dataclass(frozen=True)
class DLRMMLPConfig(HiddenOptions):
    """widths F_1..F_L; bottom: hidden widths of the bottom MLPs; interaction_width: D, None = that of all id fields."""

    widths: tuple[int, ...] = (512, 256, 128)
    interaction: Literal["none", "dot"] = "none"
    interaction_width: int | None = None
    bottom: tuple[int, ...] = (64,)
    activation: Activation = "relu"
    init: Init = "lecun_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths:
            raise ValueError("widths is empty, expected at least one layer")
        if self.interaction == "none" and self.interaction_width is not None:
            raise ValueError("interaction_width has no effect without interaction='dot'; set that or leave it None")
        require_sizes(widths=self.widths, interaction_width=self.interaction_width, bottom=self.bottom)


@dataclasses.dataclass(frozen=True)
class DotPlan:
    """Tokens of interaction="dot", per side: id fields, numeric fields, and the widths of both."""

    width: int
    fields: tuple[tuple[Field, ...], ...]
    numeric: tuple[tuple[Field, ...], ...]

    @property
    def tokens(self) -> int:
        """T: id fields and one token per side that has numeric fields."""
        return sum(map(len, self.fields)) + sum(map(bool, self.numeric))

    @property
    def pairs(self) -> int:
        return self.tokens * (self.tokens - 1) // 2

    def bottom_width(self, side: int) -> int:
        """Width the side's numeric token adds to x."""
        return self.width if self.numeric[side] else 0

    def projected(self, side: int) -> tuple[Field, ...]:
        return tuple(field for field in self.fields[side] if field.width != self.width)


class DotSide(nnx.Module):
    """Tokens of one side: fields -> (numeric token [..., D] or None, tokens [..., T_side, D] or None)."""

    def __init__(
        self, plan: DotPlan, side: int, options: DLRMMLPConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        numeric, D, init, bottom = plan.numeric[side], plan.width, options.init, None
        self.numeric = tuple(field.name for field in numeric)
        self.names = tuple(field.name for field in plan.fields[side])
        if numeric:
            widths, act = (*options.bottom, D), options.activation
            bottom = MLP(_width(numeric), widths, activation=act, init=init, dtype=dtype, rngs=rngs)
        self.bottom = bottom
        dense = functools.partial(Dense, axes=("features", "embed"), init=init, dtype=dtype, rngs=rngs)
        self.project = nnx.Dict({field.name: dense(field.width, D) for field in plan.projected(side)})
        self.projected = tuple(field.name for field in plan.projected(side))

    def __call__(self, fields: dict[str, Array]) -> tuple[Array | None, Array | None]:
        tokens = [self.project[n](fields[n]) if n in self.projected else fields[n] for n in self.names]
        numeric = None
        if self.bottom is not None:
            numeric = self.bottom(jnp.concatenate([fields[name] for name in self.numeric], axis=-1))
            tokens.append(numeric)
        return numeric, jnp.stack(tokens, axis=-2) if tokens else None


class _State(NamedTuple):
    """first: x_user W_user [R, F_1] or None; tokens: the user's dot tokens [R, T_u, D] or None."""

    first: Array | None
    tokens: Array | None


class DLRMMLP(Backbone):
    """An MLP of `widths` on the flat inputs of the first plan, with the pairwise dots of the second."""

    def __init__(
        self,
        plans: tuple[FlatPlan, DotPlan | None],
        tasks: int,
        options: DLRMMLPConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        (plan, dots), widths, act, init = plans, options.widths, options.activation, options.init
        self.plan, self.dots, self.dtype = plan, dots, dtype
        self.sides = nnx.List(DotSide(dots, side, options, dtype=dtype, rngs=rngs) for side in (0, 1) if dots)
        user, candidate = _first_widths(plan, dots)
        self.first = SplitDense(user, candidate, widths[0], init=init, dtype=dtype, rngs=rngs)
        self.hidden = Hidden(widths[0], 0, act, options)
        self.rest = MLP(
            widths[0], widths[1:], activation=act, options=options, first=1, init=init, dtype=dtype, rngs=rngs
        )
        self.towers = options.towers(widths[-1], tasks, init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs, tokens: RequestTokens | None = None) -> _State:
        x, made = self.plan.join_user(user, tokens), None
        if self.dots:
            numeric, made = self.sides[0](user.fields)
            parts = [part for part in (x, numeric) if part is not None]
            x = jnp.concatenate(parts, axis=-1) if parts else None
        return _State(self.first.encode_user(x), made)

    def score(
        self, state: _State, candidates: CandidateInputs, tokens: RowTokens | None = None, *, key: Array | None = None
    ) -> Output:
        x = self.plan.join_candidates(candidates, tokens)
        if self.dots:
            numeric, made = self.sides[1](candidates.fields)
            parts = (x, numeric, self._pairwise(state.tokens, cast(Array, made)))
            x = jnp.concatenate([part for part in parts if part is not None], axis=-1)
        h = self.hidden(self.first.score(state.first, x), key, candidates.valid_rows)
        h = self.rest(h, key, candidates.valid_rows)
        return Output(logits=self.towers(h, key).reshape(*x.shape[:2], -1))

    def _pairwise(self, user: Array | None, own: Array) -> Array:
        """Dots of all token pairs i < j: [R, T_u, D] and [R, C, T_c, D] -> [R, C, T*(T-1)/2]."""
        requests, candidates, _, width = own.shape
        rows = own.reshape(requests * candidates, -1, width)
        if user is not None:
            shared = repeat_user(user.reshape(requests, -1), candidates).reshape(requests * candidates, -1, width)
            rows = jnp.concatenate([shared, rows], axis=1)
        gram = contract("bid,bjd->bij", rows, rows, self.dtype)
        i, j = np.triu_indices(rows.shape[1], k=1)
        return gram[:, i, j].reshape(requests, candidates, -1)


def count_params(config: DLRMMLPConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan, dots = _plans(config, schema, tokens)
    head = tower_params(config.widths[-1], len(schema.tasks), config.tower)
    tokenizer = 0
    for side in (0, 1):
        if dots is not None:
            tokenizer += sum(field.width * dots.width + dots.width for field in dots.projected(side))
        if dots is not None and dots.numeric[side]:
            tokenizer += mlp_params(_width(dots.numeric[side]), (*config.bottom, dots.width))
    layers = mlp_params(sum(_first_widths(plan, dots)), config.widths) + hidden_params(config.widths, config)
    dense = tokenizer + layers + head
    return Params(dense=dense, tokenizer=tokenizer, head=head)


def count_flops(config: DLRMMLPConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: the user half of the first layer per request, all else per candidate."""
    plan, dots = _plans(config, schema, tokens)
    widths = config.widths
    rest = mlp_flops(widths[0], widths[1:]) + tower_flops(widths[-1], len(schema.tasks), config.tower)
    if dots is None:
        return plan.split_flops(widths[0]) + Flops(candidate=rest)
    user, candidate = (2 * width * widths[0] for width in _first_widths(plan, dots))
    trained = (plan.user_trained or bool(dots.numeric[0]), True)
    total = Flops(user, candidate + rest + 2 * dots.tokens**2 * dots.width, user * (not trained[0]), 0)
    sides = [_side_flops(config, dots, side) for side in (0, 1)]
    return total + Flops(sides[0][0], sides[1][0], sides[0][1], sides[1][1])


def size_space(
    schema: Schema, config: DLRMMLPConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (widths) near the target, as many layers as configured."""
    params = dense_params(count_params, config, schema, tokens)
    yield from mlp_widths(params, len(config.widths), target_dense_params)


def _plans(config: DLRMMLPConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> tuple[FlatPlan, DotPlan | None]:
    if config.interaction == "none":
        return plan_flat(schema, tokens), None
    sides = (schema.user_fields, schema.candidate_fields)
    fields = tuple(tuple(field for field in side if not field.is_dense) for side in sides)
    numeric = tuple(tuple(field for field in side if field.is_dense) for side in sides)
    found = sorted({field.width for side in fields for field in side})
    if config.interaction_width is None and len(found) != 1:
        raise ValueError(
            f"interaction='dot' needs id fields of one width, found {found or 'no id field'}; set interaction_width"
        )
    dots = DotPlan(config.interaction_width or found[0], fields, numeric)
    return plan_flat(schema, tokens, keep=lambda field: not field.is_dense), dots


def _first_widths(plan: FlatPlan, dots: DotPlan | None) -> tuple[int, int]:
    """Widths of the two halves of x, numeric tokens and dots included."""
    if dots is None:
        return plan.user_width, plan.candidate_width
    return plan.user_width + dots.bottom_width(0), plan.candidate_width + dots.bottom_width(1) + dots.pairs


def _side_flops(config: DLRMMLPConfig, dots: DotPlan, side: int) -> tuple[int, int]:
    """FLOPs of one side's projections and bottom MLP, and those of gradients nobody needs (raw numeric inputs)."""
    total = sum(2 * field.width * dots.width for field in dots.projected(side))
    if not dots.numeric[side]:
        return total, 0
    width, widths = _width(dots.numeric[side]), (*config.bottom, dots.width)
    return total + mlp_flops(width, widths), 2 * width * widths[0]


def _width(fields: tuple[Field, ...]) -> int:
    return sum(field.width for field in fields)


DLRM_MLP = BackboneSpec(DLRMMLPConfig, builder(DLRMMLP, _plans), count_params, count_flops, size_space)
