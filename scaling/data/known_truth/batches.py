"""Batches of the known-truth log: drawn requests as the fields, history and labels that a model reads."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from recscale.models.inputs import Batch, CandidateSide, Content, Field, History, Schema, Sequence, Task, UserSide
from recscale.scaling.data.source import ENDLESS_REQUESTS

from . import content
from .config import CANDIDATE_FIELDS, CROSS_FIELDS, REQUEST_FIELDS, TASK_NAMES, KnownTruthConfig
from .draw import Drawn, draw
from .logit_parts import DRIFT_FIELD, HISTORY_CODE, ITEM, SEQUENCE, Rows, pair_column, pair_id, permute
from .world import World, history_word, signs

FIRST_EVALUATION_REQUEST = ENDLESS_REQUESTS  # requests from here on are never trained on


def make_schema(config: KnownTruthConfig) -> Schema:
    """Fields, history and tasks of a configuration.

    Learned codes: eight id fields; oracle codes: eight dense fields `<field>_code` of `code_bits` signs, and
    the ids of `user` and `item` only where biases or the history need them. Oracle history codes: `history_code`, the
    signs of the candidate and of every event, in place of their item ids; "none": none of these but needed ids. Other
    parts with no share bring no fields.
    """
    width, memory_width = config.embedding_width, config.memory_embedding_width or config.embedding_width
    needed = {"user": config.has_b, "item": config.shows_item}
    groups = {"c1": "context", "c2": "context", "item": "item", "i1": "item", "i2": "item"}
    fields = []
    for name in CROSS_FIELDS:
        side, group = ("user" if name in REQUEST_FIELDS else "candidate"), groups.get(name, "user")
        if config.shows_codes:
            fields.append(Field(f"{name}_code", side, config.code_bits, group=group))
        if config.codes == "learned" or needed.get(name, False):
            fields.append(Field(name, side, width, vocabulary=config.vocabulary, group=group))
    if config.shows_history_codes:
        fields.append(Field(HISTORY_CODE, "candidate", config.code_width, group="item"))
    if config.has_l and config.match_groups > 1:
        fields.append(Field("cat", "candidate", width, vocabulary=config.match_groups, group="item"))
    if config.has_m and config.pair_field:
        rows = 4 * config.clusters * config.pair_items + 1
        fields.append(Field("pair", "cross", memory_width, vocabulary=rows, group="pair"))
    elif config.has_m:
        fields.append(Field("mem_u", "user", memory_width, vocabulary=2 * config.clusters, group="pair"))
        fields.append(Field("mem_i", "candidate", memory_width, vocabulary=2 * config.pair_items + 1, group="pair"))
    if config.domains > 1:
        fields.append(Field("domain", "user", width, vocabulary=config.domains, group="context"))
    return Schema(
        fields=tuple(fields),
        sequences=_sequences(config, width),
        tasks=tuple(Task(name) for name in TASK_NAMES[: config.tasks]),
        domains=config.domains,
        content=_content(config),
    )


def make_batch(
    world: World,
    log_seed: Any,
    index: Any,
    requests: int,
    candidates: int = 1,
    evaluation: bool = False,
    history_length: int | None = None,
) -> Batch:
    """Batch `index`: requests index * R ... index * R + R - 1 of the log.

    `log_seed` and `index` may be traced. With `evaluation` the requests are counted from 2^31, the half of the log
    that training never reads. `history_length`: newest events in the batch, None for all; labels depend on all.
    """
    request = request_numbers(index, requests, evaluation)
    return make_requests(world, log_seed, request, candidates, history_length)


def make_requests(
    world: World, log_seed: Any, request: UInt32[Array, " R"], candidates: int = 1, history_length: int | None = None
) -> Batch:
    """Batch of the requests with the given numbers; each is a pure function of (world, log_seed, request)."""
    return assemble(world, draw(world, log_seed, request, candidates, history_length))


def request_numbers(index: Any, requests: int, evaluation: bool = False) -> UInt32[Array, " {requests}"]:
    """Numbers of the requests of batch `index`."""
    first = jnp.asarray(index).astype(jnp.uint32) * jnp.uint32(requests)
    if evaluation:
        first = first + jnp.uint32(FIRST_EVALUATION_REQUEST)
    return first + jnp.arange(requests, dtype=jnp.uint32)


def assemble(world: World, drawn: Drawn) -> Batch:
    """The batch of drawn requests: what a model may see, and the labels."""
    return Batch(
        user=_user_side(world, drawn),
        candidates=_candidate_side(world, drawn),
        labels=drawn.labels,
        label_mask=drawn.label_mask,
        valid=jnp.ones(drawn.fresh.shape, bool),
    )


def _sequences(config: KnownTruthConfig, width: int) -> tuple[Sequence, ...]:
    if not config.has_history:
        return ()
    events = []
    if config.has_l:
        if config.shows_history_codes:
            events.append(Field(HISTORY_CODE, "user", config.code_width, group="history"))
        else:
            events.append(Field("item", "user", width, vocabulary=config.vocabulary, group="history"))
        if config.match_groups > 1:
            events.append(Field("cat", "user", width, vocabulary=config.match_groups, group="history"))
    if config.drift:
        events.append(Field(DRIFT_FIELD, "user", config.drift, group="history"))
    return (Sequence(SEQUENCE, config.history_max, tuple(events), timestamps=config.timestamps),)


def _content(config: KnownTruthConfig) -> Content | None:
    if not config.content_tokens:
        return None
    sizes = config.vocabulary, content.vocabulary(config), (config.content_tokens,), config.query_tokens
    return Content(*sizes, histories=(SEQUENCE,))


def _user_side(world: World, drawn: Drawn) -> UserSide:
    config, rows = world.config, drawn.rows
    ids, dense = _cross_fields(world, 0, REQUEST_FIELDS, rows.request_words, drawn.request_ids, config.has_b)
    if config.has_m and not config.pair_field:
        ids["mem_u"] = 2 * rows.cluster + rows.request_bit
    if config.domains > 1:
        ids["domain"] = rows.domain
    if drawn.query is not None:
        ids["query"] = drawn.query.astype(jnp.int32)
        ids["query_content"] = content.query_tokens(config, drawn.query)
    histories = {SEQUENCE: _history(world, rows, drawn.observed)} if config.has_history else {}
    return UserSide(ids=ids, dense=dense, histories=histories, domain=rows.domain)


def _candidate_side(world: World, drawn: Drawn) -> CandidateSide:
    config, rows = world.config, drawn.rows
    ids, dense = _cross_fields(
        world, ITEM, CANDIDATE_FIELDS, rows.candidate_words, drawn.candidate_ids, config.shows_item
    )
    if config.content_tokens:
        ids["content_item"] = permute(world, ITEM, rows.item[None])[0]
        ids["content"] = content.item_tokens(world, rows.item)
    if config.shows_history_codes:
        dense[HISTORY_CODE] = signs(history_word(world, rows.item), config.code_width, 0).astype(jnp.float32)
    if config.has_l and config.match_groups > 1:
        ids["cat"] = rows.category
    if config.has_m:
        column = 2 * pair_column(world, rows.cluster[:, None], rows.rank) + rows.candidate_bit
        mem_i = jnp.where(drawn.fresh, 2 * config.pair_items, column)
        if config.pair_field:
            ids["pair"] = pair_id(config, 2 * rows.cluster + rows.request_bit, mem_i)
        else:
            ids["mem_i"] = mem_i
    return CandidateSide(ids=ids, dense=dense)


def _cross_fields(
    world: World, first: int, names: tuple[str, ...], words: Array, ids: Array, first_id_needed: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ids, dense) of consecutive cross fields: ids; or, with oracle codes, signs and at most the first field's id."""
    config = world.config
    if config.codes == "learned":
        return dict(zip(names, permute(world, first, ids), strict=True)), {}
    values = signs(words, config.code_bits, 1).astype(jnp.float32)
    dense = {f"{name}_code": value for name, value in zip(names, values, strict=True)} if config.shows_codes else {}
    return ({names[0]: permute(world, first, ids)[0]} if first_id_needed else {}), dense


def _history(world: World, rows: Rows, observed: Any) -> History:
    config = world.config
    shown = (rows.event_item if config.has_l else observed).shape[1]
    live = jnp.arange(shown, dtype=jnp.int32) < rows.length[:, None]

    def kept(values: Any) -> Any:
        """Zero on padding, which only ragged histories have."""
        return jnp.where(live.reshape(*live.shape, *(1,) * (values.ndim - 2)), values, 0) if config.ragged else values

    ids, dense, delta = {}, {}, None
    if config.has_l:
        if config.shows_history_codes:
            values = signs(history_word(world, rows.event_item), config.code_width, 0)
            dense[HISTORY_CODE] = kept(values).astype(jnp.float32)
        else:
            ids["item"] = kept(permute(world, ITEM, rows.event_item[None])[0])
        if config.match_groups > 1:
            ids["cat"] = kept(rows.event_category)
    if config.content_tokens:
        ids["content_item"] = kept(permute(world, ITEM, rows.event_item[None])[0])
    if observed is not None:
        dense[DRIFT_FIELD] = kept(observed)
    if config.timestamps:
        # About an hour and eight minutes per event, strictly growing with age; a hash of the visible ids jitters it.
        base = rows.event_item if config.has_l else jnp.zeros(live.shape, jnp.int32)
        jitter = (base.astype(jnp.uint32) * np.uint32(0x9E3779B1)) >> 20
        delta = kept(4096 * jnp.arange(shown, dtype=jnp.int32) + 1 + jitter.astype(jnp.int32))
    return History(ids=ids, dense=dense, length=jnp.minimum(rows.length, shown), delta_s=delta)
