"""The frame Wukong, AutoInt and DHEN-lite share: field tokens, blocks, all output tokens side by side, towers.

    X_0 = tokenizer(fields)     X_{l+1} = block_l(X_l)     logits = towers(MLP(flatten X_L))

User tokens are made once per request, everything after them is per candidate. Activations are token-major [T,B,D].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.tokenizers import Tokenizer, TokenizerOptions, TokenPlan, UserTokens
from recscale.models.layers.dense import MLP, mlp_flops, mlp_params
from recscale.models.layers.mixing import flatten_token_major
from recscale.models.layers.towers import Towers, tower_flops, tower_params
from recscale.models.ranker import Backbone

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FieldTokenOptions(TokenizerOptions):
    """One token per field unless told otherwise, projected to D where it is not an embedding of that width."""

    tokenizer: Literal["cut", "group", "field", "identity", "auto"] = "auto"


class Flattened(Backbone):
    """Tokenizer, blocks, flatten, MLP of widths `head_mlp`, towers.

    Args:
        plan: the resolved tokenizer (`plan_tokens`).
        width: D of the tokens.
        make_blocks: called after the tokenizer was made, so that parameters are drawn in reading order.
        flat: T*D of what the last block gives.
        tasks: Y.
    """

    def __init__(
        self,
        plan: TokenPlan,
        width: int,
        make_blocks: Callable[[], Iterable[nnx.Module]],
        flat: int,
        tasks: int,
        *,
        head_mlp: tuple[int, ...] = (),
        tower: tuple[int, ...] = (),
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.tokenizer = Tokenizer(plan, width, **kwargs)
        self.blocks = nnx.List(make_blocks())
        self.mlp = MLP(flat, head_mlp, **kwargs)
        self.towers = Towers(head_mlp[-1] if head_mlp else flat, tasks, tower=tower, **kwargs)

    def encode_user(self, user: UserInputs, tokens: Array | None = None) -> UserTokens:
        return self.tokenizer.encode_user(user, tokens)

    def score(
        self, state: UserTokens, candidates: CandidateInputs, tokens: Array | None = None, *, key: Array | None = None
    ) -> Output:
        own = self.tokenizer.candidate_tokens(state, candidates, tokens)
        x = self.tokenizer.join(state, own)
        for block in self.blocks:
            x = block(x)
        logits = self.towers(self.mlp(flatten_token_major(x)))
        return Output(logits=logits.reshape(*own.shape[1:3], -1))


def frame_params(
    plan: TokenPlan, width: int, flat: int, tasks: int, head_mlp: tuple[int, ...] = (), tower: tuple[int, ...] = ()
) -> Params:
    """Parameters of `Flattened` without its blocks."""
    tokenizer, mlp = plan.params(width), mlp_params(flat, head_mlp)
    head = tower_params(head_mlp[-1] if head_mlp else flat, tasks, tower)
    return Params(dense=tokenizer + mlp + head, tokenizer=tokenizer, head=head)


def frame_flops(
    plan: TokenPlan, width: int, flat: int, tasks: int, head_mlp: tuple[int, ...] = (), tower: tuple[int, ...] = ()
) -> Flops:
    """FLOPs of `Flattened` without its blocks."""
    head = tower_flops(head_mlp[-1] if head_mlp else flat, tasks, tower)
    return plan.flops(width) + Flops(candidate=mlp_flops(flat, head_mlp) + head)


def raw_flops(plan: TokenPlan, flops: int) -> Flops:
    """Products of the tokens themselves: their gradient is unneeded where the tokens are raw numbers."""
    return Flops(candidate=flops, candidate_unneeded=0 if plan.trained else flops)
