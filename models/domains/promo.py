"""PROMO (arXiv 2412.18082), a reconstruction: prompts of cold items, made of the users who liked them best.

A trained two-tower recommender is frozen, score_0 = <u, e>; a batch brings its vectors. Item i has two lists of earlier
users, the K whose feedback was best and the K whose was worst, as the vectors z_0 [K, d] the frozen base made of them:

    z_l = act( z_{l-1} (I + W_l) + b_l ),  l = 1 ... L        prompt p_i = mean over K of z_L, of the best users
    score = <u, e> + [i is cold] <A u, p_i>                   = <concat(u, A u), concat(e, p_i)>,  A = 0 at the start

    PFPE    softplus(-delta),  delta = |h - n|_1 - |h - p|_1,  h = e H,  n the prompt of the worst users
    PAPE    softplus(-(s(u, i) - s(u, j)))       i cold and clicked, j popular and not clicked, of one request
    loss    BCE + lambda1 mean PFPE + lambda2 mean PAPE

Published: the frozen base, lists by feedback, neighbours' lists for items with little of it, a network per item (only
item i changes it), the prompt joined to the base's vector, inner product, softplus of a gap of L1 distances. Not
published, and so this build's choice -> flag (default): the network's form -> layers (1), activation, the identity
beside W_l; the arguments of both auxiliary losses; lambda1, lambda2 (.1 each); A.

generator: where W_l, b_l come from. "table": a row per item of a table of the schema, layers*(d*d + d) numbers, so a
step changes rows of its own items alone; "hypernet": a linear map of e; "shared": one network for all (the paper's -M).

Batches of a log have no such fields, so the model has no name of its own in the registry: it is built by its address,
recscale.models.domains.promo:PROMO, for the inputs of `promo_schema`; `recscale.scaling.data.feedback_lists` makes the
lists. A list that is short is filled with zeros, which no user's vector is: its last number is 1.

Letters: R requests, C candidates, K users in a list, d width of the base's vectors, L layers.
Closed forms: parameters d*d; "hypernet" adds (d + 1)*L*(d*d + d), "shared" L*(d*d + d); training has another d*d of H.
FLOPs 2*d*d per request, L*2*K*d*d + 4*d per candidate, and once more L*2*K*d*d + 2*d*d in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import RankerSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, Pairs, UserInputs
from recscale.models.inputs.schema import Field, Schema
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import Activation, activation
from recscale.models.options import Options, require_sizes
from recscale.models.ranker import Ranker

from .two_tower import require_one_label

# Fields of the inputs: u; e; the lists [K * d]; 1 where the item is cold; the row of the item's network.
USER, ITEM, BEST, WORST, COLD, NETWORK = (f"promo_{x}" for x in ("user", "item", "best", "worst", "cold", "network"))


@dataclasses.dataclass(frozen=True)
class PromoConfig(Options):
    """users K in a list; layers L; generator: see the file; lambda1, lambda2: weights of PFPE and PAPE."""

    users: int = 5
    layers: int = 1
    generator: Literal["table", "hypernet", "shared"] = "table"
    activation: Activation = "relu"
    lambda1: float = 0.1
    lambda2: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(users=self.users, layers=self.layers)
        if min(self.lambda1, self.lambda2) < 0:
            raise ValueError(f"lambda1 and lambda2 are {self.lambda1} and {self.lambda2}, expected 0 or more")

    def network_width(self, width: int) -> int:
        """Numbers of one item's network."""
        return self.layers * (width * width + width)


class PromoState(NamedTuple):
    """Per request, [R, d] each: u, and A u."""

    user: Array
    moved: Array


class Promo(Ranker):
    """The prompts beside a frozen base of width d, whose vectors are inputs: no gradient can reach it."""

    def __init__(self, width: int, options: PromoConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.width, self.options, self.dtype = width, options, dtype
        size = options.network_width(width)
        self.fusion = param.matrix(jnp.zeros((width, width)), ("embed", "hidden"))
        self.network = param.constant((size,), ("hidden",)) if options.generator == "shared" else None
        hypernet = options.generator == "hypernet"
        self.hypernet = Dense(width, size, std_scale=0.1, dtype=dtype, rngs=rngs) if hypernet else None
        anchor = None
        if options.lambda1:
            anchor = Dense(width, width, use_bias=False, dtype=dtype, rngs=rngs)
            param.training_only(anchor)
        self.anchor = anchor

    def encode_user(self, user: UserInputs) -> PromoState:
        u = user.fields[USER].astype(self.dtype)
        return PromoState(u, contract("rd,de->re", u, self.fusion[...], self.dtype))

    def score(self, state: PromoState, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        item, cold = candidates.fields[ITEM].astype(self.dtype), candidates.fields[COLD][..., 0] > 0
        prompt = self.prompt(candidates, BEST)
        base = contract("rd,rcd->rc", state.user, item, self.dtype)
        logits = base + jnp.where(cold, contract("rd,rcd->rc", state.moved, prompt, self.dtype), 0.0)
        output = Output(logits=logits.astype(jnp.float32)[..., None])
        if key is None:
            return output
        losses = {}
        if self.anchor is not None:
            real = cold if candidates.valid is None else cold & candidates.valid
            each = jax.nn.softplus(-self.gap(candidates, prompt))
            mean = jnp.where(real, each, 0.0).sum() / jnp.maximum(real.sum(), 1)
            losses["pfpe"] = self.options.lambda1 * mean
        pairs = Pairs(above=cold, below=~cold, weight=self.options.lambda2) if self.options.lambda2 else None
        return dataclasses.replace(output, losses=losses, pairs=pairs)

    def prompt(self, candidates: CandidateInputs, which: str) -> Float[Array, "R C d"]:
        """What the items' networks make of one of their lists; zeros of an empty one."""
        d, act = self.width, activation(self.options.activation)
        lists = candidates.fields[which]
        z = lists.reshape(*lists.shape[:2], self.options.users, d).astype(self.dtype)
        listed = (z != 0).any(axis=-1, keepdims=True)
        for kernel, bias in self._layers(candidates):
            if kernel.ndim == 2:
                z = z + contract("rckd,de->rcke", z, kernel, self.dtype) + bias[None, None, None]
            else:
                z = z + contract("rckd,rcde->rcke", z, kernel, self.dtype) + bias[..., None, :]
            z = act(z)
        return jnp.where(listed, z, 0.0).sum(axis=2) / jnp.maximum(listed.sum(axis=2), 1).astype(self.dtype)

    def gap(self, candidates: CandidateInputs, prompt: Float[Array, "R C d"]) -> Float[Array, "R C"]:
        """delta: how much nearer h is to the prompt of the best users than to that of the worst."""
        if self.anchor is None:
            raise ValueError("lambda1 is 0, so nothing is held against the worst users; set lambda1")
        h = self.anchor(candidates.fields[ITEM].astype(self.dtype)).astype(jnp.float32)
        best, worst = (x.astype(jnp.float32) for x in (prompt, self.prompt(candidates, WORST)))
        return jnp.abs(h - worst).sum(axis=-1) - jnp.abs(h - best).sum(axis=-1)

    def _layers(self, candidates: CandidateInputs) -> Iterator[tuple[Array, Array]]:
        """W_l and b_l: [R, C, d, d] and [R, C, d], or those all items share, [d, d] and [d]."""
        d = self.width
        if self.network is not None:
            flat = self.network[...].astype(self.dtype)
        elif self.hypernet is not None:
            flat = self.hypernet(candidates.fields[ITEM].astype(self.dtype))
        else:
            flat = candidates.fields[NETWORK].astype(self.dtype)
        layers = flat.reshape(*flat.shape[:-1], self.options.layers, d + 1, d)
        for i in range(self.options.layers):
            yield layers[..., i, :d, :], layers[..., i, d, :]


def promo_schema(width: int, items: int, config: PromoConfig) -> Schema:
    """What a batch for PROMO holds: vectors of width d of a frozen base, and rows of networks where items have them."""
    lists = config.users * width
    fields = [
        Field(USER, "user", width, group="base"),
        Field(ITEM, "candidate", width, group="base"),
        Field(BEST, "candidate", lists, group="lists"),
        Field(WORST, "candidate", lists, group="lists"),
        Field(COLD, "candidate", 1, group="lists"),
    ]
    if config.generator == "table":
        fields.append(Field(NETWORK, "candidate", config.network_width(width), vocabulary=items, group="network"))
    return Schema(tuple(fields))


def build(config: PromoConfig, schema: Schema, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> Promo:
    """The model of a config.

    Raises:
        ValueError: the schema is not one of `promo_schema`.
    """
    return Promo(base_width(config, schema), config, dtype=dtype, rngs=rngs)


def base_width(config: PromoConfig, schema: Schema) -> int:
    """Width d of the base's vectors.

    Raises:
        ValueError: a field is missing or has another width than the config asks for, or there are several labels.
    """
    require_one_label(schema, "PROMO scores")
    widths = {field.name: field.width for field in schema.fields}
    if USER in widths:
        for field in promo_schema(widths[USER], 1, config).fields:
            if widths.get(field.name) != field.width:
                found = f"width {widths[field.name]}" if field.name in widths else "no such field"
                raise ValueError(
                    f"field {field.name!r} should have width {field.width} by `users`, `layers` and `generator`, and "
                    f"the schema has {found}; make it with promo_schema"
                )
        return widths[USER]
    raise ValueError("the schema has no vectors of a frozen base, which PROMO needs; make it with promo_schema")


def count_params(config: PromoConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree; rows of a table are embedding parameters of the schema."""
    d = base_width(config, schema)
    size = config.network_width(d)
    extra = {"table": 0, "hypernet": (d + 1) * size, "shared": size}[config.generator]
    return Params(dense=d * d + extra, training_only=d * d * (config.lambda1 > 0))


def count_flops(config: PromoConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products. The base's vectors are data: no gradient is taken of them."""
    d = base_width(config, schema)
    square, trained = 2 * d * d, config.lambda1 > 0
    one, first = config.layers * config.users * square, config.users * square
    hypernet = 2 * d * config.network_width(d) * (config.generator == "hypernet")
    return Flops(
        user=square,
        user_unneeded=square,
        candidate=one + 4 * d + hypernet,
        candidate_training=trained * (one + square + hypernet),
        candidate_unneeded=first + 4 * d + hypernet + trained * (first + square + hypernet),
    )


def size_space(schema: Schema, config: PromoConfig, target_dense_params: float) -> Iterator[dict[str, Any]]:
    """The config as it is, whatever the target: its sizes are those of the base."""
    base_width(config, schema)
    yield {}


PROMO = RankerSpec(PromoConfig, build, count_params, count_flops, size_space)
