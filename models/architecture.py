"""What a model file registers: its config, how to build it, and its closed forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from .counts import Flops, Params
from .inputs.history import TokenShape


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
    count_params / count_flops(config, schema).
    """

    config: type
    build: Callable[..., Any]
    token_shape: Callable[..., TokenShape]
    count_params: Callable[..., Params]
    count_flops: Callable[..., Flops]


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
