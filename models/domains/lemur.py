"""LEMUR (arXiv 2511.10962): content encoders trained with the ranker, and a bank of what they said before.

    query vector    E_q(tokens of the query)                  [R,W], once per request, also when serving
    item vectors    E_d(tokens of the item)  in training, of a sample of the batch's distinct items
                    bank(item), without gradient               of all others, and of all when serving: E_d never runs
    history         bank(item of every event), fresh where it is in the sample    (or a forecast, see `stale_bank`)
    reader          q_1 = x W_1 + b_1,  q_{i+1} = FFN_i( sum_s a_s h_s ),  a = softmax_s(q_i . h_s)     h the history
    similarity      cos(item, h_s) for every event, and the same in descending order
    SQDC            each clicked item against the items of other queries, by T_s cos(query, item): `contrastive_loss`

These are extra tokens of a RankMixer beside its fields and the mean of the history's events: query vector (user), item
vector, what the reader found, and both vectors of similarities, projected from S to W numbers (candidate).

One training step (a `key` is given): the n_p = ceil(p U) of U = R*C places of distinct ids whose hash of (step's key,
id) is smallest are encoded once, the first n_q = ceil(q U) of them with gradient; items and histories take those
vectors; after the loss the bank is written with them, that is with the parameters before the update. Places that a
batch with repeated items leaves empty are encoded as padding.

Letters: R requests, C candidates, S events, W content width, U places of distinct items, p, q shares of them.
Cost of a row in training: p forward passes of E_d and 2 q for gradients. SQDC's product is counted for one request;
with more it is 2*R*W FLOPs a candidate.

Published parts are those of its section 3 on private data; orderings are to be reproduced, no values. Undisclosed ->
flag (default): loss weight -> sqdc_weight (.1); sum or mean -> sqdc_reduce; encoder sizes -> `ContentEncoderOptions`;
reader -> reader_layers (2), reader_hidden (None: 4 W), its query sees the candidate; sample -> sample_order ("hash");
gradient into fresh copies within histories -> join_gradient (False); missing items -> a learned vector; number format
-> bank_dtype. Controls: predictor; ranking_gradient=False (only SQDC trains the encoders: two stages at once);
session_mask=False; mask_same_item; similarity=False; reader_layers=0; sqdc_weight=0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from recscale.models.architecture import RankerSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Contrast, ItemContent, Output, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import EventPlan, EventReader, HistoryOptions, TokenShape, plan_events
from recscale.models.inputs.schema import Schema
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.mixers import rankmixer
from recscale.models.mixers.rankmixer import HIDDEN_RATIO, RankMixerConfig, StackOptions
from recscale.models.options import group_of, refuse_unused, require_sizes
from recscale.models.ranker import Ranker
from recscale.models.sizing import affine_widths, shapes_by_width, tokenizer_choices

from .content_encoder import ContentEncoder, ContentEncoderOptions, encoder_flops, encoder_params
from .history_reader import Reader
from .stale_bank import (
    NO_ID,
    BankState,
    LSTMForecast,
    Probe,
    Snapshots,
    StaleBank,
    forecast_loss,
    join,
    linear_forecast,
    log2_bucket,
    momentum,
    probe,
)

# Ages of bank vectors are reported as 0, 1-2, 3-6, 7-14, ... steps, and all from 2^5 - 1 on together.
_AGES = 6
# Behind every cosine.
_PADDING = 2.0


@dataclasses.dataclass(frozen=True)
class LemurConfig(ContentEncoderOptions, HistoryOptions, StackOptions):
    """encode_fraction p, backward_fraction q; the rest: see the file and the groups."""

    encode_fraction: float = 0.2
    backward_fraction: float = 0.2
    sample_order: Literal["hash", "missing_first"] = "hash"
    sqdc_weight: float = 0.1
    sqdc_scale: float = 50.0
    sqdc_reduce: Literal["mean", "sum"] = "mean"
    sqdc_negatives: Literal["all", "clicked"] = "all"
    session_mask: bool = True
    mask_same_item: bool = False
    reader_layers: int = 2
    reader_hidden: int | None = None
    similarity: bool = True
    ranking_gradient: bool = True
    join_gradient: bool = False
    bank_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    predictor: Literal["none", "linear", "lstm", "ema"] = "none"
    snapshot_rows: int | None = None
    ema_decay: float = 0.99
    forecast_hidden: int = 32

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.backward_fraction <= self.encode_fraction <= 1:
            raise ValueError(
                f"encode_fraction and backward_fraction are {self.encode_fraction} and {self.backward_fraction}, "
                "expected 0 <= backward_fraction <= encode_fraction <= 1"
            )
        for name, off in (("reader_layers", "no reader"), ("sqdc_weight", "no SQDC loss")):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} is {value:g}, expected 0 ({off}) or more")
        require_sizes(reader_hidden=self.reader_hidden, snapshot_rows=self.snapshot_rows)
        if not self.reader_layers:
            refuse_unused(self, "there is no reader; set reader_layers", reader_hidden=self.reader_hidden)
        if not self.sqdc_weight:
            reason = "there is no SQDC loss; set sqdc_weight"
            refuse_unused(self, reason, sqdc_scale=self.sqdc_scale, sqdc_reduce=self.sqdc_reduce)
            refuse_unused(self, reason, sqdc_negatives=self.sqdc_negatives, session_mask=self.session_mask)
            refuse_unused(self, reason, mask_same_item=self.mask_same_item)
        if not (self.sqdc_weight or self.ranking_gradient):
            raise ValueError("sqdc_weight=0 and ranking_gradient=False leave no loss that trains the encoders")
        if self.predictor != "ema":
            refuse_unused(self, "nothing is averaged; set predictor='ema'", ema_decay=self.ema_decay)
        if self.predictor != "lstm":
            refuse_unused(self, "there is no LSTM; set predictor='lstm'", forecast_hidden=self.forecast_hidden)
        if self.snapshots == 1:
            reason = "one snapshot is kept of every row; set predictor to 'linear' or 'lstm'"
            refuse_unused(self, reason, snapshot_rows=self.snapshot_rows)

    @property
    def snapshots(self) -> int:
        """K, snapshots of a row that its forecast needs."""
        return {"linear": 2, "lstm": 3}.get(self.predictor, 1)

    @property
    def backbone(self) -> RankMixerConfig:
        """The flags of the RankMixer."""
        return RankMixerConfig(**vars(group_of(self, StackOptions)))


@dataclasses.dataclass(frozen=True)
class LemurPlan:
    """Sizes that follow from a schema: rows V and tokens of items, the history that is read, and its events."""

    rows: int
    vocabulary: int
    segments: tuple[int, ...]
    query_length: int
    events: EventPlan
    fields: FlatPlan
    tokens: TokenShape


class Fresh(NamedTuple):
    """Items that were just encoded: distinct ids ascending, `NO_ID` in unused places, their vectors and tokens."""

    ids: Int[Array, " N"]
    vectors: Float[Array, "N W"]
    tokens: Int[Array, "N n"]


class LemurState(NamedTuple):
    """Per request: the backbone's state; query vector [R, W] and what it asks int32 [R]; items of the history int32
    [R, S], -1 on padding, their vectors [R, S, W], known bool [R, S]; the users' half of the reader's query."""

    backbone: Any
    query: Array
    asked: Array
    items: Array
    history: Array
    known: Array
    reader: Array | None


class Lemur(Ranker):
    """Encoders, bank, reader and a RankMixer. A key makes a call a training step: it encodes, and writes the bank."""

    def __init__(
        self, plan: LemurPlan, schema: Schema, options: LemurConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        W = options.content_width
        self.plan, self.options, self.dtype = plan, options, dtype
        self.backbone = rankmixer.RANKMIXER.build(options.backbone, schema, plan.tokens, rngs=rngs, dtype=dtype)

        def encoder(segments: tuple[int, ...], layers: int) -> ContentEncoder:
            return ContentEncoder(plan.vocabulary, segments, layers, options, dtype=dtype, rngs=rngs)

        def dense(inputs: int) -> Dense:
            return Dense(inputs, W, axes=("events", "embed"), dtype=dtype, rngs=rngs)

        self.query = encoder((plan.query_length,), options.query_layers)
        self.document = encoder(plan.segments, options.document_layers)
        self.missing = param.normal(rngs, (W,), ("embed",), 1.0)
        self.events = EventReader(plan.events, rngs=rngs)
        self.event_token = dense(plan.events.width)
        hidden, layers = options.reader_hidden or 4 * W, options.reader_layers
        self.reader = Reader(plan.fields, W, hidden, layers, dtype=dtype, rngs=rngs) if layers else None
        self.similarities = nnx.List(dense(plan.events.length) for _ in range(2 * options.similarity))
        lstm = options.predictor == "lstm"
        self.forecaster = LSTMForecast(W, options.forecast_hidden, rngs=rngs) if lstm else None
        self.slow = _average_of(self.document) if options.predictor == "ema" else None
        self.bank = StaleBank(
            plan.rows,
            W,
            snapshots=options.snapshots,
            snapshot_rows=options.snapshot_rows,
            dtype=jnp.dtype(options.bank_dtype),
        )
        self.now = BankState(jnp.zeros((), jnp.int32), logical_axes=())

    def encode_user(self, user: UserInputs) -> LemurState:
        if user.content is None:
            raise ValueError("the inputs carry no content; the schema of the log must have some")
        view, plan = self.events(user), self.plan
        total = view.events.astype(jnp.float32).sum(axis=1) / jnp.maximum(view.length, 1)[:, None]
        query = self.query(user.content.tokens)
        tokens = jnp.stack([self.event_token(total.astype(self.dtype)), query.astype(self.dtype)], axis=1)
        items = user.content.history[plan.events.sequence][:, : plan.events.length]
        found = self.bank.read(items)
        history = self._vectors(found)
        reader = None if self.reader is None else self.reader.encode_user(user)
        backbone = self.backbone.encode_user(user, tokens)
        return LemurState(backbone, query, user.content.query, items, history, found.known, reader)

    def score(self, state: LemurState, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        items = candidates.content
        if items is None:
            raise ValueError("the inputs carry no content; the schema of the log must have some")
        if candidates.valid is not None:
            items = dataclasses.replace(items, ids=jnp.where(candidates.valid, items.ids, -1))
        fresh = None if key is None else self._encode(items, key)
        found = self.bank.read(items.ids)
        target = self._vectors(found)
        history, valid = state.history, state.items >= 0
        if fresh is not None:
            target = join(items.ids, fresh.ids, fresh.vectors, target, gradient=True)
            history = join(state.items, fresh.ids, fresh.vectors, history, gradient=self.options.join_gradient)
        ranked, past = (x.astype(self.dtype) for x in self._detached(target, history))
        tokens = [ranked]
        if self.reader is not None:
            tokens.append(self.reader.score(state.reader, candidates, past, valid))
        if self.similarities:
            near = jnp.where(valid[:, None], contract("rcw,rsw->rcs", _unit(ranked), _unit(past), self.dtype), 0.0)
            ordered = -jnp.sort(jnp.where(valid[:, None], -near, _PADDING), axis=-1)
            ordered = jnp.where(ordered == -_PADDING, 0.0, ordered)
            tokens += [
                project(x.astype(self.dtype)) for project, x in zip(self.similarities, (near, ordered), strict=True)
            ]
        output = self.backbone.score(state.backbone, candidates, jnp.stack(tokens, axis=2), key=key)
        if key is None:
            return output
        output = dataclasses.replace(output, contrast=self._contrast(state, items, target))
        return self._finish(output, fresh, state, items, found)

    def probe(self, ids: Int[Array, " N"], tokens: Int[Array, "N n"], bucket: Int[Array, " N"], buckets: int) -> Probe:
        """The bank's (forecast) vectors of a fixed set of items against those encoded now; nothing is written."""
        found = self.bank.read(ids)
        return probe(self._forecast(found), self.document(tokens), found.known, bucket, buckets)

    def _vectors(self, found: Snapshots) -> Float[Array, "*ids W"]:
        """The bank's vectors of some ids, and the learned one where it has none."""
        known = found.known[..., None]
        missing = jnp.broadcast_to(self.missing[...], (*found.known.shape, self.missing.shape[0]))
        return jnp.where(known, self._forecast(found), missing)

    def _forecast(self, found: Snapshots) -> Float[Array, "*ids W"]:
        """What the model takes for the vectors of these ids; no gradient."""
        if self.forecaster is not None:
            return jax.lax.stop_gradient(self.forecaster(found, self.now[...]))
        return linear_forecast(found, self.now[...]) if self.options.predictor == "linear" else found.last

    def _detached(self, *vectors: Array) -> tuple[Array, ...]:
        """Content vectors as the ranking loss sees them."""
        return vectors if self.options.ranking_gradient else tuple(map(jax.lax.stop_gradient, vectors))

    def _encode(self, items: ItemContent, key: Array) -> Fresh | None:
        """Encodes the sample of a batch's items that this step's key picks."""
        places = items.ids.size
        encoded = math.ceil(self.options.encode_fraction * places)
        trained = math.ceil(self.options.backward_fraction * places)
        if not encoded:
            return None
        flat = jnp.where(items.ids < 0, NO_ID, items.ids).reshape(-1)
        ids, first = jnp.unique(flat, size=places, fill_value=NO_ID, return_index=True)
        # Of key and id alone: neither the order of rows nor their devices decide.
        own = jax.random.fold_in(key, 2**31)  # no key of a block's dropout
        order = jax.vmap(lambda each: jax.random.bits(jax.random.fold_in(own, each)))(ids) >> 2
        if self.options.sample_order == "missing_first":
            order = order | (self.bank.read(ids).known.astype(jnp.uint32) << 30)
        order = order | ((ids == NO_ID).astype(jnp.uint32) << 31)
        chosen = jnp.argsort(order)[:encoded]
        tokens = jnp.take(items.tokens.reshape(places, -1), first[chosen], axis=0)
        parts = [self.document(tokens[:trained])] if trained else []
        if encoded > trained:
            parts.append(jax.lax.stop_gradient(self.document(tokens[trained:])))
        ascending = jnp.argsort(ids[chosen])
        vectors = jnp.concatenate(parts)[ascending].astype(jnp.float32)
        return Fresh(ids[chosen][ascending], vectors, tokens[ascending])

    def _contrast(self, state: LemurState, items: ItemContent, target: Array) -> Contrast | None:
        """Scores of every query with every candidate, and which of them are negatives."""
        options = self.options
        if not options.sqdc_weight:
            return None
        requests, candidates = items.ids.shape
        flat = _unit(target).reshape(requests * candidates, -1)
        scores = contract("rw,nw->rn", options.sqdc_scale * _unit(state.query), flat, self.dtype).astype(jnp.float32)
        negative = jnp.broadcast_to(items.ids[None] >= 0, (requests, requests, candidates))
        same = state.asked[:, None] == state.asked[None] if options.session_mask else jnp.eye(requests, dtype=bool)
        negative = negative & ~same[:, :, None]
        if options.mask_same_item:
            negative = negative & ~(items.ids[:, None, :, None] == items.ids[None, :, None]).any(axis=-2)
        scores = scores.reshape(requests, requests, candidates)
        clicked, mean = options.sqdc_negatives == "clicked", options.sqdc_reduce == "mean"
        return Contrast(scores, negative, options.sqdc_weight, clicked, mean)

    def _finish(
        self, output: Output, fresh: Fresh | None, state: LemurState, items: ItemContent, found: Snapshots
    ) -> Output:
        """Adds losses, diagnostics and what the bank is to be given; what was encoded is held against what it has."""
        now, losses = self.now[...], dict(output.losses)
        stats = {
            "bank/coverage_targets": _share(found.known, items.ids >= 0),
            "bank/coverage_history": _share(state.known, (state.items >= 0) & (items.ids >= 0).any(axis=1)[:, None]),
        }
        if fresh is not None:
            before = self.bank.read(fresh.ids)
            made = self._forecast(before) if self.forecaster is None else self.forecaster(before, now)
            if self.forecaster is not None:
                losses["forecast"] = forecast_loss(made, fresh.vectors, before.known)
            stats |= _staleness(before, jax.lax.stop_gradient((before.last, made, fresh.vectors)), now)
            if self.slow is not None:
                fresh = fresh._replace(vectors=self.slow(fresh.tokens).astype(jnp.float32))
            fresh = jax.lax.stop_gradient(fresh)
        # Whatever was read of the bank is in one of these; see `StaleBank.write`.
        read = jnp.isfinite(jnp.stack(list(stats.values()))).all()
        return dataclasses.replace(output, losses=losses, stats=output.stats | stats, pending=(fresh, read))

    def settle(self, pending: tuple[Fresh | None, Bool[Array, ""]], ok: Bool[Array, ""]) -> None:
        """Writes the bank with what the step encoded."""
        fresh, read = pending
        if fresh is not None:
            self.bank.write(fresh.ids, fresh.vectors, self.now[...], jnp.broadcast_to(ok & read, fresh.ids.shape))
        if self.slow is not None:
            moved = momentum(_weights(self.slow), _weights(self.document), jnp.where(ok, self.options.ema_decay, 1.0))
            state = nnx.state(self.slow)
            nnx.replace_by_pure_dict(state, moved)
            nnx.update(self.slow, state)
        self.now.set_value(self.now[...] + ok.astype(jnp.int32))


def _unit(x: Float[Array, "*rows W"]) -> Float[Array, "*rows W"]:
    """Vectors of length 1, computed in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).sum(axis=-1, keepdims=True) + 1e-12)


def _share(of: Array, among: Array) -> Array:
    return (of & among).sum() / jnp.maximum(among.sum(), 1)


def _staleness(before: Snapshots, vectors: tuple[Array, Array, Array], now: Array) -> dict[str, Array]:
    """Means over the known ids of a step's sample, also by age (0 where none has it): cosine of the bank's vectors with
    those made now, and errors of the bank and of the forecast."""
    (last, made, fresh), known = vectors, before.known
    age = jnp.where(known, log2_bucket(before.age(now), _AGES), -1)
    held, guessed = (probe(x, fresh, known, jnp.where(known, 0, -1), 1) for x in (last, made))
    ages, guesses = (probe(x, fresh, known, age, _AGES) for x in (last, made))
    found = {"cosine": held.cosine[0], "error": held.error[0], "forecast_error": guessed.error[0]}
    by_age = {"cosine": ages.cosine, "error": ages.error, "forecast_error": guesses.error}
    found |= {f"{name}_age{2**k - 1}": values[k] for name, values in by_age.items() for k in range(_AGES)}
    return {f"bank/{name}": value for name, value in found.items()}


def _weights(encoder: ContentEncoder) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(encoder))


def _average_of(encoder: ContentEncoder) -> ContentEncoder:
    """A copy of an encoder whose weights are state: moved towards the encoder's, never trained."""
    copy = nnx.clone(encoder)
    for _, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, BankState(value[...], logical_axes=value.get_metadata()["logical_axes"]))
    return copy


def build(config: LemurConfig, schema: Schema, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> Lemur:
    """The model of a config."""
    return Lemur(plan_lemur(config, schema), schema, config, dtype=dtype, rngs=rngs)


def plan_lemur(config: LemurConfig, schema: Schema) -> LemurPlan:
    """Resolves a config for one schema.

    Raises:
        ValueError: the schema has no content, or the history that is read is not one of its items.
    """
    content, events = schema.content, plan_events(schema, config)
    if content is None:
        raise ValueError(
            "the schema's items have no content, and LEMUR encodes it; the known-truth log's preset `content` has some"
        )
    if events.sequence not in content.histories:
        raise ValueError(
            f"history {events.sequence!r} is not of the items that have content: "
            f"{', '.join(content.histories) or 'none is'}; set `sequence`"
        )
    candidate = 1 + (config.reader_layers > 0) + 2 * config.similarity
    tokens = TokenShape(user=2, candidate=candidate, width=config.content_width)
    sizes = content.items, content.vocabulary, content.segments, content.query_length
    return LemurPlan(*sizes, events, plan_flat(schema), tokens)


def count_params(config: LemurConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan = plan_lemur(config, schema)
    return rankmixer.count_params(config.backbone, schema, plan.tokens) + Params(dense=_content_params(config, plan))


def count_flops(config: LemurConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products: encoding items only in training, SQDC for one request."""
    plan, W, L = plan_lemur(config, schema), config.content_width, config.reader_layers
    S, p, q = plan.events.length, config.encode_fraction, config.backward_fraction
    document = encoder_flops(plan.segments, config.document_layers, config)
    event = 2 * plan.events.width * W
    total = Flops(
        user=encoder_flops((plan.query_length,), config.query_layers, config) + event,
        user_unneeded=event * (not plan.events.trained),
        candidate=config.similarity * 6 * S * W,
        candidate_training=round(p * document) + 2 * W * (config.sqdc_weight > 0),
        candidate_unneeded=2 * (round(p * document) - round(q * document)),
    )
    if L:
        hidden = config.reader_hidden or 4 * W
        total += plan.fields.split_flops(W) + Flops(candidate=L * (4 * S * W + 4 * W * hidden))
    if not config.ranking_gradient:
        total += Flops(candidate_unneeded=config.similarity * 8 * S * W + L * 4 * S * W)
    if config.predictor == "ema":
        total += Flops(candidate_training=round(p * document), candidate_unneeded=2 * round(p * document))
    if config.predictor == "lstm":
        H = config.forecast_hidden
        step = 8 * H * (W + 1 + H)
        one = config.snapshots * step + 2 * H * W
        total += Flops(S * one, one, 2 * S * one, 2 * one + round(p * step), round(p * one))
    return rankmixer.count_flops(config.backbone, schema, plan.tokens) + total


def size_space(schema: Schema, config: LemurConfig, target_dense_params: float) -> Iterator[dict[str, Any]]:
    """Overrides (content_width, tokens, width, hidden) near the target.

    The content width is halved until encoders and reader take at most half of the target; the RankMixer is sized for
    the rest.
    """
    widths = [config.content_width]
    while widths[-1] % (2 * config.encoder_heads) == 0:
        widths.append(widths[-1] // 2)
    fits = [W for W in widths if _content_size(schema, config, W) <= target_dense_params / 2]
    content_width = (fits or widths[-1:])[0]
    config = dataclasses.replace(config, content_width=content_width)
    tokens = plan_lemur(config, schema).tokens

    def hiddens(T: int | None, D: int) -> Iterable[tuple[int, int]]:
        def params(hidden: int) -> int:
            return count_params(dataclasses.replace(config, tokens=T, width=D, hidden=hidden), schema).dense

        return enumerate(affine_widths(params, target_dense_params))

    choices = tokenizer_choices(schema, config, target_dense_params, tokens)
    for shape in shapes_by_width(choices, target_dense_params, config.layers, HIDDEN_RATIO, hiddens):
        yield {"content_width": content_width} | shape


def _content_size(schema: Schema, config: LemurConfig, content_width: int) -> int:
    config = dataclasses.replace(config, content_width=content_width)
    return _content_params(config, plan_lemur(config, schema))


def _content_params(config: LemurConfig, plan: LemurPlan) -> int:
    """Parameters of everything but the RankMixer."""
    W, S, L = config.content_width, plan.events.length, config.reader_layers
    total = encoder_params(plan.vocabulary, (plan.query_length,), config.query_layers, config)
    total += encoder_params(plan.vocabulary, plan.segments, config.document_layers, config)
    total += W + plan.events.params + plan.events.width * W + W + 2 * config.similarity * (S * W + W)
    if L:
        hidden = config.reader_hidden or 4 * W
        total += plan.fields.width * W + W + L * (2 * W * hidden + hidden + W)
    if config.predictor == "lstm":
        H = config.forecast_hidden
        total += 4 * H * (W + 1 + H) + 4 * H + H * W
    return total


LEMUR = RankerSpec(LemurConfig, build, count_params, count_flops, size_space)
