"""One hidden layer on all inputs side by side."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import Output
from recscale.models.inputs.flat import plan_flat
from recscale.models.ranker import NO_TOKENS, Backbone


@dataclasses.dataclass(frozen=True)
class OneLayerConfig:
    """hidden: width of the layer."""

    hidden: int = 8


class OneLayer(Backbone):
    """inputs [R, C, d] -> relu(x W + b) V + c, logits [R, C, Y]."""

    def __init__(self, plan, hidden, tasks, *, rngs, dtype):
        self.plan = plan
        self.inward = nnx.Linear(plan.width, hidden, dtype=dtype, rngs=rngs)
        self.outward = nnx.Linear(hidden, tasks, dtype=dtype, rngs=rngs)

    def encode_user(self, user, tokens=None):
        return self.plan.join_user(user, tokens)

    def score(self, state, candidates, tokens=None, *, key=None):
        x = self.plan.join_candidates(candidates, tokens)
        if state is not None:
            x = jnp.concatenate([jnp.broadcast_to(state[:, None], (*x.shape[:2], state.shape[-1])), x], axis=-1)
        return Output(logits=self.outward(jax.nn.relu(self.inward(x))).astype(jnp.float32))


def build(config, schema, tokens=NO_TOKENS, *, rngs, dtype=jnp.float32):
    return OneLayer(plan_flat(schema, tokens), config.hidden, len(schema.tasks), rngs=rngs, dtype=dtype)


def count_params(config, schema, tokens=NO_TOKENS):
    width, tasks = plan_flat(schema, tokens).width, len(schema.tasks)
    head = (config.hidden + 1) * tasks
    return Params(dense=(width + 1) * config.hidden + head, head=head)


def count_flops(config, schema, tokens=NO_TOKENS):
    return Flops(candidate=2 * config.hidden * (plan_flat(schema, tokens).width + len(schema.tasks)))


def size_space(schema, config, target_dense_params, tokens=NO_TOKENS):
    each = count_params(OneLayerConfig(1), schema, tokens).dense
    yield {"hidden": max(1, round(target_dense_params / each))}


ONE_LAYER = BackboneSpec(OneLayerConfig, build, count_params, count_flops, size_space)
