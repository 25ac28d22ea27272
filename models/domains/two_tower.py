"""Two towers: vectors of user and item are made apart, and their product is the score; the base that PROMO freezes.

    h = MLP(x)               x [R, d_x]: the user's fields and the events of all histories, in order; relu, widths F
    u = [h W_u + b_u, 1]
    e = y W_e + b_e          y [R, C, d_y]: the candidate's fields; e_d is the item's bias
    logit = <u, e>

Letters: R requests, C candidates, d = width, F_1 ... F_L = hidden, F_0 = d_x.
Parameters: sum (F_{l-1} + 1) F_l + (F_L + 1)(d - 1) + (d_y + 1) d.
FLOPs: 2 sum F_{l-1} F_l + 2 F_L (d - 1) per request, 2 d_y d + 2 d per candidate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import RankerSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.flat import plan_flat
from recscale.models.inputs.schema import Schema
from recscale.models.layers.dense import MLP, Dense, mlp_flops, mlp_params
from recscale.models.layers.matmul import contract
from recscale.models.options import Options, require_sizes
from recscale.models.ranker import Ranker
from recscale.models.sizing import affine_widths


@dataclasses.dataclass(frozen=True)
class TwoTowerConfig(Options):
    """width d of both vectors, a constant and a bias included; hidden widths of the user's tower, () a linear one."""

    width: int = 16
    hidden: tuple[int, ...] = (32,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(width=self.width - 1, hidden=self.hidden)


class TwoTower(Ranker):
    """Both towers. `user_vector` and `item_vector` are what a frozen base gives others."""

    def __init__(
        self, schema: Schema, options: TwoTowerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.fields, self.dtype = plan_flat(schema), dtype
        self.sequences = tuple(sequence.name for sequence in schema.sequences)
        self.user = MLP(_user_width(schema), options.hidden, dtype=dtype, rngs=rngs)
        axes = ("hidden", "embed"), ("features", "embed")
        self.user_out = Dense(_top(schema, options), options.width - 1, axes=axes[0], dtype=dtype, rngs=rngs)
        self.item = Dense(self.fields.candidate_width, options.width, axes=axes[1], dtype=dtype, rngs=rngs)

    def user_vector(self, user: UserInputs) -> Float[Array, "R d"]:
        """u."""
        events = [user.histories[name].events for name in self.sequences]
        parts = [self.fields.join_user(user), *(x.reshape(x.shape[0], -1) for x in events)]
        x = jnp.concatenate([part for part in parts if part is not None], axis=-1)
        u = self.user_out(self.user(x.astype(self.dtype)))
        return jnp.concatenate([u, jnp.ones_like(u[:, :1])], axis=-1)

    def item_vector(self, candidates: CandidateInputs) -> Float[Array, "R C d"]:
        """e."""
        return self.item(self.fields.join_candidates(candidates).astype(self.dtype))

    def encode_user(self, user: UserInputs) -> Float[Array, "R d"]:
        return self.user_vector(user)

    def score(self, state: Array, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        logits = contract("rd,rcd->rc", state, self.item_vector(candidates), self.dtype)
        return Output(logits=logits.astype(jnp.float32)[..., None])


def build(config: TwoTowerConfig, schema: Schema, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> TwoTower:
    """The model of a config.

    Raises:
        ValueError: several labels, of which two vectors score one.
    """
    require_one_label(schema, "two towers score")
    return TwoTower(schema, config, dtype=dtype, rngs=rngs)


def require_one_label(schema: Schema, who: str) -> None:
    """Raises ValueError if a schema has several labels."""
    if len(schema.tasks) > 1:
        names = ", ".join(task.name for task in schema.tasks)
        raise ValueError(f"{who} one label, and the schema has {names}; leave one task in it")


def count_params(config: TwoTowerConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    d, items = config.width, plan_flat(schema).candidate_width
    user = mlp_params(_user_width(schema), config.hidden) + (_top(schema, config) + 1) * (d - 1)
    return Params(dense=user + (items + 1) * d)


def count_flops(config: TwoTowerConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    fields, d = plan_flat(schema), config.width
    events = [field for sequence in schema.sequences for field in sequence.fields]
    trained = fields.user_trained or any(not field.is_dense for field in events)
    first = 2 * _user_width(schema) * (*config.hidden, d - 1)[0]
    item = 2 * fields.candidate_width * d
    return Flops(
        user=mlp_flops(_user_width(schema), (*config.hidden, d - 1)),
        candidate=item + 2 * d,
        user_unneeded=first * (not trained),
        candidate_unneeded=item * (not fields.candidate_trained),
    )


def size_space(schema: Schema, config: TwoTowerConfig, target_dense_params: float) -> Iterator[dict[str, Any]]:
    """Overrides (hidden) near the target, of a single layer."""

    def params(hidden: int) -> int:
        return count_params(dataclasses.replace(config, hidden=(hidden,)), schema).dense

    yield from ({"hidden": (hidden,)} for hidden in affine_widths(params, target_dense_params))


def _user_width(schema: Schema) -> int:
    """d_x."""
    return plan_flat(schema).user_width + sum(s.length * s.width for s in schema.sequences)


def _top(schema: Schema, config: TwoTowerConfig) -> int:
    """Width of h."""
    return config.hidden[-1] if config.hidden else _user_width(schema)


TWO_TOWER = RankerSpec(TwoTowerConfig, build, count_params, count_flops, size_space)
