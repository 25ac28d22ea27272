"""RankMixer, dense (arXiv 2507.15551 v3): multi-head token mixing and one feed-forward network per token.

X_0 [B,T,D] comes from the tokenizer; each of the L blocks is post-norm (eq. 1-6):

    S = LN(mix(X) + X)                     mix: head h of token t -> slot t of token h, H = T heads
    X = LN(PFFN(S) + S)                    PFFN_t(s) = gelu(s W1_t + b1_t) W2_t + b2_t,  W1 [T,D,F]  W2 [T,F,D]
    logits = towers(mean_t X_L)

Letters: B rows, T tokens, D token width, F hidden width, L layers, Y tasks. Activations are token-major [T,B,D] inside.
Tokens are ordered user side first; user tokens are made once per request, everything after them is per candidate.

Closed forms (mixer="mix", ffn="per_token"):
    params = tokenizer + L*(T*(2*D*F + F + D) + 4*D) + Y*(D + 1)
    flops  = 2 * tokenizer weights + L*4*T*D*F + 2*D*Y          per row

Undisclosed -> flag (default): FFN ratio -> hidden; projection shared by tokens -> tokenizer_shared (False); norm gains
-> norm_affine (True), norm_per_token (False), norm_eps; GELU form -> activation ("gelu", tanh); head -> tower (());
dropout (0, on the output of the feed-forward network); init. Ablations of the paper: ffn="shared", residual=False,
norm=None, norm_place="pre" (adds a norm before the mean), and mixer:

    none            no mixing sub-layer (neither its skip nor its norm)
    self_attention  QKVO shared by all tokens instead of mix
    all_share       no mixing sub-layer; every PFFN_t reads the concatenation of all tokens, T*D -> F -> D
    all_concat      one MLP T*D -> F -> T*D replaces both sub-layers

Sparse experts (`experts`=E slices of every PFFN_t, flags of `SparseOptions`): see `rankmixer_moe.py`, which also says
how dense training and sparse inference meet. They add L*T*2*E*(D + 1) parameters of two ReLU routers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.architecture import BackboneSpec, token_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import Tokenizer, TokenizerOptions, TokenPlan, UserTokens, plan_tokens
from recscale.models.layers.attention import SelfAttention
from recscale.models.layers.dense import FFN
from recscale.models.layers.dropout import dropout
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.norms import NormOptions, make_norm, normalise, options_params
from recscale.models.layers.param import Init
from recscale.models.layers.per_token import Activation, PerTokenFFN
from recscale.models.layers.per_token_moe import TopKMoE, TopKRouting
from recscale.models.layers.relu_moe import Gating, ReLUMoE, ReLURouting
from recscale.models.layers.residuals import Step, sub_layer
from recscale.models.layers.towers import TowerOptions, Towers, mean_tokens, tower_flops, tower_params
from recscale.models.options import group_of, refuse_unused, require_share, require_sizes
from recscale.models.ranker import Backbone
from recscale.models.sizing import affine_widths, shapes_by_width, tokenizer_choices

from . import rankmixer_moe as moe

NormPlace = Literal["post", "pre"]

# F / D the sizing prefers: the ratio at which the paper's 100M row meets its printed parameters.
HIDDEN_RATIO = 2.8


@dataclasses.dataclass(frozen=True)
class NetworkOptions(NormOptions):
    """Flags that all blocks built on RankMixer's have; activation and init are those of its networks."""

    activation: Activation = "gelu"
    dropout: float = 0.0
    init: Init = "lecun_normal"

    def __post_init__(self):
        super().__post_init__()
        require_share(dropout=self.dropout)

    def block(self, norm_place: NormPlace = "post") -> BlockOptions:
        """These flags for a block that mixes as the paper does."""
        return BlockOptions(
            norm=self.norm,
            norm_affine=self.norm_affine,
            norm_per_token=self.norm_per_token,
            norm_eps=self.norm_eps,
            activation=self.activation,
            dropout=self.dropout,
            init=self.init,
            norm_place=norm_place,
        )


@dataclasses.dataclass(frozen=True)
class BlockOptions(NetworkOptions):
    """Flags of a block. heads: of mixer="self_attention", None for as many as tokens; the rest: see the file."""

    mixer: Literal["mix", "none", "self_attention", "all_share", "all_concat"] = "mix"
    heads: int | None = None
    ffn: Literal["per_token", "shared"] = "per_token"
    residual: bool = True
    norm_place: NormPlace = "post"

    def __post_init__(self):
        super().__post_init__()
        require_sizes(heads=self.heads)
        if self.ffn == "shared" and self.joins_tokens:
            raise ValueError(f"mixer={self.mixer!r} replaces the per-token network, so ffn must be 'per_token'")
        if self.mixer != "self_attention":
            refuse_unused(self, f"mixer={self.mixer!r} has no attention; set mixer='self_attention'", heads=self.heads)

    @property
    def mixes(self) -> bool:
        """Whether a block has its first sub-layer."""
        return self.mixer in ("mix", "self_attention")

    @property
    def joins_tokens(self) -> bool:
        """Whether networks read all tokens side by side."""
        return self.mixer in ("all_share", "all_concat")


@dataclasses.dataclass(frozen=True)
class StackOptions(NetworkOptions, TowerOptions, TokenizerOptions):
    """width D, hidden F, layers L, and the flags of networks, towers and tokenizer."""

    width: int = 128
    hidden: int = 512
    layers: int = 2

    def __post_init__(self):
        super().__post_init__()
        require_sizes(width=self.width, hidden=self.hidden, layers=self.layers)


@dataclasses.dataclass(frozen=True)
class RankMixerConfig(moe.SparseOptions, BlockOptions, StackOptions):
    """All flags; see the file and the groups."""

    def __post_init__(self):
        super().__post_init__()
        self.check_experts(self.hidden, per_token=self.ffn == "per_token" and not self.joins_tokens)


class RankMixerBlock(nnx.Module):
    """One block on token-major activations: x [T, B, D] -> [T, B, D].

    Args:
        tokens, width, hidden: T, D, F. mixer="mix" needs D divisible by T.
        options: everything else; sparse: experts instead of a dense network per token, or None.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        options: BlockOptions = BlockOptions(),  # noqa: B008
        *,
        sparse: moe.SparseOptions | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        mixer, act, init = options.mixer, options.activation, options.init
        if mixer == "mix" and width % tokens:
            raise ValueError(f"width {width} does not divide into {tokens} heads, one per token; make it a multiple")
        self.options, attends = group_of(options, BlockOptions), mixer == "self_attention"
        heads = options.heads or tokens
        self.attention = SelfAttention(width, heads, init=init, dtype=dtype, rngs=rngs) if attends else None
        inputs = tokens * width if options.joins_tokens else width
        self.ffn: Any
        if sparse is not None and sparse.experts is not None:
            self.ffn = moe.make_experts(sparse, tokens, width, hidden, act, init, dtype=dtype, rngs=rngs)
        elif mixer == "all_concat" or options.ffn == "shared":
            self.ffn = FFN(inputs, hidden, activation=act, init=init, dtype=dtype, rngs=rngs)
        else:
            self.ffn = PerTokenFFN(tokens, inputs, hidden, width, activation=act, init=init, dtype=dtype, rngs=rngs)
        self.mixing_norm = make_norm(options, width, tokens=tokens, dtype=dtype) if options.mixes else None
        self.ffn_norm = make_norm(options, width, tokens=tokens, dtype=dtype)

    def __call__(self, x: Float[Array, "T B D"], *, key: Array | None = None) -> Float[Array, "T B D"]:
        return self.with_routing(x, key=key)[0]

    def with_routing(
        self,
        x: Float[Array, "T B D"],
        *,
        key: Array | None = None,
        gating: Gating | None = None,
        valid: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "T B D"], ReLURouting | TopKRouting | None]:
        """The new x and what a sparse network reports; `gating` says which router a ReLU-routed network uses, `valid`
        which rows are no padding."""
        routing: list[ReLURouting | TopKRouting] = []

        def branch(y: Array) -> Array:
            if isinstance(self.ffn, TopKMoE | ReLUMoE):
                y, found = (
                    self.ffn(y, training=key is not None, valid=valid)
                    if isinstance(self.ffn, TopKMoE)
                    else self.ffn(y, training=key is not None, gating=gating or Gating(), valid=valid)
                )
                routing.append(found)
                return y
            return self._feed_forward(y)

        x = self.around(branch, x, key)
        return x, routing[0] if routing else None

    def around(self, branch: Step, x: Float[Array, "T B D"], key: Array | None) -> Float[Array, "T B D"]:
        """The block with `branch` in the place of its feed-forward network; a key switches dropout on."""
        if self.options.mixes:
            x = self._sub_layer(self._mix, self.mixing_norm, x)
        return self._sub_layer(lambda y: dropout(branch(y), self.options.dropout, key), self.ffn_norm, x)

    def _sub_layer(self, branch: Step, norm: Step | None, x: Array) -> Array:
        return sub_layer(branch, norm, x, place=self.options.norm_place, residual=self.options.residual)

    def _mix(self, x: Array) -> Array:
        return mix_token_major(x, x.shape[0]) if self.attention is None else self.attention(x)

    def _feed_forward(self, x: Array) -> Array:
        if not self.options.joins_tokens:
            return self.ffn(x)
        tokens, rows, width = x.shape
        y = self.ffn(x.swapaxes(0, 1).reshape(rows, tokens * width))
        return y if self.options.mixer == "all_share" else y.reshape(rows, tokens, width).swapaxes(0, 1)


class TokenStack(Backbone):
    """What models of RankMixer's blocks share: tokenizer, blocks, mean over tokens, towers.

    Args:
        plan: the resolved tokenizer (`plan_tokens`); T is `plan.tokens`. width, tasks: D, Y.
        make_blocks: called after the tokenizer was made, so that parameters are drawn in reading order.
        options: of the blocks; norm_place="pre" adds a norm before the mean, since such blocks never normalise their
            last sum. tower: widths of the towers.
    """

    def __init__(
        self,
        plan: TokenPlan,
        width: int,
        tasks: int,
        make_blocks: Callable[[], Iterable[Any]],
        options: BlockOptions = BlockOptions(),  # noqa: B008
        *,
        tower: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        pre, T = options.norm_place == "pre", plan.tokens
        self.tokenizer = Tokenizer(plan, width, init=options.init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(make_blocks())
        self.final_norm = make_norm(options, width, tokens=T, dtype=dtype) if pre else None
        self.towers = Towers(width, tasks, tower=tower, init=options.init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs, tokens: Float[Array, "R t A"] | None = None) -> UserTokens:
        return self.tokenizer.encode_user(user, tokens)

    def join(
        self, state: UserTokens, candidates: CandidateInputs, tokens: Array | None
    ) -> tuple[Float[Array, "T B D"], tuple[int, int, int]]:
        """The tokens of every candidate row, and the shape of logits: (R, C, -1)."""
        own = self.tokenizer.candidate_tokens(state, candidates, tokens)
        return self.tokenizer.join(state, own), (own.shape[1], own.shape[2], -1)

    def read_out(self, x: Float[Array, "T B D"]) -> Float[Array, "B Y"]:
        """Logits of the last block's tokens."""
        return self.towers(mean_tokens(normalise(self.final_norm, x)))


class RankMixer(TokenStack):
    """Tokenizer, L blocks, mean over tokens, towers.

    Args:
        plan: the resolved tokenizer (`plan_tokens`). tasks: Y.
    """

    def __init__(
        self, plan: TokenPlan, tasks: int, options: RankMixerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        T, D, F = plan.tokens, options.width, options.hidden

        def blocks() -> Iterator[RankMixerBlock]:
            for _ in range(options.layers):
                yield RankMixerBlock(T, D, F, options, sparse=options, dtype=dtype, rngs=rngs)

        super().__init__(plan, D, tasks, blocks, options, tower=options.tower, dtype=dtype, rngs=rngs)
        self.experts = moe.ExpertControl(options, options.layers, T) if options.experts else None

    def score(
        self,
        state: UserTokens,
        candidates: CandidateInputs,
        tokens: Float[Array, "R C t A"] | None = None,
        *,
        key: Array | None = None,
    ) -> Output:
        x, shape = self.join(state, candidates, tokens)
        if self.experts is None:
            return Output(logits=self._pass(x, key)[0].reshape(shape))
        training, valid = key is not None, candidates.valid_rows
        passes = self.experts.passes(shape[0], shape[1], training=training)
        found = [self._pass(x, key, gating, valid) for gating in passes]
        logits = [z.reshape(shape) for z, _ in found]
        return self.experts.output(logits, [routing for _, routing in found], training=training)

    def _pass(
        self, x: Array, key: Array | None, gating: Gating | None = None, valid: Array | None = None
    ) -> tuple[Array, list[Any]]:
        """Logits [B, Y] of tokens [T, B, D], and what the experts of every block report."""
        found = []
        for i, block in enumerate(self.blocks):
            own_key = None if key is None else jax.random.fold_in(key, i)
            x, routing = block.with_routing(x, key=own_key, gating=gating, valid=valid)
            found.append(routing)
        return self.read_out(x), found


def stack_params(config: StackOptions, plan: TokenPlan, tasks: int, norms: int) -> Params:
    """Parameters of a `TokenStack` beside the networks of its blocks: tokenizer, towers and so many norms."""
    tokenizer, head = plan.params(config.width), tower_params(config.width, tasks, config.tower)
    gains = norms * options_params(config, config.width, plan.tokens)
    return Params(dense=tokenizer + gains + head, tokenizer=tokenizer, head=head)


def count_params(config: RankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F = plan.tokens, config.width, config.hidden
    ffn = {
        "all_share": T * (T * D * F + F + F * D + D),
        "all_concat": 2 * T * D * F + F + T * D,
    }.get(config.mixer, (T if config.ffn == "per_token" else 1) * (2 * D * F + F + D))
    attention = 4 * D * D if config.mixer == "self_attention" else 0
    norms = config.layers * (1 + config.mixes) + (config.norm_place == "pre")
    routers, inactive = moe.count_params(config, T, D, F)
    rest = Params(dense=config.layers * (ffn + attention + routers), inactive=config.layers * inactive)
    return stack_params(config, plan, len(schema.tasks), norms) + rest


def count_flops(config: RankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate.

    With experts the forward pass is the served one (the budgeted share of experts, unless expert_path is "masked").
    """
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F = plan.tokens, config.width, config.hidden
    ffn = T * (2 * T * D * F + 2 * F * D) if config.mixer == "all_share" else 4 * T * D * F
    attention = 8 * T * D * D + 4 * T * T * D if config.mixer == "self_attention" else 0
    head = tower_flops(D, len(schema.tasks), config.tower)
    served, training = moe.count_flops(config, T, D, F, ffn)
    passes = moe.training_passes(config)
    rest = config.layers * (served + attention) + head
    more = passes * (config.layers * (training + attention) + head) - rest
    return plan.flops(D) + Flops(candidate=rest, candidate_training=more)


def size_space(
    schema: Schema, config: RankMixerConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target; layers and a given number of tokens stay as configured.

    For each T and D the hidden width that meets the target is solved for. First come shapes with F/D near 2.8, the
    number of tokens that suits the size, and hidden widths that are multiples of 64 (8 below 1e7 parameters).
    """

    def hiddens(T: int | None, D: int) -> Iterable[tuple[int, int]]:
        def params(hidden: int) -> int:
            shape = dataclasses.replace(config, tokens=T, width=D, hidden=hidden)
            return count_params(shape, schema, tokens).dense

        return enumerate(affine_widths(params, target_dense_params, config.experts or 1))

    choices = tokenizer_choices(schema, config, target_dense_params, tokens)
    yield from shapes_by_width(choices, target_dense_params, config.layers, HIDDEN_RATIO, hiddens)


RANKMIXER = BackboneSpec(RankMixerConfig, token_builder(RankMixer), count_params, count_flops, size_space)
