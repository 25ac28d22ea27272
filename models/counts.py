"""Closed-form counts of an architecture: parameters by kind, FLOPs by phase.

FLOPs are those of matrix products, 2 per multiply-add; norms, gates, softmax, pooling and permutations count 0.
Forward and training are separate, and so are the part done once per request (`user`) and once per candidate.
Training does every product three times (value and two gradients) except where an operand is raw data (dense fields),
whose gradient nobody needs: those FLOPs are `unneeded` once each.
"""

from __future__ import annotations

import dataclasses
import operator


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of `encode_user` per request and of `score` per candidate, and what their gradients leave out.

    `user_training`, `candidate_training`: forward FLOPs that training does besides (auxiliary heads, closed experts).
    `step`: forward FLOPs once per batch, whatever its size (parameters made from parameters), `step_unneeded` and
    `step_training`.
    """

    user: int = 0
    candidate: int = 0
    user_unneeded: int = 0
    candidate_unneeded: int = 0
    candidate_training: int = 0
    step: int = 0
    step_unneeded: int = 0
    user_training: int = 0
    step_training: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*map(operator.add, vars(self).values(), vars(other).values()))


@dataclasses.dataclass(frozen=True)
class Params:
    """Parameters of the dense part: `dense` is the total and includes the others; a row leaves `inactive` unused.

    `training_only` is apart from it: heads that serving never builds. `slots`: memory slots of all layers. `positions`:
    tables of event positions, which grow with the longest history.
    """

    dense: int = 0
    tokenizer: int = 0
    head: int = 0
    memory: int = 0
    inactive: int = 0
    training_only: int = 0
    slots: int = 0
    positions: int = 0

    def __add__(self, other: Params) -> Params:
        return Params(*map(operator.add, vars(self).values(), vars(other).values()))


@dataclasses.dataclass(frozen=True)
class Count:
    """What `recscale.models.count` returns.

    Attributes:
        dense_params: every trained parameter outside embedding tables, values of memories included.
        active_params: the part of `dense_params` one row uses (equal unless experts are sparse or there is a memory).
        embedding_params: rows times widths of the schema's tables.
        head_params: task towers, part of `dense_params`.
        encoder_params: of the sequence encoder in front, part of `dense_params`; what is left is the backbone's. None
            for a model that is not composed.
        position_params: tables of event positions, part of `dense_params` and of the encoder's.
        tokenizer_params: projections of fields and histories to tokens, part of `dense_params`.
        memory_params: trained values of memory layers, part of `dense_params` and never of `active_params`.
        memory_slots: slots M of all memory layers together (a shared pool once); None without a memory.
        forward_flops_step, train_flops_step: once per batch, besides those per request and per candidate.
        training_only_params: auxiliary heads that only training has, no part of `dense_params`.
        forward_flops_per_row: C = 1, so `forward_flops_user + forward_flops_candidate`.
        forward_flops_user, forward_flops_candidate: per request, per candidate.
        train_flops_user, train_flops_candidate: forward and backward, per request, per candidate.
        train_flops_per_row: C = 1, the sum of the two.
    """

    dense_params: int
    active_params: int
    embedding_params: int
    head_params: int
    tokenizer_params: int
    memory_params: int
    forward_flops_per_row: int
    forward_flops_user: int
    forward_flops_candidate: int
    train_flops_per_row: int
    train_flops_user: int
    train_flops_candidate: int
    training_only_params: int = 0
    memory_slots: int | None = None
    forward_flops_step: int = 0
    train_flops_step: int = 0
    encoder_params: int | None = None
    position_params: int = 0

    @classmethod
    def of(cls, params: Params, flops: Flops, embedding_params: int, encoder_params: int | None = None) -> Count:
        """Totals from the parts of a model: three times every product in training, less what no gradient needs."""
        train_user = 3 * (flops.user + flops.user_training) - flops.user_unneeded
        train_candidate = 3 * (flops.candidate + flops.candidate_training) - flops.candidate_unneeded
        return cls(
            dense_params=params.dense,
            active_params=params.dense - params.inactive,
            embedding_params=embedding_params,
            head_params=params.head,
            tokenizer_params=params.tokenizer,
            memory_params=params.memory,
            forward_flops_per_row=flops.user + flops.candidate,
            forward_flops_user=flops.user,
            forward_flops_candidate=flops.candidate,
            train_flops_per_row=train_user + train_candidate,
            train_flops_user=train_user,
            train_flops_candidate=train_candidate,
            training_only_params=params.training_only,
            memory_slots=params.slots or None,
            forward_flops_step=flops.step,
            train_flops_step=3 * (flops.step + flops.step_training) - flops.step_unneeded,
            encoder_params=encoder_params,
            position_params=params.positions,
        )

    def to_dict(self) -> dict[str, int]:
        """JSON-able, by attribute."""
        return dataclasses.asdict(self)
