"""Two-phase models: user tokens once per request, candidate tokens per candidate (UG-Sep, arXiv 2602.10455).

Activations are token-major: the user's [T_u, R, D], the candidates' [T_c, B, D] with B = R*C rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.tokenizers import Tokenizer, TokenPlan, UserTokens
from recscale.models.options import Options
from recscale.models.ranker import Backbone

from . import param
from .attention import attend_tokens
from .auxiliary import AuxiliaryHeads
from .dense import Dense, repeat_user
from .matmul import contract
from .norms import NormOptions, make_norm, normalise
from .residuals import inter_residual
from .towers import Towers, mean_tokens, sum_tokens


@dataclasses.dataclass(frozen=True)
class SeparationOptions(Options):
    """compensation: what candidates get of masked user rows, None decides by the user's share of the tokens;
    user_to_candidate: False cuts the way from users to candidates as well (two towers)."""

    compensation: Literal["none", "mean", "per_token"] | None = None
    user_to_candidate: bool = True

    def check_separation(self, **inseparable: Any) -> None:
        """ValueError for a compensation without a way to go, or a flag in `inseparable` that is not at its default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in inseparable.items():
            if value != defaults[name]:
                raise ValueError(
                    f"{name} is {value!r}: user and candidate tokens cannot be separated there; set {defaults[name]!r}"
                )
        if not self.user_to_candidate and self.compensation not in (None, "none"):
            raise ValueError(
                f"compensation={self.compensation!r} carries users to candidates, which user_to_candidate=False cuts"
            )

    def compensation_of(self, user_tokens: int, candidate_tokens: int) -> str:
        """The kind as configured, else "per_token" when more than half of the tokens are the user's."""
        if self.compensation is not None:
            return self.compensation
        return "per_token" if self.user_to_candidate and user_tokens > candidate_tokens else "none"


class SideNorm(nnx.Module):
    """A norm of both sides: gains shared by all tokens belong to one module, gains per token to one for each side."""

    def __init__(
        self,
        user_tokens: int,
        candidate_tokens: int,
        width: int,
        options: NormOptions = NormOptions(),  # noqa: B008
        *,
        dtype: DTypeLike = jnp.float32,
    ):
        own = options.norm_per_token
        self.user = make_norm(options, width, tokens=user_tokens, dtype=dtype)
        self.own = make_norm(options, width, tokens=candidate_tokens, dtype=dtype) if own else None

    def of_user(self, x: Float[Array, "T_u R D"]) -> Float[Array, "T_u R D"]:
        return normalise(self.user, x)

    def of_candidates(self, x: Float[Array, "T_c B D"]) -> Float[Array, "T_c B D"]:
        return normalise(self.own or self.user, x)


class Compensation(nnx.Module):
    """What candidate tokens get of masked user rows M [T_u, R, W], once per request.

        "mean"       (mean_u M_u) W_ic                    [1, R, D]        W*D parameters
        "per_token"  sum_u A[g, u] M_u W_ic               [T_c, R, D]      W*D + T_c*T_u parameters

    W_ic starts at 0 and A at 1/T_u, so a fresh model equals the uncompensated one and W_ic has a gradient.
    """

    def __init__(
        self,
        kind: str,
        user_rows: int,
        candidate_tokens: int,
        inputs: int,
        width: int,
        *,
        dtype: DTypeLike = jnp.float32,
    ):
        self.dtype = dtype
        self.kernel = param.matrix(jnp.zeros((inputs, width)), ("hidden", "embed"))
        shape, axes = (candidate_tokens, user_rows), ("tokens", "tokens_in")
        self.shares = param.constant(shape, axes, 1 / user_rows) if kind == "per_token" else None

    def __call__(self, mixed: Float[Array, "T_u R W"]) -> Float[Array, "G R D"]:
        if self.shares is None:
            mean = mean_tokens(mixed).astype(self.dtype)
            return contract("rw,wd->rd", mean, self.kernel[...], self.dtype)[None]
        projected = contract("urw,wd->urd", mixed, self.kernel[...], self.dtype)
        return contract("gu,urd->grd", self.shares[...], projected, self.dtype)


class MaskedShortcut(nnx.Module):
    """softmax(Q K^T / sqrt(D)) V, what a block adds to its branch instead of its input: one head, no bias.

    Queries come from the branch's tokens, keys and values from the block's input; who may read what is decided by the
    keys that are passed. 3*D^2 parameters; 2*D^2 FLOPs per query token, 4*D^2 per input token, 4*D per pair.
    """

    def __init__(self, width: int, *, init: str = "lecun_normal", dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        def dense() -> Dense:
            return Dense(width, width, use_bias=False, init=init, axes=("embed", "heads"), dtype=dtype, rngs=rngs)

        self.scale, self.dtype = width**-0.5, dtype
        self.query, self.key, self.value = dense(), dense(), dense()

    def memory(self, x: Float[Array, "T B D"]) -> tuple[Float[Array, "T B D"], Float[Array, "T B D"]]:
        """Keys and values [T, B, D] of the block's input."""
        return self.key(x), self.value(x)

    def __call__(
        self, branch: Float[Array, "Q B D"], keys: Float[Array, "T B D"], values: Float[Array, "T B D"]
    ) -> Float[Array, "Q B D"]:
        """[Q, B, D], for branch [Q, B, D] and the keys and values it may read."""
        q, k, v = (x[:, :, None] for x in (self.query(branch), keys, values))
        return attend_tokens(q, k, v, self.scale, self.dtype)


def make_compensation(
    options: SeparationOptions,
    user_tokens: int,
    candidate_tokens: int,
    user_rows: int,
    candidate_rows: int,
    inputs: int,
    width: int,
    *,
    dtype: DTypeLike,
) -> Compensation | None:
    """What `options` say for T_u and T_c tokens: from user rows [user_rows, R, inputs] to candidate rows of `width`."""
    kind = options.compensation_of(user_tokens, candidate_tokens)
    return None if kind == "none" else Compensation(kind, user_rows, candidate_rows, inputs, width, dtype=dtype)


def compensation_params(kind: str, user_rows: int, candidate_tokens: int, inputs: int, width: int) -> int:
    """Parameters of one `Compensation`; 0 for "none"."""
    shares = candidate_tokens * user_rows if kind == "per_token" else 0
    return 0 if kind == "none" else inputs * width + shares


def compensation_flops(kind: str, user_rows: int, candidate_tokens: int, inputs: int, width: int) -> int:
    """FLOPs of one `Compensation` per request; 0 for "none"."""
    each = 2 * inputs * width
    return {"none": 0, "mean": each}.get(kind, user_rows * each + 2 * candidate_tokens * user_rows * width)


def compensation_state(kind: str, candidate_tokens: int, width: int) -> int:
    """Elements per request that candidates get of one `Compensation`; 0 for "none"."""
    return {"none": 0, "mean": width}.get(kind, candidate_tokens * width)


def require_user_tokens(plan: TokenPlan) -> None:
    """Raises ValueError for inputs without a user token."""
    if plan.user_tokens < 1:
        raise ValueError(
            f"none of the {plan.tokens} tokens is a user token, so there is nothing to separate; give the schema user "
            f"fields or use the backbone without UG-Sep"
        )


def global_token_state(plan: TokenPlan, width: int) -> int:
    """Elements per request that a global token's first product keeps of the user's fields."""
    return (plan.hidden or width) if plan.everything and plan.everything[0].widths[0] else 0


class UGState(NamedTuple):
    """What a separated model keeps of a request, so that its candidates can be scored later.

    blocks: what candidates read of each block; pooled: sum over user tokens [R, D]; everything: the global token's user
    part; auxiliary: sums over user tokens at every auxiliary head. Every array has the requests first, so a flat batch
    reads `jax.tree.map(lambda x: jnp.take(x, request_id, 0), state)`.
    """

    blocks: tuple[Any, ...]
    pooled: Array
    everything: Array | None
    auxiliary: tuple[Array, ...] = ()


class SeparatedBackbone(Backbone):
    """Tokenizer, separated blocks with inter-layer residuals, norm, mean over all tokens, towers, auxiliary heads.

    A subclass makes the modules, in the order in which their parameters are drawn; each block has
    `encode_user([T_u, R, D]) -> (the next, what candidates read)` and `score([T_c, B, D], what they read, C)`.
    """

    tokenizer: Tokenizer
    blocks: nnx.List[Any]
    towers: Towers
    auxiliary: AuxiliaryHeads | None = None
    inter_residual_every: int = 0

    def last_norm(self) -> SideNorm | None:
        """The norm before the mean."""
        raise NotImplementedError

    def encode_user(self, user: UserInputs, tokens: Float[Array, "R t A"] | None = None) -> UGState:
        state, kept = self.tokenizer.encode_user(user, tokens), []
        x = _given(state.tokens)
        stream = [x]
        for block in self.blocks:
            x, part = block.encode_user(x)
            kept.append(part)
            x = self._next(x, stream)
        low = [] if self.auxiliary is None else self.auxiliary.each(lambda head, x: sum_tokens(head.norm(x)), stream)
        norm = self.last_norm()
        pooled = sum_tokens(x if norm is None else norm.of_user(x))
        return UGState(tuple(kept), pooled, state.everything, tuple(low))

    def score(
        self,
        state: UGState,
        candidates: CandidateInputs,
        tokens: Float[Array, "R C t A"] | None = None,
        *,
        key: Array | None = None,
    ) -> Output:
        own = self.tokenizer.candidate_tokens(UserTokens(None, state.everything), candidates, tokens)
        count, requests, each, width = own.shape
        x = own.reshape(count, requests * each, width)
        stream = [x]
        for block, kept in zip(self.blocks, state.blocks, strict=True):
            x = self._next(block.score(x, kept, each), stream)
        norm, shape = self.last_norm(), (requests, each, -1)
        logits = self._pooled(self.towers, x if norm is None else norm.of_candidates(x), state.pooled, each)
        if self.auxiliary is None:
            return Output(logits=logits.reshape(shape))
        low: list[Array] = []
        if key is not None:
            normed = self.auxiliary.each(lambda head, x: head.norm(x), stream)
            parts = zip(self.auxiliary.heads, normed, state.auxiliary, strict=True)
            low = [self._pooled(head.towers, x, user, each) for head, x, user in parts]
        loss_logits = self.auxiliary.loss_logits(logits, low, shape)
        return Output(logits=logits.reshape(shape), loss_logits=loss_logits)

    def _next(self, x: Array, stream: list[Array]) -> Array:
        """x after a block with what an earlier one adds to it; appended to the stream."""
        stream.append(inter_residual(x, stream, every=self.inter_residual_every, layers=len(self.blocks)))
        return stream[-1]

    def _pooled(self, towers: Towers, x: Array, user: Array, count: int) -> Array:
        """Logits [B, Y] of the mean over all tokens: candidates' x [T_c, B, D] and the user's sum [R, D]."""
        total = sum_tokens(x) + repeat_user(user, count)
        return towers(total / self.tokenizer.plan.tokens)


def to_rows(x: Float[Array, "R T W"], candidates: int) -> Float[Array, "T B W"]:
    """[R, T, W] per request -> token-major rows [T, R*C, W]: every candidate sees its request's."""
    requests, tokens, width = x.shape
    rows = jnp.broadcast_to(x.swapaxes(0, 1)[:, :, None], (tokens, requests, candidates, width))
    return rows.reshape(tokens, requests * candidates, width)


def requests_first(x: Float[Array, "T R W"] | None) -> Float[Array, "R T W"] | None:
    """Token-major [T, R, W] -> [R, T, W], how states are kept; None stays None."""
    return None if x is None else x.swapaxes(0, 1)


def _given(x: Array | None) -> Array:
    """User tokens, which a plan with any of them always makes."""
    assert x is not None
    return x
