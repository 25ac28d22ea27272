"""One training step of a group: P replicas (learning rate x seed) of one shape, one program, one batch for all.

Every array of the state has a leading replica axis except the step counter. Replicas see the same batches, so their
differences are paired; a replica whose loss is not finite stops being updated and the others go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from ... import models
from ...models.inputs import Batch, Schema
from ...models.inputs.tables import EmbeddingTables, embed, find_touched, gather_touched, table_lookup, touched_lookup
from ...models.layers.losses import masked_bce
from ..data.source import Source
from . import optimizers, row_updates, schedule

# Independent random streams of one replica's seed.
_MODEL_STREAM, _TABLE_STREAM, _DROPOUT_STREAM = 0, 1, 2


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes. P = replicas.

    step: int32, global step = index of the next batch; params: dense parameters [P, ...]; other: remaining variables
    [P, ...]; moments: optax state [P, ...]; tables: name -> [P, V, width]; slots: name -> row optimiser state;
    rate: float32 [P] peak rates; decay_from, decay_steps: int32, where this segment decays;
    seed: uint32 [P]; alive: bool [P]; failed_at: int32 [P], step of the first non-finite loss, -1 if none.
    """

    step: jax.Array
    params: Any
    other: Any
    moments: Any
    tables: dict[str, jax.Array]
    slots: dict[str, dict[str, jax.Array]]
    rate: jax.Array
    seed: jax.Array
    decay_from: jax.Array
    decay_steps: jax.Array
    alive: jax.Array
    failed_at: jax.Array


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Numbers the step is compiled with."""

    optimizer: optax.GradientTransformation
    embedding_optimizer: str
    embedding_rate: float
    embedding_eps: float
    embedding_init_std: float
    warmup: int
    decay_shape: str


class Trainer:
    """Compiled functions of one group.

    Args:
        architecture, model_config: registry name and its configuration.
        source: batches and schema.
        seeds, rates: one entry per replica, equal lengths P.
        options: optimisers and schedule.
        mesh: a mesh with axis "data" shards the requests of every batch; None runs on one device.
    """

    def __init__(
        self,
        architecture: str,
        model_config: Any,
        source: Source,
        seeds: Sequence[int],
        rates: Sequence[float],
        options: StepOptions,
        mesh: jax.sharding.Mesh | None = None,
    ):
        if len(seeds) != len(rates):
            raise ValueError(f"{len(seeds)} seeds but {len(rates)} rates; a replica needs one of each")
        self.source, self.options, self.mesh = source, options, mesh
        self.schema: Schema = source.schema
        self.seeds, self.rates = tuple(seeds), tuple(rates)
        self._build = lambda rngs: models.build(architecture, self.schema, model_config, rngs=rngs)
        abstract = nnx.eval_shape(lambda: self._build(nnx.Rngs(0)))
        self._graphdef = nnx.split(abstract, nnx.Param, ...)[0]
        self._task_weights = tuple(task.weight for task in self.schema.tasks)
        replicated = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        sharding = {} if replicated is None else {"out_shardings": replicated}
        # Random draws of every parameter in one program: LLVM's optimiser takes a minute over it on a CPU (51 s against
        # 3 s measured on one core), and it runs once.
        quick = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
        self._init = jax.jit(self._initial_state, compiler_options=quick, **sharding)
        self._step = jax.jit(self._train_step, donate_argnums=0, **sharding)
        self._logits = jax.jit(self._eval_logits, **sharding)

    def fresh_state(self) -> TrainState:
        """The state before the first step; replica p depends on seeds[p] and rates[p] alone."""
        return self._init(jnp.asarray(self.seeds, jnp.uint32), jnp.asarray(self.rates, jnp.float32))

    def step(self, state: TrainState, batch: Batch | None = None) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from batch `state.step`. On-device sources generate it inside; host sources pass it in.

        Returns the new state (the old one is donated) and metrics of the batch scored *before* the update:
        loss [P], logloss [P, Y], prediction [P, Y] and label [Y] means, rate [P].
        """
        return self._step(state, batch)

    def holdout_logits(self, state: TrainState) -> np.ndarray:
        """Logits of the source's holdout: float32 [P, number of batches, R, C, Y] on the host."""
        parts = []
        for batch in self.source.holdout():
            batch = jax.device_put(batch) if self.mesh is None else shard_batch(batch, self.mesh)
            parts.append(self._logits(state.params, state.other, state.tables, batch))
        return np.stack(jax.device_get(parts), axis=1)

    def _initial_state(self, seeds: jax.Array, rates: jax.Array) -> TrainState:
        options = self.options

        def one(seed):
            key = jax.random.key(seed)
            model = self._build(nnx.Rngs(params=jax.random.fold_in(key, _MODEL_STREAM)))
            _, params, other = nnx.split(model, nnx.Param, ...)
            rngs = nnx.Rngs(params=jax.random.fold_in(key, _TABLE_STREAM))
            tables = EmbeddingTables(self.schema, rngs=rngs, init_std=options.embedding_init_std).tables
            tables = {name: table[...] for name, table in tables.items()}
            slots = {n: row_updates.init_slots(options.embedding_optimizer, t) for n, t in tables.items()}
            return params, other, options.optimizer.init(params), tables, slots

        params, other, moments, tables, slots = jax.vmap(one)(seeds)
        replicas = rates.shape[0]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            other=other,
            moments=moments,
            tables=tables,
            slots=slots,
            rate=rates,
            seed=seeds,
            decay_from=jnp.full((), schedule.NEVER, jnp.int32),
            decay_steps=jnp.ones((), jnp.int32),
            alive=jnp.ones(replicas, bool),
            failed_at=jnp.full(replicas, -1, jnp.int32),
        )

    def _train_step(self, state: TrainState, batch: Batch | None):
        options = self.options
        if batch is None:
            batch = self.source.batch(state.step)
            if self.mesh is not None:
                spec = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec("data"))
                batch = jax.lax.with_sharding_constraint(batch, spec)
        touched = find_touched(self.schema, batch)
        vectors = jax.vmap(gather_touched, in_axes=(0, None), axis_size=state.rate.shape[0])(state.tables, touched)
        graded = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)
        graded = _map_replicas(graded, (0, 0, 0, 0, None, None, None), state.rate.shape[0])
        (loss, aux), (grads, row_grads) = graded(
            state.params, vectors, state.other, state.seed, state.step, batch, touched
        )
        other, metrics = aux
        alive = state.alive & jnp.isfinite(loss)
        factor = schedule.rate_factor(
            state.step, state.decay_from, state.decay_steps, options.warmup, options.decay_shape
        )
        rate = state.rate * factor

        updates, moments = jax.vmap(options.optimizer.update)(grads, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p - _per_replica(alive, rate, u), state.params, updates)
        tables, slots = {}, {}
        for name in state.tables:
            update = jax.vmap(
                lambda table, slot, rows, grad, active, t=touched[name]: row_updates.update_rows(
                    options.embedding_optimizer,
                    table,
                    slot,
                    t,
                    rows,
                    grad,
                    options.embedding_rate * factor,
                    active=active,
                    eps=options.embedding_eps,
                )
            )
            tables[name], slots[name] = update(
                state.tables[name], state.slots[name], vectors[name], row_grads[name], alive
            )
        new = state.replace(
            step=state.step + 1,
            params=params,
            other=other,
            moments=moments,
            tables=tables,
            slots=slots,
            alive=alive,
            failed_at=jnp.where(state.alive & ~alive, state.step, state.failed_at),
        )
        metrics = {**metrics, "loss": loss, "rate": rate, "alive": alive, "failed_at": new.failed_at}
        return new, metrics

    def _loss(self, params, vectors, other, seed, step, batch: Batch, touched):
        """Task loss plus auxiliary losses of one replica, and (new other variables, metrics)."""
        model = nnx.merge(self._graphdef, params, other)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT_STREAM), step)
        output = model(embed(self.schema, batch, touched_lookup(vectors, touched)), key=key)
        mask = batch.label_mask * batch.valid[..., None]
        task_loss, per_task = masked_bce(output.logits, batch.labels, mask, self._task_weights)
        loss = task_loss + sum(output.losses.values(), jnp.zeros((), jnp.float32))
        observed = jnp.maximum(jnp.sum(mask, axis=(0, 1)), 1.0)
        metrics = {
            "logloss": per_task,
            "prediction": jnp.sum(jax.nn.sigmoid(output.logits) * mask, axis=(0, 1)) / observed,
            "label": jnp.sum(batch.labels * mask, axis=(0, 1)) / observed,
            "rows": jnp.sum(mask, axis=(0, 1)),
        }
        return loss, (nnx.split(model, nnx.Param, ...)[2], metrics)

    def _eval_logits(self, params, other, tables, batch: Batch) -> jax.Array:
        def one(params, other, tables):
            model = nnx.merge(self._graphdef, params, other)
            return model(embed(self.schema, batch, table_lookup(tables))).logits

        return jax.vmap(one)(params, other, tables)


def make_trainer(config: ConfigDict, source: Source, replicas: Sequence[tuple[int, float]], warmup: int) -> Trainer:
    """The compiled step functions of a configuration for (seed, rate) replicas."""
    t = config.training
    mesh = None
    if t.data_parallel:
        if source.requests % jax.local_device_count():
            raise ValueError(
                f"training.requests is {source.requests}, not divisible by {jax.local_device_count()} local devices"
            )
        mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = StepOptions(
        optimizer=optimizers.dense_optimizer(
            t.optimizer, b1=t.b1, b2=t.b2, eps=t.eps, weight_decay=t.weight_decay, clip_norm=t.clip_norm
        ),
        embedding_optimizer=t.embedding_optimizer,
        embedding_rate=t.embedding_lr,
        embedding_eps=t.embedding_eps,
        embedding_init_std=t.embedding_init_std,
        warmup=warmup,
        decay_shape="cosine" if t.schedule == "cosine" else t.decay_shape,
    )
    seeds, rates = zip(*replicas, strict=True)
    return Trainer(config.architecture, config.model, source, seeds, rates, options, mesh)


def shard_batch(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Puts a host batch on a mesh, requests split over axis "data"."""
    return jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))


def _map_replicas(function: Callable[..., Any], in_axes: tuple[int | None, ...], replicas: int) -> Callable[..., Any]:
    """vmap over the replica axis; a single replica runs without it.

    An axis of size 1 keeps XLA from folding transposes into the gradients' products: 5 % of a RankMixer step on CPU.
    """
    if replicas > 1:
        return jax.vmap(function, in_axes=in_axes)

    def single(*args: Any) -> Any:
        own = [jax.tree.map(lambda v: v[0], a) if axis == 0 else a for a, axis in zip(args, in_axes, strict=True)]
        return jax.tree.map(lambda v: v[None], function(*own))

    return single


def _per_replica(alive: jax.Array, rate: jax.Array, update: jax.Array) -> jax.Array:
    """rate * update per replica, 0 where the replica is dead (its update may be NaN)."""
    shape = (-1, *(1,) * (update.ndim - 1))
    return jnp.where(alive.reshape(shape), rate.reshape(shape) * update, 0.0)
