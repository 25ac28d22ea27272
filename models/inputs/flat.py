"""Inputs of flat models: x = [user fields, user history tokens | candidate fields, candidate history tokens].

The user half x_u [R, d_u] is joined once per request, the candidate half x_c [R, C, d_c] per candidate; history tokens
are flattened. d_in = d_u + d_c.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from recscale.models.counts import Flops

from .batch import CandidateInputs, UserInputs, join_fields
from .history import NO_TOKENS, RequestTokens, RowTokens, TokenShape
from .schema import Field, Schema


@dataclasses.dataclass(frozen=True)
class FlatPlan:
    """Which fields make up each half, and whether a gradient must flow back into it."""

    user: tuple[str, ...]
    candidate: tuple[str, ...]
    user_width: int
    candidate_width: int
    user_trained: bool
    candidate_trained: bool
    tokens: TokenShape = NO_TOKENS

    @property
    def width(self) -> int:
        """d_in."""
        return self.user_width + self.candidate_width

    def join_user(self, inputs: UserInputs, tokens: RequestTokens | None = None) -> Float[Array, "R d"] | None:
        """[R, d_u]; None if the user half is empty. tokens: [R, t_u, A]."""
        return _join(self.user, inputs.fields, tokens, self.tokens.user)

    def join_candidates(self, inputs: CandidateInputs, tokens: RowTokens | None = None) -> Float[Array, "R C d"]:
        """[R, C, d_c]; a width of 0 if the plan keeps no candidate field. tokens: [R, C, t_c, A]."""
        joined = _join(self.candidate, inputs.fields, tokens, self.tokens.candidate)
        return next(iter(inputs.fields.values()))[..., :0] if joined is None else joined

    def split_flops(self, out: int) -> Flops:
        """FLOPs of the first product x W, W [d_in, out], split by side."""
        user, candidate = 2 * self.user_width * out, 2 * self.candidate_width * out
        return Flops(user, candidate, user * (not self.user_trained), candidate * (not self.candidate_trained))


def plan_flat(
    schema: Schema, tokens: TokenShape = NO_TOKENS, keep: Callable[[Field], bool] = lambda field: True
) -> FlatPlan:
    """The halves of a schema's fields for which `keep` holds, with the tokens of a sequence encoder.

    Raises:
        ValueError: nothing in the schema depends on the candidate.
    """
    if not schema.candidate_fields:
        raise ValueError("the schema has no candidate or cross field, so there is nothing to rank")
    user = tuple(filter(keep, schema.user_fields))
    candidate = tuple(filter(keep, schema.candidate_fields))

    def trained(fields: tuple[Field, ...], count: int, flag: bool) -> bool:
        return any(not field.is_dense for field in fields) or (count > 0 and flag)

    return FlatPlan(
        user=tuple(field.name for field in user),
        candidate=tuple(field.name for field in candidate),
        user_width=sum(field.width for field in user) + tokens.user * tokens.width,
        candidate_width=sum(field.width for field in candidate) + tokens.candidate * tokens.width,
        user_trained=trained(user, tokens.user, tokens.user_trained),
        candidate_trained=trained(candidate, tokens.candidate, tokens.candidate_trained),
        tokens=tokens,
    )


def _join(names: tuple[str, ...], fields: dict[str, Array], tokens: Array | None, expected: int) -> Array | None:
    found = 0 if tokens is None else tokens.shape[-2]
    if found != expected:
        raise ValueError(f"the model was built for {expected} history tokens, the sequence encoder gave {found}")
    parts = [join_fields(fields, names)] if names else []
    if tokens is not None:
        parts.append(tokens.reshape(*tokens.shape[:-2], -1))
    return jnp.concatenate(parts, axis=-1) if parts else None
