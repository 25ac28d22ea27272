"""ADS (arXiv 2502.05523): target attention whose event projection and queries are generated for each sample.

With the domain vector E [R,d_D], events e [R,S,A] and the candidate x [R,C,A_q]:

    PSRG   W = eta * W_shared * sigmoid(relu(E W_1 + b_1) W_2 + b_2),  b = relu(E W_3 + b_3) W_4 + b_4
           e'_s = e_s W + b                                            W [A,A] and b [A] of every sample
    PCRG   p = relu([E;x] W_5 + b_5) W_6 + b_6,  cut into W chunks     x'_s = x + p[s // chunk], one query per event
    token  "mha"  per head, z_s = x'_s W_Q . e'_s W_K / sqrt(d), softmax over the valid s, sum_s z_s e'_s W_V
           "din"  a_s = MLP([e'_s, x'_s, e'_s - x'_s, e'_s * x'_s]),  sum_s a_s e'_s                  A_q = A
           "can"  x'_s holds the weights of a small MLP, applied to e'_s; its layers' outputs joined and summed over s

Scores lie on the diagonal: S of them, not S x S. One candidate token [R, C, 1, .]; alone the encoder stands in front of
an MLP of token, user and candidate fields, as in the paper. Column 0 is the newest event, so padding moves no chunk.

Letters: R requests, C candidates, S events, A their width (time feature included), A_q query width, F hidden width of
the generators, W = ceil(S_max/chunk) queries, D_A width of the attention, d_D width of the domain vector.

Closed forms (scorer="mha", both generators, the domain's embedding excluded; W' = ceil(S/chunk)):
    params        = (d_D*F + F + F*A^2 + A^2) + A^2 + (d_D*F + F + F*A + A) + ((d_D+A_q)*F + F + F*W*A_q + W*A_q)
                    + (A_q + 2*A)*D_A
    per request   = 4*d_D*F + 2*F*A^2 + 2*F*A + 2*S*A^2 + 4*S*A*D_A
    per candidate = 2*(d_D+A_q)*F + 2*F*W*A_q + 2*W'*A_q*D_A + 4*S*D_A
domain_side="candidate" moves the request's part to the candidate: the domain vector then comes from candidate fields.

The domain vector joins an embedding of the domain (schemas with domains) and `domain_fields`. Generators compute in
float32.

Undisclosed -> flag (default): eta (2, so the factor starts at 1); widths -> width D_A (64), head_dim (32 or the largest
divisor below), gen_hidden F (32), domain_width (8), hidden of "din" ((80, 40)), micro of "can" ((8, 4), tanh);
init_generators ("plain": W_shared = I and zero last layers, so that the model starts as its plain scorer; "glorot").
For "can" the paper's wiring is not known; this is a reconstruction. Ablations: psrg, pcrg, chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.architecture import EncoderSpec
from recscale.models.baselines.din import ActivationUnit, unit_params
from recscale.models.baselines.encoding import ReadingPlan, builder, plan_reading
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Schema, UserInputs, join_fields
from recscale.models.inputs.history import (
    EventReader,
    HistoryOptions,
    TokenShape,
    longest_history,
)
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import Activation
from recscale.models.options import require_positive, require_sizes
from recscale.models.ranker import EncodedHistory, SequenceEncoder
from recscale.models.sizing import sized_by

from .ads_scorers import CANScorer, MHAScorer, can_params


@dataclasses.dataclass(frozen=True)
class ADSConfig(HistoryOptions):
    """width D_A; candidate: x is the candidate fields themselves ("fields") or projected to the width the scorer wants
    ("project"; "auto" is "fields" for "mha"). domain_fields: names of the fields in the domain vector; None is all
    fields of `domain_side` if the schema has no domains, else none. max_length: S_max, None for the history's length.
    """

    scorer: Literal["mha", "din", "can"] = "mha"
    width: int = 64
    head_dim: int | None = None
    psrg: bool = True
    pcrg: bool = True
    chunk: int = 1
    max_length: int | None = None
    eta: float = 2.0
    gen_hidden: int = 32
    candidate: Literal["auto", "fields", "project"] = "auto"
    domain_side: Literal["request", "candidate"] = "request"
    domain_fields: tuple[str, ...] | None = None
    domain_width: int = 8
    hidden: tuple[int, ...] = (80, 40)
    micro: tuple[int, ...] = (8, 4)
    activation: Activation = "relu"
    init_generators: Literal["plain", "glorot"] = "plain"
    init: param.Init = "lecun_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(width=self.width, chunk=self.chunk, gen_hidden=self.gen_hidden, domain_width=self.domain_width)
        require_sizes(head_dim=self.head_dim, hidden=self.hidden, micro=self.micro)
        require_positive(eta=self.eta)
        if self.chunk > 1 and not self.pcrg:
            raise ValueError("chunk has no effect without generated queries; set pcrg=True or leave it 1")
        if len(self.hidden) != 2 or not self.micro:
            raise ValueError(f"hidden is {self.hidden} and micro {self.micro}, expected two widths and at least one")
        if self.head_dim is not None and self.width % self.head_dim:
            raise ValueError(f"width {self.width} is no multiple of head_dim {self.head_dim}; change one of them")

    @property
    def plain(self) -> bool:
        """Whether a fresh model equals its plain scorer."""
        return self.init_generators == "plain"

    @property
    def generators(self) -> param.Init:
        """Initialiser of the generators."""
        return self.init if self.plain else "xavier_uniform"

    @property
    def heads(self) -> int:
        return self.width // (self.head_dim or max(d for d in range(1, 33) if self.width % d == 0))


@dataclasses.dataclass(frozen=True)
class ADSPlan(ReadingPlan):
    """What a config becomes on one schema.

    domains: G of the domain embedding, 0 without. domain_fields: of the side that owns the domain. project: whether the
    candidate fields are projected to the query width A_q. chunks: W. trained_domain: whether a gradient flows into the
    domain vector.
    """

    domains: int
    domain_fields: tuple[str, ...]
    domain_width: int
    query_width: int
    project: bool
    chunks: int
    trained_domain: bool


class Generator(nnx.Module):
    """relu(E W_1 + b_1) W_2 + b_2 in float32; W_2 starts at 0 where the model starts as its plain scorer."""

    def __init__(self, width: int, out: int, options: ADSConfig, *, rngs: nnx.Rngs):
        init = options.generators
        self.hidden = Dense(width, options.gen_hidden, init=init, rngs=rngs)
        self.out = Dense(options.gen_hidden, out, init=init, axes=("hidden", "embed"), rngs=rngs)
        if options.plain:
            self.out.kernel[...] = jnp.zeros_like(self.out.kernel[...])

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows out"]:
        return self.out(jax.nn.relu(self.hidden(x.astype(jnp.float32))))


class EventProjection(nnx.Module):
    """PSRG: e' = e W + b with W and b generated from the domain vector, [R, ...] or [R, C, ...]."""

    def __init__(self, domain: int, width: int, options: ADSConfig, *, rngs: nnx.Rngs):
        self.eta, self.width = options.eta, width
        self.shared = param.kernel(rngs, (width, width), ("embed", "embed_out"), options.generators)
        if options.plain:
            self.shared[...] = jnp.eye(width)
        self.private = Generator(domain, width * width, options, rngs=rngs)
        self.bias = Generator(domain, width, options, rngs=rngs)

    def __call__(
        self,
        events: Float[Array, "R S A"],
        valid: Bool[Array, "R S"],
        domain: Float[Array, "*lead d"],
        dtype: DTypeLike,
    ) -> Float[Array, "*lead S A"]:
        """events [R,S,A]; domain [R,d_D] or [R,C,d_D] -> [R,S,A] or [R,C,S,A], 0 on padding."""
        private = jax.nn.sigmoid(self.private(domain)).reshape(*domain.shape[:-1], self.width, self.width)
        shared = self.shared[...].reshape((1,) * (domain.ndim - 1) + self.shared.shape)
        weights, lead = self.eta * shared * private, "rc"[: domain.ndim - 1]
        made = contract(f"rsa,{lead}ae->{lead}se", events, weights, dtype)
        made = made + self.bias(domain).astype(dtype)[..., None, :]
        return jnp.where(valid[..., None] if made.ndim == 3 else valid[:, None, :, None], made, 0)


def make_scorer(
    event_width: int, query_width: int, options: ADSConfig, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> MHAScorer | CANScorer | ActivationUnit:
    """The scorer of a config."""
    if options.scorer == "can":
        return CANScorer(event_width, options.micro, dtype=dtype)
    if options.scorer == "mha":
        width, heads = options.width, options.heads
        return MHAScorer(event_width, query_width, width, heads, init=options.init, dtype=dtype, rngs=rngs)
    hidden, act = options.hidden, options.activation
    return ActivationUnit(event_width, hidden, activation=act, init=options.init, dtype=dtype, rngs=rngs)


class _State(NamedTuple):
    """events: what the scorer needs of e' (e' itself, or k and v), without their products if they wait for the
    candidate; valid bool [R,S]; domain [R,d_D] or None."""

    events: tuple[Array, ...]
    valid: Array
    domain: Array | None


class ADS(SequenceEncoder):
    """The history of `plan`, read with generated projections and queries: one candidate token.

    Args:
        plan: from `plan_ads`.
    """

    def __init__(self, plan: ADSPlan, options: ADSConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        A, A_q, d_D, init = plan.events.width, plan.query_width, plan.domain_width, options.init
        self.plan, self.chunk, self.dtype = plan, options.chunk, dtype
        self.scorer = make_scorer(A, A_q, options, dtype=dtype, rngs=rngs)
        self.per_candidate = options.domain_side == "candidate"
        table, std = (plan.domains, options.domain_width), options.domain_width**-0.5
        self.domain = param.normal(rngs, table, ("domains", "embed"), std) if plan.domains else None
        self.reader = EventReader(plan.events, rngs=rngs)
        dense = functools.partial(Dense, axes=("features", "embed"), init=init, dtype=dtype, rngs=rngs)
        self.project = dense(plan.candidate.candidate_width, A_q) if plan.project else None
        self.events = EventProjection(d_D, A, options, rngs=rngs) if options.psrg else None
        self.queries = Generator(d_D + A_q, plan.chunks * A_q, options, rngs=rngs) if options.pcrg else None

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        """The domain vector, and the projected events unless their domain is the candidate's."""
        view, domain = self.reader(user), self._request_domain(user)
        events = view.events.astype(self.dtype)
        if self.per_candidate and self.events is not None:
            return EncodedHistory(None, _State((events,), view.valid, domain))
        if self.events is not None and domain is not None:
            events = self.events(events, view.valid, domain, self.dtype)
        return EncodedHistory(None, _State(self.scorer.prepare(events), view.valid, domain))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Float[Array, "R C 1 A"]:
        fields = self.plan.candidate.join_candidates(candidates)
        x = fields if self.project is None else self.project(fields)
        prepared, events = cache.events, cache.valid.shape[1]
        domain = None if self.events is None and self.queries is None else self._domain(cache.domain, candidates, x)
        if self.per_candidate and self.events is not None and domain is not None:
            prepared = self.scorer.prepare(self.events(cache.events[0], cache.valid, domain, self.dtype))
        # Without PCRG there is one query, that of a single chunk.
        chunk = self.chunk if self.queries is not None else events
        token = self.scorer.read(self._queries(x, domain, -(-events // chunk)), chunk, prepared, cache.valid)
        return token[:, :, None]

    def _queries(self, x: Array, domain: Array | None, used: int) -> Array:
        """x' [R,C,W',A_q], one per chunk that the history's columns reach."""
        if self.queries is None or domain is None:
            return x[:, :, None].astype(self.dtype)
        made = self.queries(jnp.concatenate([domain, x], axis=-1))
        made = made.reshape(*x.shape[:2], self.plan.chunks, x.shape[-1])[:, :, :used]
        return (x[:, :, None] + made).astype(self.dtype)

    def _request_domain(self, user: UserInputs) -> Array | None:
        """[R,d_D] of a request-side domain; of a candidate-side one the embedding alone, if there is one."""
        parts = []
        if self.domain is not None:
            if user.domain is None:
                raise ValueError(f"the model was built for {self.plan.domains} domains, and the inputs name none")
            parts.append(jnp.take(self.domain[...], user.domain, axis=0))
        if self.plan.domain_fields and not self.per_candidate:
            parts.append(join_fields(user.fields, self.plan.domain_fields))
        return jnp.concatenate(parts, axis=-1) if parts else None

    def _domain(self, request: Array | None, candidates: CandidateInputs, x: Array) -> Array:
        """[R,C,d_D] for candidates x [R,C,.]."""
        parts = []
        if request is not None:
            parts.append(jnp.broadcast_to(request[:, None], (*x.shape[:2], request.shape[1])))
        if self.plan.domain_fields and self.per_candidate:
            parts.append(join_fields(candidates.fields, self.plan.domain_fields))
        return jnp.concatenate(parts, axis=-1)


def plan_ads(config: ADSConfig, schema: Schema) -> ADSPlan:
    """Resolves the flags for one schema.

    Raises:
        ValueError: no history, nothing to make a domain vector from, an unknown domain field, a history longer than
            `max_length`, or candidate fields of another width than the scorer needs.
    """
    both = plan_reading(config, schema)
    events, width = both.events, both.candidate.candidate_width
    wanted = {"mha": width, "din": events.width, "can": can_params(events.width, config.micro)}[config.scorer]
    project = config.candidate == "project" or (config.candidate == "auto" and config.scorer != "mha")
    if not project and width != wanted:
        raise ValueError(
            f"scorer={config.scorer!r} needs a query of width {wanted}, the candidate fields have {width}; "
            f"use candidate='project'"
        )
    query_width = (events.width if config.scorer == "mha" else wanted) if project else width
    owners = schema.user_fields if config.domain_side == "request" else schema.candidate_fields
    named = config.domain_fields
    if named is None:
        named = () if schema.domains > 1 and config.domain_side == "request" else tuple(f.name for f in owners)
    unknown = [name for name in named if name not in {field.name for field in owners}]
    if unknown:
        raise ValueError(f"domain_fields names {', '.join(unknown)}, which are no {config.domain_side}-side fields")
    domains = schema.domains if schema.domains > 1 else 0
    chosen = [field for field in owners if field.name in named]
    domain_width = sum(field.width for field in chosen) + config.domain_width * bool(domains)
    if not domain_width and (config.psrg or config.pcrg):
        raise ValueError("the domain vector is empty: the schema has neither domains nor user fields to make it from")
    return ADSPlan(
        events,
        both.candidate,
        domains=domains if config.psrg or config.pcrg else 0,
        domain_fields=tuple(field.name for field in chosen),
        domain_width=domain_width,
        query_width=query_width,
        project=project,
        chunks=-(-longest_history(events, config.max_length) // config.chunk),
        trained_domain=bool(domains) or any(not field.is_dense for field in chosen),
    )


def token_shape(config: ADSConfig, schema: Schema) -> TokenShape:
    """One candidate token: D_A, A or the sum of `micro` wide."""
    plan = plan_ads(config, schema)
    width = {"mha": config.width, "din": plan.events.width, "can": sum(config.micro)}[config.scorer]
    trained = config.scorer != "can" or _trained_events(config, plan) or _trained_queries(config, plan)
    return TokenShape(candidate=1, width=width, candidate_trained=trained)


def count_params(config: ADSConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, F = plan_ads(config, schema), config.gen_hidden
    A, A_q, d_D = plan.events.width, plan.query_width, plan.domain_width
    total = plan.events.params + plan.domains * config.domain_width
    total += (plan.candidate.candidate_width * A_q + A_q) * plan.project
    if config.psrg:
        total += _generator(d_D, F, A * A) + A * A + _generator(d_D, F, A)
    if config.pcrg:
        total += _generator(d_D + A_q, F, plan.chunks * A_q)
    if config.scorer == "mha":
        total += (A_q + 2 * A) * config.width
    if config.scorer == "din":
        total += unit_params(A, config.hidden)
    return Params(dense=total)


def count_flops(config: ADSConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, F = plan_ads(config, schema), config.gen_hidden
    A, A_q, d_D, S = plan.events.width, plan.query_width, plan.domain_width, plan.events.length
    trained_x = plan.project or plan.candidate.candidate_trained
    used = -(-S // config.chunk) if config.pcrg else 1
    request = unneeded = 0
    if config.psrg:
        request = 4 * d_D * F + 2 * F * A * A + 2 * F * A + 2 * S * A * A
        unneeded = 4 * d_D * F * (not plan.trained_domain) + 2 * S * A * A * (not plan.events.trained)
    prepared, per_candidate, missing = _SCORER_FLOPS[config.scorer](config, plan, used)
    request += prepared
    unneeded += prepared * (not _trained_events(config, plan))
    projection = 2 * plan.candidate.candidate_width * A_q * plan.project
    per_candidate, missing = per_candidate + projection, missing + projection * (not plan.candidate.candidate_trained)
    if config.pcrg:
        first = 2 * (d_D + A_q) * F
        per_candidate += first + 2 * F * plan.chunks * A_q
        missing += first * (not (trained_x or plan.trained_domain))
    if config.psrg and config.domain_side == "candidate":
        return Flops(0, request + per_candidate, 0, unneeded + missing)
    return Flops(request, per_candidate, unneeded, missing)


def _mha_flops(config: ADSConfig, plan: ADSPlan, used: int) -> tuple[int, int, int]:
    """Of what is prepared from the events, of a candidate, and of the gradients the latter leaves out."""
    query = 2 * used * plan.query_width * config.width
    prepared = 4 * plan.events.length * plan.events.width * config.width
    return prepared, query + 4 * plan.events.length * config.width, query * (not _trained_queries(config, plan))


def _din_flops(config: ADSConfig, plan: ADSPlan, used: int) -> tuple[int, int, int]:
    S, A, (F1, F2) = plan.events.length, plan.events.width, config.hidden
    query, pairs = 2 * used * A * F1, 2 * S * A * F1
    events, queries = _trained_events(config, plan), _trained_queries(config, plan)
    missing = query * (not queries) + pairs * (not (events or queries)) + 2 * S * A * (not events)
    return pairs, query + pairs + S * (2 * F1 * F2 + 2 * F2) + 2 * S * A, missing


def _can_flops(config: ADSConfig, plan: ADSPlan, used: int) -> tuple[int, int, int]:
    rows = used * (config.chunk if config.pcrg else plan.events.length)
    layers = [2 * rows * a * b for a, b in pairwise((plan.events.width, *config.micro))]
    events, queries = _trained_events(config, plan), _trained_queries(config, plan)
    inputs = [events] + [events or queries] * (len(layers) - 1)
    missing = sum(f * ((not x) + (not queries)) for f, x in zip(layers, inputs, strict=True))
    return 0, sum(layers), missing


_SCORER_FLOPS = {"mha": _mha_flops, "din": _din_flops, "can": _can_flops}


def _trained_events(config: ADSConfig, plan: ADSPlan) -> bool:
    return config.psrg or plan.events.trained


def _trained_queries(config: ADSConfig, plan: ADSPlan) -> bool:
    return config.pcrg or plan.project or plan.candidate.candidate_trained


def _generator(width: int, hidden: int, out: int) -> int:
    return width * hidden + hidden + hidden * out + out


ADS_SPEC = EncoderSpec(
    ADSConfig,
    builder(ADS, plan_ads),
    token_shape,
    count_params,
    count_flops,
    sized_by(lambda config, width: {"width": width}, count_params, lambda config: config.head_dim or 1),
)
