"""MMoE (KDD 2018, doi 10.1145/3219819.3220007): experts on the concatenated fields, one softmax gate per task.

    x = [x_user, x_candidate]                      g_y = softmax(x G_y)          G [Y,d_in,E], no bias
    e_i = relu(relu(x A_i + a_i) B_i + b_i)        h_y = sum_i g_yi e_i          A [E,d_in,F1]  B [E,F1,F2]
    logit_y = tower_y(h_y)                         a tower F2 -> F3 -> 1 per task

Letters: d_in width of all fields, E experts, F1 = hidden, F2 = expert_width, F3 = tower[0], Y tasks.
Every expert runs on every row (the gate is dense), so active and total parameters are equal. With Y = 1 this is a gated
ensemble of experts, which tables of single-task results call MoE. The products with x are split exactly into a user
half, once per request, and a candidate half.

Closed forms (one hidden tower layer):
    params = E*(d_in*F1 + F1 + F1*F2 + F2) + Y*d_in*E + Y*(F2*F3 + 2*F3 + 1)
    flops  = 2*E*(d_in*F1 + F1*F2) + 2*Y*d_in*E + 2*Y*E*F2 + 2*Y*(F2*F3 + F3)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from recscale.models.architecture import BackboneSpec, flat_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Output, Schema, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import NO_TOKENS, RequestTokens, RowTokens, TokenShape
from recscale.models.layers import param
from recscale.models.layers.dense import SplitDense
from recscale.models.layers.dropout import dropout
from recscale.models.layers.hidden import DropoutOptions
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import Activation, activation
from recscale.models.layers.towers import tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Backbone
from recscale.models.sizing import grains, solve_increasing, solve_widths

# F2 / F1 that `size_space` tries, and F3 / F2.
_RATIOS = (0.75, 1.0, 0.6, 0.5, 1.25, 1.5, 0.4, 2.0)
_TOWER_RATIO = 0.25
# The fewest hidden units of an expert; below that there are fewer experts.
_LEAST_HIDDEN = 8


@dataclasses.dataclass(frozen=True)
class MMoEConfig(DropoutOptions):
    """experts E, hidden F1, expert_width F2, tower (F3,)."""

    experts: int = 8
    hidden: int = 256
    expert_width: int = 128
    activation: Activation = "relu"
    init: param.Init = "lecun_normal"
    tower: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(experts=self.experts, hidden=self.hidden, expert_width=self.expert_width)


class _State(NamedTuple):
    """x_user A [R, E*F1] and x_user G [R, Y*E]; None without user fields."""

    first: Array | None
    gate: Array | None


class MMoE(Backbone):
    """E experts of widths `hidden` and `expert_width` on the flat inputs of `plan`, mixed per task."""

    # See `layers/quantisation.py`.
    INT8_KERNELS: ClassVar[Mapping[str, bool]] = {"second": False}

    def __init__(
        self, plan: FlatPlan, tasks: int, options: MMoEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        (E, F1, F2), init = (options.experts, options.hidden, options.expert_width), options.init
        self.plan, self.experts, self.tasks, self.act, self.dtype = plan, E, tasks, options.activation, dtype
        self.dropout = options.hidden_dropout
        split = functools.partial(SplitDense, plan.user_width, plan.candidate_width, init=init, dtype=dtype, rngs=rngs)
        # x A_1 .. x A_E are one product, x G_1 .. x G_Y another.
        self.first = split(E * F1)
        self.gate = split(tasks * E, use_bias=False, axes=("embed", "experts"))
        self.second = param.kernel(rngs, (E, F1, F2), ("experts", "hidden", "embed"), init)
        self.bias = param.constant((E, F2), ("experts", "embed"))
        self.towers = options.towers(F2, tasks, init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs, tokens: RequestTokens | None = None) -> _State:
        x = self.plan.join_user(user, tokens)
        return _State(self.first.encode_user(x), self.gate.encode_user(x))

    def score(
        self, state: _State, candidates: CandidateInputs, tokens: RowTokens | None = None, *, key: Array | None = None
    ) -> Output:
        x, act = self.plan.join_candidates(candidates, tokens), activation(self.act)
        rows = x.shape[0] * x.shape[1]
        h = act(self.first.score(state.first, x)).reshape(rows, self.experts, -1).swapaxes(0, 1)
        h = contract("ebf,efg->ebg", h, self.second[...], self.dtype)
        h = act(h + self.bias[...].astype(self.dtype)[:, None])
        gate = self.gate.score(state.gate, x).astype(jnp.float32).reshape(rows, self.tasks, self.experts)
        mixed = contract("bye,beg->byg", jax.nn.softmax(gate, axis=-1), h.swapaxes(0, 1), self.dtype)
        mixed = dropout(mixed, self.dropout, key)
        return Output(logits=self.towers(mixed.swapaxes(0, 1), key).reshape(*x.shape[:2], -1))


def count_params(config: MMoEConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    d, Y = plan_flat(schema, tokens).width, len(schema.tasks)
    E, F1, F2 = config.experts, config.hidden, config.expert_width
    head = tower_params(F2, Y, config.tower)
    return Params(dense=E * (d * F1 + F1 + F1 * F2 + F2) + Y * d * E + head, head=head)


def count_flops(config: MMoEConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: the user half of every product of x per request, all else per candidate."""
    Y, E, F1, F2 = len(schema.tasks), config.experts, config.hidden, config.expert_width
    rest = 2 * E * F1 * F2 + 2 * Y * E * F2 + tower_flops(F2, Y, config.tower)
    return plan_flat(schema, tokens).split_flops(E * F1 + Y * E) + Flops(candidate=rest)


def size_space(
    schema: Schema, config: MMoEConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (experts, hidden, expert_width, tower) near the target.

    The number of experts starts as configured and halves while an expert would have fewer than 8 hidden units. F2 is
    tied to F1 in several ratios and F3 to F2, F1 is solved for; then F2 is solved for around those solutions.
    """
    target, depth = target_dense_params, len(config.tower)

    def complete(overrides: dict[str, Any]) -> dict[str, Any]:
        """The overrides with the tower's widths, which follow F2, every layer a quarter of the one before."""
        widths = [overrides["expert_width"]]
        for _ in range(depth):
            widths.append(max(1, round(widths[-1] * _TOWER_RATIO)))
        return overrides | {"tower": tuple(widths[1:])}

    def params(overrides: dict[str, Any]) -> int:
        return count_params(dataclasses.replace(config, **complete(overrides)), schema, tokens).dense

    def tied(hidden: int, experts: int, ratio: float) -> dict[str, Any]:
        return dict(experts=experts, hidden=hidden, expert_width=max(1, round(hidden * ratio)))

    def experts_near() -> Iterator[int]:
        count = config.experts
        while count > 1 and params(tied(_LEAST_HIDDEN, count, _RATIOS[0])) > target:
            count = -(-count // 2)
        yield count
        while count > 1:
            count = -(-count // 2)
            yield count

    def shapes() -> Iterator[tuple[dict[str, Any], str, float]]:
        for experts, grain, ratio in itertools.product(experts_near(), grains(target), _RATIOS):
            hidden = solve_increasing(lambda x, e=experts, r=ratio: params(tied(x, e, r)), target, grain)
            yield tied(hidden, experts, ratio), "expert_width", hidden * ratio

    for overrides in solve_widths(shapes(), params, target):
        yield complete(overrides)


MMOE = BackboneSpec(MMoEConfig, flat_builder(MMoE), count_params, count_flops, size_space)
