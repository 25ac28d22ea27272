"""What a candidate finds in a history of content vectors: LEMUR's reader (arXiv 2511.10962)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.inputs.batch import CandidateInputs, UserInputs
from recscale.models.inputs.flat import FlatPlan
from recscale.models.layers.dense import FFN, SplitDense
from recscale.models.layers.matmul import contract

_INVISIBLE = -1e30


class Reader(nnx.Module):
    """What a candidate finds in a history: fields and h [R, S, W] -> [R, C, W].

    d*W + W + L*(2*W*F + F + W) parameters, d the width of all fields; 2*d*W + L*(4*S*W + 4*W*F) FLOPs per candidate,
    those of the user's fields per request.
    """

    def __init__(
        self, plan: FlatPlan, width: int, hidden: int, layers: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.plan, self.dtype, axes = plan, dtype, ("features", "embed")
        self.first = SplitDense(plan.user_width, plan.candidate_width, width, axes=axes, dtype=dtype, rngs=rngs)
        self.networks = nnx.List(FFN(width, hidden, dtype=dtype, rngs=rngs) for _ in range(layers))

    def encode_user(self, user: UserInputs) -> Float[Array, "R W"] | None:
        return self.first.encode_user(self.plan.join_user(user))

    def score(
        self, state: Array | None, candidates: CandidateInputs, h: Float[Array, "R S W"], valid: Bool[Array, "R S"]
    ) -> Float[Array, "R C W"]:
        x = self.plan.join_candidates(candidates)
        q = self.first.score(state, x).reshape(*x.shape[:2], -1)
        for network in self.networks:
            scores = contract("rcw,rsw->rcs", q, h, self.dtype).astype(jnp.float32)
            weights = jax.nn.softmax(jnp.where(valid[:, None], scores, _INVISIBLE))
            weights = jnp.where(valid[:, None], weights, 0.0)
            q = network(contract("rcs,rsw->rcw", weights, h, self.dtype))
        return q
