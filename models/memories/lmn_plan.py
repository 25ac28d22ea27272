"""Flags of the large memory network and what they mean for one schema; equations and letters: see `lmn.py`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from recscale.models.baselines.din import partner_fields
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import EventPlan, HistoryOptions, plan_events
from recscale.models.inputs.schema import Schema
from recscale.models.layers.param import Init
from recscale.models.layers.per_token import Activation
from recscale.models.layers.towers import TowerOptions
from recscale.models.options import Options, group_of, refuse_unused, require_sizes

from .options import MemoryOptions


@dataclasses.dataclass(frozen=True)
class LMNOptions(Options):
    """What is read, what is written, and how both meet; memory_weight: lambda. See the file."""

    query_mode: Literal["user", "item_only"] = "user"
    read_from: Literal["both", "sequence", "target"] = "both"
    pool: Literal["attention", "mean"] = "attention"
    target: Literal["fixed", "learned", "event"] = "fixed"
    target_gradient: bool = False
    memory_weight: float = 0.1
    memory_loss_to: Literal["all", "values"] = "all"
    activation: Activation = "relu"
    init: Init = "lecun_normal"

    @property
    def reads_sequence(self) -> bool:
        """Whether scores depend on reads of events; else only the memory loss does."""
        return self.read_from != "target"

    @property
    def reads_target(self) -> bool:
        return self.read_from != "sequence"

    @property
    def attends(self) -> bool:
        """Whether every candidate weighs the reads of events by itself."""
        return self.reads_sequence and self.pool == "attention"

    @property
    def averages(self) -> bool:
        """Whether the reads of events are averaged, once per request."""
        return self.reads_sequence and self.pool == "mean"


@dataclasses.dataclass(frozen=True)
class LMNConfig(LMNOptions, MemoryOptions, HistoryOptions, TowerOptions):
    """widths F1, F2, ... of the MLP; din_hidden: widths of DIN; candidate: what e_i and x_s are; the rest: see the
    file."""

    widths: tuple[int, ...] = (256, 128)
    din_hidden: tuple[int, ...] = (32, 16)
    candidate: Literal["match", "project"] = "match"
    memory_slots: int = 256
    value_init_std: float | None = 0.02

    def __post_init__(self):
        super().__post_init__()
        if not self.widths:
            raise ValueError("widths is empty, expected at least one layer")
        require_sizes(widths=self.widths, din_hidden=self.din_hidden)
        if self.memory_weight < 0:
            raise ValueError(f"memory_weight is {self.memory_weight}, expected 0 (no memory loss) or more")
        if not self.memory_weight:
            reason = "memory_weight is 0, so there is no memory loss; set memory_weight"
            refuse_unused(self, reason, target=self.target, target_gradient=self.target_gradient)
            refuse_unused(self, reason, memory_loss_to=self.memory_loss_to)
        if not self.reads_sequence:
            refuse_unused(self, "scores read no events; set read_from='both' or 'sequence'", pool=self.pool)
        if self.value_op != "bag" or self.score != "additive" or self.query_norm == "batch":
            raise ValueError(
                f"lmn reads bags by additive scores without batch norm, found value_op={self.value_op!r}, "
                f"score={self.score!r}, query_norm={self.query_norm!r}"
            )
        if self.addressing == "hash":
            raise ValueError("lmn's queries are trained, so a hash of them is no address; set another addressing")
        if self.query_per_token or self.keys_per_token or self.values_per_token:
            raise ValueError("lmn reads events, not tokens: query_, keys_ and values_per_token must be False")
        if self.values_frozen and (self.addressing == "random" or self.memory_loss_to == "values"):
            raise ValueError(
                "values_frozen leaves nothing to train with addressing='random' or memory_loss_to='values'"
            )


@dataclasses.dataclass(frozen=True)
class LMNPlan:
    """What an LMN reads of one schema.

    parts: per event field its width and the candidate field it matches, None where it tells what the user did.
    items_trained, actions_trained, matched_trained: whether a gradient must flow back into x_s, a_s and e_i.
    memory: options with d.
    """

    flat: FlatPlan
    events: EventPlan
    parts: tuple[tuple[int, str | None], ...]
    project: bool
    items_trained: bool
    actions_trained: bool
    matched_trained: bool
    memory: MemoryOptions

    @property
    def item_width(self) -> int:
        """A_x."""
        return sum(width for width, name in self.parts if self.project or name)

    @property
    def action_width(self) -> int:
        """A_a."""
        return sum(width for width, _ in self.parts) - self.item_width

    @property
    def value_width(self) -> int:
        """d."""
        return self.memory.value_width or 0

    def split(self, events: Float[Array, "R S A"]) -> tuple[Float[Array, "R S A_x"], Float[Array, "R S A_a"]]:
        """events [R, S, .] -> x [R, S, A_x] and a [R, S, A_a], possibly of width 0."""
        items, actions, start = [], [], 0
        for width, name in self.parts:
            (items if self.project or name else actions).append(events[..., start : start + width])
            start += width
        return jnp.concatenate(items, axis=-1), jnp.concatenate([*actions, events[..., :0]], axis=-1)


def plan_lmn(schema: Schema, config: LMNConfig) -> LMNPlan:
    """Resolves a config for one schema.

    Raises:
        ValueError: no event field is shared with the candidate, no user field for user-aware queries, or a value width
            that target="event" cannot have.
    """
    flat, events = plan_flat(schema), plan_events(schema, config)
    sequence = next(s for s in schema.sequences if s.name == events.sequence)
    project = config.candidate == "project"
    partners = partner_fields(schema, sequence, needed=not project)
    if config.query_mode == "user" and not flat.user_width:
        raise ValueError("query_mode='user' needs user fields, and the schema has none; use query_mode='item_only'")
    parts = tuple((f.width, p.name if p else None) for f, p in zip(sequence.fields, partners, strict=True))
    items = [f for f, p in zip(sequence.fields, partners, strict=True) if project or p]
    width = sum(field.width for field in items)
    d = config.value_width or (width if config.target == "event" else config.key_width)
    if config.target == "event" and d != width:
        raise ValueError(f"target='event' is {width} wide, value_width is {d}; leave value_width None")
    return LMNPlan(
        flat=flat,
        events=events,
        parts=parts,
        project=project,
        items_trained=any(not field.is_dense for field in items),
        actions_trained=any(not field.is_dense for field in sequence.fields if field not in items),
        matched_trained=project or any(p and not p.is_dense for p in partners),
        memory=dataclasses.replace(group_of(config, MemoryOptions), value_width=d),
    )
