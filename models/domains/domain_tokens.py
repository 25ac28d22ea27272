"""Tokens of scenarios and tasks made from a row's fields: what MDL's blocks start with.

    x_k = relu( important W_k + prior_k V_k + b_k )          one linear map per token, more with `depth`

`important` are the fields of group "extra", which the features' tokenizer does not read: a few strong ids with tables
of their own (`Schema.with_extra_tables`). Without any they are all fields that the tokenizer reads, tables shared.
`prior_k` are the fields of group "scenario0", "scenario1", ... for a scenario's token, "scenario_global" for the global
one, "task0", ... for a task's: its own statistics, read by nobody else.

Letters: R requests, C candidates, B = R*C rows, G scenarios, Y tasks, n tokens, D width, d_i and d_k widths of
`important` and of prior k. n*d_i*D + n*D + sum_k d_k*D + (depth - 1)*n*(D^2 + D) parameters; all products with fields
of the user are once per request.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.counts import Flops
from recscale.models.inputs.batch import CandidateInputs, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.schema import EXTRA_TABLES, Schema
from recscale.models.layers.dense import Dense, SplitDense
from recscale.models.layers.per_token import PerTokenDense

# The users' half of every token before the activation, [R, n*D], or None without fields of the user.
DomainState = Array | None


@dataclasses.dataclass(frozen=True)
class DomainPlan:
    """The tokens of one schema: G domains; numbers of scenario (global included) and task tokens; what each reads."""

    domains: int
    scenarios: int
    tasks: int
    important: FlatPlan
    priors: tuple[FlatPlan, ...]

    @property
    def tokens(self) -> int:
        """n."""
        return self.scenarios + self.tasks

    def params(self, width: int, depth: int) -> int:
        """Parameters for tokens of width D."""
        first = self.important.width * self.tokens * width + sum(prior.width * width for prior in self.priors)
        return first + self.tokens * width + (depth - 1) * self.tokens * (width * width + width)

    def flops(self, width: int, depth: int) -> Flops:
        """FLOPs for tokens of width D."""
        total = self.important.split_flops(self.tokens * width)
        for prior in self.priors:
            total += prior.split_flops(width)
        return total + Flops(candidate=(depth - 1) * 2 * self.tokens * width * width)


def plan_domain_tokens(schema: Schema, *, scenarios: bool, has_global: bool, tasks: bool) -> DomainPlan:
    """Which tokens there are, and the fields that each reads.

    Raises:
        ValueError: none of the fields that all tokens read belongs to the candidate.
    """
    own = _scenario_groups(schema) if scenarios else []
    own = own if has_global else own[: schema.domains]
    names = own + (_task_groups(schema) if tasks else [])
    extra = any(field.group == EXTRA_TABLES for field in schema.fields)
    common = [field.name for field in (schema.fields if extra else feature_schema(schema).fields)
              if not extra or field.group == EXTRA_TABLES]  # fmt: skip
    important = plan_flat(schema, keep=lambda field: field.name in common)
    if not important.candidate_width:
        raise ValueError(f"no field of group {EXTRA_TABLES!r} is the candidate's: give an extra table to one of them")
    priors = tuple(plan_flat(schema, keep=lambda field, name=name: field.group == name) for name in names)
    return DomainPlan(schema.domains, len(own), len(names) - len(own), important, priors)


def feature_schema(schema: Schema) -> Schema:
    """The schema without the fields that only domain tokens read."""
    own = {EXTRA_TABLES, *_scenario_groups(schema), *_task_groups(schema)}
    return dataclasses.replace(schema, fields=tuple(field for field in schema.fields if field.group not in own))


class DomainTokens(nnx.Module):
    """The tokens of a `plan` [n, B, D], scenarios first; depth: linear maps one after another, ReLU behind each."""

    def __init__(
        self,
        plan: DomainPlan,
        width: int,
        depth: int = 1,
        *,
        init: str = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        n, own = plan.tokens, plan.important
        self.plan, self.width = plan, width
        self.important = SplitDense(
            own.user_width,
            own.candidate_width,
            n * width,
            init=init,
            axes=("features", "embed"),
            dtype=dtype,
            rngs=rngs,
        )

        def priors(widths: list[int]) -> nnx.Dict[Dense]:
            axes = ("features", "embed")
            return nnx.Dict(
                {
                    str(k): Dense(d, width, use_bias=False, init=init, axes=axes, dtype=dtype, rngs=rngs)
                    for k, d in enumerate(widths)
                    if d
                }
            )

        self.user_priors = priors([prior.user_width for prior in plan.priors])
        self.candidate_priors = priors([prior.candidate_width for prior in plan.priors])
        axes = ("features", "embed")
        self.more = nnx.List(
            PerTokenDense(n, width, width, init=init, axes=axes, dtype=dtype, rngs=rngs) for _ in range(depth - 1)
        )

    def encode_user(self, user: UserInputs) -> DomainState:
        h = self.important.encode_user(self.plan.important.join_user(user))
        found = {k: prior.join_user(user) for k, prior in enumerate(self.plan.priors)}
        return self._with_priors(h, self.user_priors, {k: x for k, x in found.items() if x is not None})

    def score(self, state: DomainState, candidates: CandidateInputs) -> Float[Array, "n B D"]:
        h = self.important.score(state, self.plan.important.join_candidates(candidates))
        found = {k: prior.join_candidates(candidates) for k, prior in enumerate(self.plan.priors)}
        flat = {k: x.reshape(-1, x.shape[-1]) for k, x in found.items() if x.shape[-1]}
        h = self._with_priors(h, self.candidate_priors, flat)
        assert h is not None
        tokens = jax.nn.relu(h.reshape(h.shape[0], self.plan.tokens, self.width).swapaxes(0, 1))
        for layer in self.more:
            tokens = jax.nn.relu(layer(tokens))
        return tokens

    def _with_priors(self, h: Array | None, priors: nnx.Dict[Dense], inputs: dict[int, Array]) -> Array | None:
        """h [rows, n*D] plus what the tokens that have fields of their own make of them."""
        if not inputs:
            return h
        made = {k: priors[str(k)](x) for k, x in inputs.items()}
        nothing = jnp.zeros_like(next(iter(made.values())))
        own = jnp.concatenate([made.get(k, nothing) for k in range(self.plan.tokens)], axis=-1)
        return own if h is None else h + own


def _scenario_groups(schema: Schema) -> list[str]:
    return [*(f"scenario{k}" for k in range(schema.domains)), "scenario_global"]


def _task_groups(schema: Schema) -> list[str]:
    return [f"task{y}" for y in range(len(schema.tasks))]
