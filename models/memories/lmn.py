"""LMN, large memory network: a *reconstruction* (of arXiv 2502.05558, from which no equation is public).

Public are an abstract, an online test and descriptions by others: one slot table of million scale that all users share,
product-quantised keys, queries made from events and made user-specific, a Smooth-L1 memory loss that writes, padding
masked, loss = click + memory. Everything below is this file's; results of it are results of a reconstruction.

    q   [R,S,2,p] = LN(W_q [x_s ; e_u])                       query_mode="item_only": W_q x_s
    r   [R,S,d]   = read(q), nothing for padded events        once per request, in `encode_user`
    u   [R,C,d]   = sum_s softmax_s((W_a e_i) . r_s / sqrt d) r_s     pool="mean": the mean over events, per request
    r_i [R,C,d]   = read(LN(W_q [e_i ; e_u]))                 read_from: "sequence" u alone, "target" r_i alone, "both"
    logit         = MLP[e_u ; e_i ; c ; DIN(x, e_i) ; u ; r_i]
    L_mem         = mean over requests of sum_s valid SmoothL1(r_s, target_s) / sum valid;    loss = task + lambda L_mem

x_s: the event fields that the candidate has too, e_i: those fields of the candidate (candidate="project": whole events,
and all candidate fields projected to their width); a_s: the other event fields (what the user did); e_u: user fields.

    target   fixed     W_t [x_s ; e_u ; a_s], W_t orthonormal, never trained (default)
             learned   W_t is trained. With it values and W_t can shrink together to 0, so the variance of the target is
                       watched: at a tenth of its first value the loss becomes NaN and the run counts as diverged
                       (batches of fewer than 8 events are not judged)
             event     x_s itself, d is its width
             target_gradient=False: constants; True lets the loss move the embeddings towards the reads as well
    memory_loss_to    all: the loss reaches values, queries, keys and embeddings; values: only the values

A request without events contributes 0 to L_mem, and reads nothing. memory_weight=0 is the control without the loss.

Letters: R requests, C candidates, S events, H memory heads, K slots per head, n sub-keys per axis, M = n*n slots, p key
width, d value width; A event width of DIN, A_x of x_s, A_a of a_s, A_u of e_u, d_c of all candidate fields; F1, F2 ...

Closed forms, W = A_x + A_u: memory, DIN and MLP have their own;    + A_x*d (attention)  + d_c*A_x + A_x (project)
    per request   S*(4*W*p*H + 4*n*p*H + 2*H*K*d) + 2*A_u*F1 + DIN's; training + 2*S*(W + A_a)*d for the target
    per candidate 2*(d_c + A + d + d)*F1 + rest of the MLP + DIN's + 2*A_x*d + 4*S*d (attention) + one read (r_i)

Undisclosed -> flag (default): all of it. The defaults are small; preset `lmn_million` has M = 2^20, K = 16, p = d = 64.
value_width None is p (x_s's width for target="event"). Flags of the memory: see `MemoryOptions`; only additive scores
and bags, no batch norm (`encode_user` does not know whether it trains), nothing per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from recscale.models.architecture import RankerSpec, builder
from recscale.models.baselines import din
from recscale.models.baselines.encoding import masked_softmax
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import find_history, read_history
from recscale.models.inputs.schema import Schema
from recscale.models.layers import param
from recscale.models.layers.dense import MLP, Dense, SplitDense, mlp_flops, mlp_params
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import activation
from recscale.models.layers.towers import Towers, tower_flops, tower_params
from recscale.models.options import group_of
from recscale.models.ranker import Ranker
from recscale.models.sizing import dense_params, mlp_widths

from .lmn_plan import LMNConfig, LMNOptions, LMNPlan, plan_lmn
from .options import memory_flops, memory_params
from .product_key_memory import ProductKeyMemory
from .usage import read_stats
from .value_table import Constant

# Share of its first variance at which a learned target counts as collapsed, and the fewest events of a batch whose
# variance is looked at: that of one event is 0, of a few it is what they happen to be.
_COLLAPSED, _JUDGED = 0.1, 8


class Reference(nnx.Variable):
    """The first variance of a learned target; 0 before there was one. State of training."""


class _Read(NamedTuple):
    """y [R, S, d]; slots int32 [R, S, J]; weights [R, S, H, K]."""

    y: Array
    slots: Array
    weights: Array


class LMNState(NamedTuple):
    """Kept per request: the user half of the first layer, DIN's cache, e_u, x and a of the events, and their reads."""

    first: Array | None
    din: Any
    user: Array | None
    items: Array
    actions: Array
    valid: Array
    read: _Read | None


class LMN(Ranker):
    """A reconstruction: the history of `plan.events` and the target read in one memory, DIN beside it, an MLP on top.

    Args:
        plans: from `plan_lmn`, and of DIN. tasks: Y.
    """

    def __init__(
        self,
        plans: tuple[LMNPlan, din.DINPlan],
        tasks: int,
        options: LMNConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        (plan, reads), widths, tower = plans, options.widths, options.tower
        self.plan, self.din, self.dtype = plan, din.DIN(reads, _din_config(options), dtype=dtype, rngs=rngs), dtype
        self.options = group_of(options, LMNOptions)
        init, A_x, d, project, attends = options.init, plan.item_width, plan.value_width, plan.project, options.attends
        axes = ("features", "embed")
        fields = plan.flat.candidate_width
        self.project = Dense(fields, A_x, axes=axes, init=init, dtype=dtype, rngs=rngs) if project else None
        self.memory = ProductKeyMemory(1, _query_inputs(plan, options), plan.memory, dtype=dtype, rngs=rngs)
        pool = None
        if attends:
            pool = Dense(A_x, d, use_bias=False, axes=("embed", "key"), init=init, dtype=dtype, rngs=rngs)
        self.pool = pool
        learned = options.memory_weight > 0 and options.target == "learned"
        fixed = options.memory_weight > 0 and options.target == "fixed"
        self.target = _target_matrix(plan, trained=learned, rngs=rngs) if learned or fixed else None
        self.reference = Reference(jnp.zeros(())) if learned else None
        user, candidate = _first_inputs(plan, options, reads.events.width)
        self.first = SplitDense(user, candidate, widths[0], init=init, dtype=dtype, rngs=rngs)
        self.rest = MLP(widths[0], widths[1:], activation=options.activation, init=init, dtype=dtype, rngs=rngs)
        self.towers = Towers(widths[-1], tasks, tower=tower, init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs) -> LMNState:
        view = read_history(find_history(user, self.plan.events.sequence), self.plan.events.length)
        items, actions = self.plan.split(view.events)
        e_u, read = self.plan.flat.join_user(user), None
        if self.options.reads_sequence:
            read = self._read(items, e_u, view.valid)
        half = [] if e_u is None else [e_u.astype(self.dtype)]
        if read is not None and self.pool is None:
            count = jnp.maximum(jnp.sum(view.valid, axis=1), 1)[:, None].astype(self.dtype)
            half.append(jnp.sum(read.y, axis=1) / count)
        first = self.first.encode_user(jnp.concatenate(half, axis=-1) if half else None)
        return LMNState(first, self.din.encode_user(user).cache, e_u, items, actions, view.valid, read)

    def score(self, state: LMNState, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        fields = self.plan.flat.join_candidates(candidates)
        item, stats = self._item(candidates, fields), {}
        half = [fields, self.din.candidate_tokens(state.din, candidates)[:, :, 0]]
        if self.pool is not None:
            half.append(self._attend(item, state))
        if self.options.reads_target:
            found = self._read(item, state.user, candidates.valid)
            half.append(found.y)
            stats |= self._stats("memory_target", found)
        h = self.first.score(state.first, jnp.concatenate([part.astype(self.dtype) for part in half], axis=-1))
        logits = self.towers(self.rest(activation(self.options.activation)(h)))
        losses, read = {}, state.read
        if candidates.valid is not None:  # what padded requests remember counts nowhere
            real = candidates.valid.any(axis=1)
            state = state._replace(valid=state.valid & real[:, None])
            read = None if read is None else _of_requests(read, real)
        else:
            real = jnp.ones(fields.shape[0], bool)
        if key is not None and self.options.memory_weight:
            if read is None:
                read = self._read(state.items, state.user, state.valid)
            raw, variance = self._memory_loss(state, read, real)
            losses["memory"] = self.options.memory_weight * raw
            stats |= {"memory_loss": raw, "log_target_variance": jnp.log(jnp.maximum(variance, 1e-30))}
        if read is not None:
            stats |= self._stats("memory", read)
        return Output(logits=logits.reshape(*fields.shape[:2], -1), losses=losses, stats=stats)

    def fold(self) -> None:
        """Folds over-parameterised keys into constants, for serving."""
        self.memory.fold()

    def _item(self, candidates: CandidateInputs, fields: Array) -> Array:
        """e_i [R, C, A_x]."""
        if self.project is not None:
            return self.project(fields)
        return jnp.concatenate([candidates.fields[name] for _, name in self.plan.parts if name], axis=-1)

    def _read(self, x: Array, e_u: Array | None, valid: Array | None) -> _Read:
        """Reads for x [R, S, A_x] (events, or candidates in their place) of users e_u [R, A_u]."""
        R, S = x.shape[:2]
        if self.options.query_mode == "user":
            assert e_u is not None
            x = jnp.concatenate([x, jnp.broadcast_to(e_u[:, None], (R, S, e_u.shape[-1]))], axis=-1)
        found = self.memory(x.reshape(1, R * S, -1), valid=None if valid is None else valid.reshape(1, -1))
        weights = found.weights.reshape(R, S, *found.weights.shape[1:])
        return _Read(found.y.reshape(R, S, -1), found.slots.reshape(R, S, -1), weights)

    def _attend(self, item: Array, state: LMNState) -> Array:
        """u [R, C, d], 0 for a request without events."""
        assert self.pool is not None and state.read is not None
        q, y, visible = self.pool(item), state.read.y, state.valid[:, None]
        scores = contract("rcd,rsd->rcs", q, y, self.dtype).astype(jnp.float32) * y.shape[-1] ** -0.5
        return contract("rcs,rsd->rcd", masked_softmax(scores, visible), y, self.dtype)

    def _memory_loss(self, state: LMNState, read: _Read, real: Array) -> tuple[Array, Array]:
        """L_mem without its weight, and the variance of the target over valid events."""
        y = read.y.astype(jnp.float32)
        if self.options.memory_loss_to == "values":
            slots, weights = (part.reshape(-1, read.slots.shape[-1]) for part in (read.slots, read.weights))
            y = self.memory.values.sum(slots, jax.lax.stop_gradient(weights)).reshape(y.shape)
        target = self._targets(state)
        each = jnp.abs(y - target)
        each = jnp.mean(jnp.where(each < 1.0, 0.5 * jnp.square(each), each - 0.5), axis=-1)
        valid = state.valid.astype(jnp.float32)
        own = jnp.sum(valid * each, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1.0)
        loss = jnp.sum(own) / jnp.maximum(jnp.sum(real), 1)
        variance = _variance(jax.lax.stop_gradient(target), valid)
        if self.reference is not None:
            judged = jnp.sum(valid) >= _JUDGED
            first = jnp.where(judged & (self.reference[...] == 0), variance, self.reference[...])
            self.reference.set_value(first)
            loss = jnp.where(judged & (variance < _COLLAPSED * first), jnp.nan, loss)
        return loss, variance

    def _targets(self, state: LMNState) -> Array:
        """target [R, S, d], float32."""
        written = state.items
        if self.target is not None:
            user = [] if state.user is None else [state.user]
            lead = state.items.shape[:2]
            user = [jnp.broadcast_to(e[:, None], (*lead, e.shape[-1])) for e in user]
            written = jnp.concatenate([state.items, *user, state.actions], axis=-1)
        written = written if self.options.target_gradient else jax.lax.stop_gradient(written)
        if self.target is None:
            return written.astype(jnp.float32)
        return contract("rsa,ad->rsd", written, self.target[...], jnp.float32)

    def _stats(self, name: str, read: _Read) -> dict[str, Array]:
        J, (H, K) = read.slots.shape[-1], read.weights.shape[-2:]
        found = read_stats(read.slots.reshape(-1, J), read.weights.reshape(-1, H, K), self.memory.slots)
        return {f"{name}/{key}": value for key, value in found.items()}


def _of_requests(read: _Read, real: Array) -> _Read:
    """A read without those of requests that are padding; real: bool [R]."""
    slots = jnp.where(real[:, None, None], read.slots, -1)
    return _Read(read.y, slots, jnp.where(real[:, None, None, None], read.weights, 0.0))


def _variance(target: Array, valid: Array) -> Array:
    """Mean over features of the variance over valid events."""
    weight, count = valid[..., None], jnp.maximum(jnp.sum(valid), 1.0)
    mean = jnp.sum(weight * target, axis=(0, 1), keepdims=True) / count
    return jnp.mean(jnp.sum(weight * jnp.square(target - mean), axis=(0, 1)) / count)


def _target_matrix(plan: LMNPlan, *, trained: bool, rngs: nnx.Rngs) -> nnx.Variable:
    """W_t [A_x + A_u + A_a, d] with orthonormal columns (rows, where it is wider than high)."""
    shape = (plan.item_width + plan.flat.user_width + plan.action_width, plan.value_width)
    value = jax.nn.initializers.orthogonal()(rngs.params(), shape, jnp.float32)
    if not trained:
        return Constant(value)
    learned = param.matrix(value, ("features", "embed"))
    learned.set_metadata(training_only=True)
    return learned


def _query_inputs(plan: LMNPlan, options: LMNOptions) -> int:
    """W: width of what a query is made of."""
    return plan.item_width + (plan.flat.user_width if options.query_mode == "user" else 0)


def _first_inputs(plan: LMNPlan, options: LMNOptions, din_width: int) -> tuple[int, int]:
    """Widths of the user half and the candidate half of the MLP's input."""
    d, reads = plan.value_width, options.reads_target + options.attends
    return plan.flat.user_width + d * options.averages, plan.flat.candidate_width + din_width + d * reads


def _din_config(config: LMNConfig) -> din.DINConfig:
    return din.DINConfig(
        hidden=config.din_hidden,
        sequence=config.sequence,
        recent=config.recent,
        time_feature=config.time_feature,
        candidate=config.candidate,
        init=config.init,
    )


def _plans(config: LMNConfig, schema: Schema) -> tuple[LMNPlan, din.DINPlan]:
    return plan_lmn(schema, config), din.plan_din(_din_config(config), schema)


def count_params(config: LMNConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree, values of the memory included."""
    plan, din_width = plan_lmn(schema, config), din.token_shape(_din_config(config), schema).width
    A_x, d, F1, Y = plan.item_width, plan.value_width, config.widths[0], len(schema.tasks)
    head = tower_params(config.widths[-1], Y, config.tower)
    dense = (sum(_first_inputs(plan, config, din_width)) + 1) * F1 + mlp_params(F1, config.widths[1:]) + head
    dense += A_x * d if config.attends else 0
    dense += (plan.flat.candidate_width + 1) * A_x if plan.project else 0
    learned = (A_x + plan.flat.user_width + plan.action_width) * d
    learned *= config.target == "learned" and config.memory_weight > 0
    total = Params(dense=dense, head=head, training_only=learned)
    total += memory_params(plan.memory, 1, _query_inputs(plan, config))
    return total + din.count_params(_din_config(config), schema)


def count_flops(config: LMNConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, din_width = plan_lmn(schema, config), din.token_shape(_din_config(config), schema).width
    A_x, d, S, F1 = plan.item_width, plan.value_width, plan.events.length, config.widths[0]
    user, candidate = (2 * width * F1 for width in _first_inputs(plan, config, din_width))
    needed = plan.flat.user_trained or config.averages
    total = Flops(user=user, user_unneeded=user * (not needed), candidate=candidate)
    total += Flops(candidate=mlp_flops(F1, config.widths[1:]))
    total += Flops(candidate=tower_flops(config.widths[-1], len(schema.tasks), config.tower))
    if plan.project:
        product = 2 * plan.flat.candidate_width * A_x
        total += Flops(candidate=product, candidate_unneeded=product * (not plan.flat.candidate_trained))
    if config.attends:
        product = 2 * A_x * d
        total += Flops(candidate=product + 4 * S * d, candidate_unneeded=product * (not plan.matched_trained))
    return (
        total + _read_flops(plan, config) + _target_flops(plan, config) + din.count_flops(_din_config(config), schema)
    )


def _read_flops(plan: LMNPlan, config: LMNConfig) -> Flops:
    """The reads of the events per request, of the target per candidate."""
    S, W = plan.events.length, _query_inputs(plan, config)
    read, own_user = memory_flops(plan.memory, 1, W), config.query_mode == "user" and plan.flat.user_trained
    hidden = (config.query_hidden or W) if config.query == "mlp" else plan.memory.query_heads * 2 * config.key_width
    # The first product of the query has a gradient of its input only if that is trained.
    raw = 2 * W * hidden * (config.addressing == "learned")
    lost = read.candidate_unneeded + raw * (not (plan.items_trained or own_user))
    total = Flops()
    if config.reads_target:
        unneeded = read.candidate_unneeded + raw * (not (plan.matched_trained or own_user))
        total += Flops(candidate=read.candidate, candidate_unneeded=unneeded)
        total += Flops(step=read.step, step_unneeded=read.step_unneeded)
    if config.reads_sequence:
        total += Flops(user=S * read.candidate, user_unneeded=S * lost)
        return total + Flops(step=read.step, step_unneeded=read.step_unneeded)
    if not config.memory_weight:
        return total
    if config.memory_loss_to == "values":
        # Read forward alone; the loss reads the same slots again.
        total += Flops(user_training=S * read.candidate, user_unneeded=2 * S * read.candidate)
        return total + Flops(step_training=read.step, step_unneeded=2 * read.step)
    total += Flops(user_training=S * read.candidate, user_unneeded=S * lost)
    return total + Flops(step_training=read.step, step_unneeded=read.step_unneeded)


def _target_flops(plan: LMNPlan, config: LMNConfig) -> Flops:
    """What the memory loss adds to training."""
    if not config.memory_weight:
        return Flops()
    S, d, total = plan.events.length, plan.value_width, Flops()
    if config.memory_loss_to == "values":
        total += Flops(user_training=2 * S * config.memory_heads * config.memory_topk * d)
    if config.target == "event":
        return total
    inputs = plan.item_width + plan.flat.user_width + plan.action_width
    product = 2 * S * inputs * d
    trained = plan.items_trained or plan.actions_trained or plan.flat.user_trained
    gradients = (config.target == "learned") + (config.target_gradient and trained)
    return total + Flops(user_training=product, user_unneeded=(2 - gradients) * product)


def size_space(schema: Schema, config: LMNConfig, target_dense_params: float) -> Iterator[dict[str, Any]]:
    """Overrides (widths) near the target, values included; the memory and DIN stay as configured."""
    params = dense_params(count_params, config, schema)
    yield from mlp_widths(params, len(config.widths), target_dense_params)


LMN_SPEC = RankerSpec(LMNConfig, builder(LMN, _plans), count_params, count_flops, size_space)
