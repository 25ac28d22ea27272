"""What a model file registers: its config, how to build it, and its closed forms; and the usual ways to build it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .counts import Flops, Params
from .inputs.flat import plan_flat
from .inputs.history import NO_TOKENS, TokenShape
from .inputs.schema import Schema
from .inputs.tokenizers import TokenPlan, plan_tokens

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """A backbone: reads fields, and the tokens of a sequence encoder if there is one.

    Every callable takes the `TokenShape` of those tokens last (`NO_TOKENS` for none):
    build(config, schema, tokens, *, rngs, dtype) -> Backbone; count_params / count_flops(config, schema, tokens);
    size_space(schema, config, target_dense_params, tokens) -> overrides of the config, hardware-friendly first.
    """

    config: type
    build: Callable[..., Any]
    count_params: Callable[..., Params]
    count_flops: Callable[..., Flops]
    size_space: Callable[..., Iterable[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """A sequence encoder; alone it stands in front of a DLRM-MLP.

    build(config, schema, *, rngs, dtype) -> SequenceEncoder; token_shape(config, schema) -> TokenShape;
    count_params / count_flops(config, schema); size_space(schema, config, target_dense_params) -> overrides of the
    config, hardware-friendly first, or None where it has no size of its own.
    """

    config: type
    build: Callable[..., Any]
    token_shape: Callable[..., TokenShape]
    count_params: Callable[..., Params]
    count_flops: Callable[..., Flops]
    size_space: Callable[..., Iterable[dict[str, Any]]] | None = None


@dataclasses.dataclass(frozen=True)
class RankerSpec:
    """A unified architecture: reads the schema's histories itself, so no encoder goes in front of it.

    build(config, schema, *, rngs, dtype) -> Ranker; count_params / count_flops(config, schema);
    size_space(schema, config, target_dense_params) -> overrides of the config, hardware-friendly first.
    """

    config: type
    build: Callable[..., Any]
    count_params: Callable[..., Params]
    count_flops: Callable[..., Flops]
    size_space: Callable[..., Iterable[dict[str, Any]]]


def builder(model: Callable[..., Model], plan: Callable[..., Any]) -> Callable[..., Model]:
    """The `build` of a backbone or ranker that is made of a plan, the number of tasks and its config."""

    def build(
        config: Any, schema: Schema, *tokens: TokenShape, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> Model:
        return model(plan(config, schema, *tokens), len(schema.tasks), config, dtype=dtype, rngs=rngs)

    return build


def token_builder(model: Callable[..., Model]) -> Callable[..., Model]:
    """The `build` of a backbone made of its tokens' plan, the number of tasks and its config."""

    def plan(config: Any, schema: Schema, tokens: TokenShape = NO_TOKENS) -> TokenPlan:
        return plan_tokens(schema, config, config.width, tokens)

    return builder(model, plan)


def flat_builder(model: Callable[..., Model]) -> Callable[..., Model]:
    """The `build` of a backbone made of the plan of its flat inputs, the number of tasks and its config."""
    return builder(model, lambda config, schema, tokens=NO_TOKENS: plan_flat(schema, tokens))
