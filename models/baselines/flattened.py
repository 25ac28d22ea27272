"""The frame of models on field tokens: tokens, blocks, all output tokens side by side, towers.

    X_0 = tokenizer(fields)     X_{l+1} = block_l(X_l)     logits = towers(MLP(flatten X_L))

User tokens are made once per request, everything after them is per candidate. Activations are token-major [T,B,D].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import token_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import RequestTokens, RowTokens
from recscale.models.inputs.tokenizers import Tokenizer, TokenizerOptions, TokenPlan, UserTokens
from recscale.models.layers.dense import MLP, mlp_flops, mlp_params
from recscale.models.layers.dropout import dropout
from recscale.models.layers.hidden import DropoutOptions
from recscale.models.layers.mixing import flatten_token_major
from recscale.models.layers.param import Init
from recscale.models.layers.towers import tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Backbone


@dataclasses.dataclass(frozen=True)
class FieldTokenOptions(TokenizerOptions, DropoutOptions):
    """width D, layers L; one token per field unless told otherwise, projected to D where it is not an embedding of that
    width."""

    tokenizer: Literal["cut", "group", "field", "identity", "auto"] = "auto"
    width: int = 64
    layers: int = 2
    init: Init = "lecun_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(width=self.width, layers=self.layers)

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Widths of the MLP in front of the towers."""
        return ()

    def sizes(self, tokens: int) -> list[int]:
        """What each layer is made for: its number of tokens, unless a model says otherwise."""
        return [tokens] * self.layers

    def flat(self, tokens: int) -> int:
        """T*D of what the last layer gives."""
        return tokens * self.width


class FieldTokens(Backbone):
    """Base class: a tokenizer, and `logits` of the tokens [T, B, D] of every row."""

    def __init__(self, plan: TokenPlan, options: FieldTokenOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.tokenizer = Tokenizer(plan, options.width, init=options.init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs, tokens: RequestTokens | None = None) -> UserTokens:
        return self.tokenizer.encode_user(user, tokens)

    def score(
        self,
        state: UserTokens,
        candidates: CandidateInputs,
        tokens: RowTokens | None = None,
        *,
        key: Array | None = None,
    ) -> Output:
        own = self.tokenizer.candidate_tokens(state, candidates, tokens)
        logits = self.logits(self.tokenizer.join(state, own), key)
        return Output(logits=logits.reshape(*own.shape[1:3], -1))

    def logits(self, x: Float[Array, "T B D"], key: Array | None = None) -> Float[Array, "B Y"]:
        """key: given in training only."""
        raise NotImplementedError


class Flattened(FieldTokens):
    """Tokenizer, blocks, flatten, MLP of widths `head_widths`, towers.

    Args:
        plan: the resolved tokenizer (`plan_tokens`).
        tasks: Y.
        layer: made of each of `options.sizes`, after the tokenizer, so that parameters are drawn in reading order.
    """

    def __init__(
        self,
        plan: TokenPlan,
        tasks: int,
        options: FieldTokenOptions,
        layer: Callable[..., nnx.Module],
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(plan, options, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(layer(size, options, dtype=dtype, rngs=rngs) for size in options.sizes(plan.tokens))
        flat, head, init = options.flat(plan.tokens), options.head_widths, options.init
        self.mlp = MLP(flat, head, options=options, init=init, dtype=dtype, rngs=rngs)
        self.dropout = 0.0 if head else options.hidden_dropout
        self.towers = options.towers((flat, *head)[-1], tasks, init=init, dtype=dtype, rngs=rngs)

    def logits(self, x: Float[Array, "T B D"], key: Array | None = None) -> Float[Array, "B Y"]:
        for block in self.blocks:
            x = block(x)
        h = self.mlp(flatten_token_major(x), key)
        return self.towers(dropout(h, self.dropout, key), key)


def frame_params(plan: TokenPlan, options: FieldTokenOptions, tasks: int) -> Params:
    """Parameters of `Flattened` without its blocks."""
    flat, head = options.flat(plan.tokens), options.head_widths
    tokenizer, towers = plan.params(options.width), tower_params((flat, *head)[-1], tasks, options.tower)
    return Params(dense=tokenizer + mlp_params(flat, head) + towers, tokenizer=tokenizer, head=towers)


def frame_flops(plan: TokenPlan, options: FieldTokenOptions, tasks: int) -> Flops:
    """FLOPs of `Flattened` without its blocks."""
    flat, head = options.flat(plan.tokens), options.head_widths
    towers = tower_flops((flat, *head)[-1], tasks, options.tower)
    return plan.flops(options.width) + Flops(candidate=mlp_flops(flat, head) + towers)


def raw_flops(plan: TokenPlan, flops: int) -> Flops:
    """Products of the tokens themselves: their gradient is unneeded where the tokens are raw numbers."""
    return Flops(candidate=flops, candidate_unneeded=0 if plan.trained else flops)


def flattened_builder(layer: Callable[..., nnx.Module]) -> Callable[..., Flattened]:
    """The `build` of a model that is `Flattened` with such layers."""
    return token_builder(functools.partial(Flattened, layer=layer))
