"""One training step of a group: P replicas (learning rate x seed) of one shape, one program, one batch for all.

Every array of the state has a leading replica axis except the step counter. Replicas see the same batches, so their
differences are paired; a replica whose loss is not finite stops being updated and the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Float, Num
from ml_collections import ConfigDict

from recscale import models
from recscale.models.inputs import Batch, Schema
from recscale.models.inputs.history import random_suffixes
from recscale.models.inputs.tables import (
    EmbeddingTables,
    embed,
    gather_touched,
    table_lookup,
    touched_lookup,
)
from recscale.models.layers.layout import laying_out
from recscale.models.layers.losses import training_loss
from recscale.models.layers.per_token_moe import TopKMoE
from recscale.pallas_kernels.dispatch import recording
from recscale.pallas_kernels.targets import partitioned
from recscale.scaling import parallel
from recscale.scaling.data.source import Recordable, Source
from recscale.scaling.resources import collective_bytes

from . import schedule
from .accumulation import check_parts, in_parts
from .rematerialisation import check_remat, rematerialise
from .replicas import finite, map_replicas, per_replica, take_turns
from .rows import memory_rows, row_updates
from .rows.memory_state import MemoryValues
from .rows.memory_usage import slot_counts
from .rows.touched_rows import touched_rows
from .step_options import StepOptions, step_options

# Independent random streams of one replica's seed.
_MODEL_STREAM, _TABLE_STREAM, _DROPOUT_STREAM, _SUFFIX_STREAM = 0, 1, 2, 3


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes. P = replicas.

    step: int32, global step = index of the next batch; params: dense parameters [P, ...]; other: remaining variables
    [P, ...]; moments: optax state [P, ...]; tables: name -> [P, V, width]; slots: name -> row optimiser state;
    values, value_slots: the same of memory layers, name -> [P, M, d];
    rate: float32 [P] peak rates; decay_from, decay_steps: int32, where this segment decays;
    seed: uint32 [P]; alive: bool [P]; failed_at: int32 [P], step of the first non-finite loss, -1 if none.
    """

    step: jax.Array
    params: Any
    other: Any
    moments: Any
    tables: dict[str, jax.Array]
    slots: dict[str, dict[str, jax.Array]]
    values: dict[str, jax.Array]
    value_slots: dict[str, dict[str, jax.Array]]
    rate: jax.Array
    seed: jax.Array
    decay_from: jax.Array
    decay_steps: jax.Array
    alive: jax.Array
    failed_at: jax.Array


class Trainer:
    """Compiled functions of one group.

    Args:
        architecture, model_config: registry name and its configuration.
        source: batches and schema.
        seeds, rates: one entry per replica, equal lengths P.
        options: optimisers and schedule.
        mesh: splits requests and state over devices by the rules of `recscale.scaling.parallel`; None runs on one.
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
        self._graphdef = nnx.split(abstract)[0]
        layers = [layer for _, layer in nnx.iter_graph(abstract) if isinstance(layer, TopKMoE)]
        # Rows that the experts of a layer compute in a step, see `TopKMoE.places`.
        self.expert_places = layers[0].places(source.requests * source.candidates) if layers else None
        self._memory = MemoryValues(abstract, options.values)
        check_remat(abstract, options.remat, self._memory.rows)
        check_parts(options.accumulate, self._memory.rows)
        alone = self.mesh is None and not self._memory.present  # values of a memory would be copied for it
        self._one_by_one = alone and take_turns(abstract)
        self._task_weights = tuple(task.weight for task in self.schema.tasks)
        # What served the operations of the compiled functions, and why: operation -> {implementation: reason}.
        self.kernels: dict[str, dict[str, str]] = {}
        # Random draws of every parameter in one program: LLVM's optimiser takes a minute over it on a CPU (51 s against
        # 3 s measured on one core), and it runs once.
        quick = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
        self._init = jax.jit(self._initial_state, compiler_options=quick)
        of_state = of_step = of_output = None  # the compiler's choice
        if mesh is not None:
            of_output = parallel.replicated(mesh)
            of_state = jax.tree.map(lambda array: array.sharding, self.state_shapes())
            of_step = (of_state, of_output)
            self._placed_init = jax.jit(self._initial_state, out_shardings=of_state, compiler_options=quick)
        self._step = _jit(self._on_mesh(self._train_step), of_step, donate_argnums=0)
        self._steps = _jit(self._many_steps, of_step, donate_argnums=0, static_argnums=3)
        self._settle = _jit(self._all_paid, of_state)
        logits = functools.partial(self._evaluate, lambda output: output.logits)
        self._logits = _jit(self._on_mesh(logits), of_output)
        counts = functools.partial(self._evaluate, lambda output: slot_counts(output.stats))
        self._counts = _jit(self._on_mesh(counts), of_output)
        self._ran: tuple[Any, Any] | None = None  # the function that trained, and its arguments as shapes

    def state_shapes(self) -> TrainState:
        """The state as shapes alone; on a mesh each with the sharding it has there."""
        replicas = len(self.seeds)
        # Of the jitted function: it is traced once, for this and for the state itself.
        state = self._init.eval_shape(
            jax.ShapeDtypeStruct((replicas,), jnp.uint32), jax.ShapeDtypeStruct((replicas,), jnp.float32)
        )
        mesh = self.mesh
        if mesh is None:
            return state

        def rows(name: str, arrays: Any) -> Any:
            return jax.tree.map(lambda a: NamedSharding(mesh, parallel.table_spec(name, 1, a, mesh)), arrays)

        own = parallel.shardings(state, mesh).replace(
            tables=rows("rows", state.tables),
            slots=rows("rows", state.slots),
            values=rows("slots", state.values),
            value_slots=rows("slots", state.value_slots),
        )
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, own)

    @property
    def program(self) -> Any:
        """The jitted step itself, (state, batch or None) -> (state, metrics): to be traced with shapes alone."""
        return self._step

    def fresh_state(self) -> TrainState:
        """The state before the first step; replica p depends on seeds[p] and rates[p] alone."""
        draw = self._init if self.mesh is None else self._placed_init
        state = draw(np.asarray(self.seeds, np.uint32), np.asarray(self.rates, np.float32))
        # Bound to its device like the states that follow: jit compiles anew where some arguments are bound and some
        # are free.
        return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))

    def step(self, state: TrainState, batch: Batch | None = None) -> tuple[TrainState, dict[str, Any]]:
        """One update from batch `state.step`. On-device sources generate it inside; host sources pass it in.

        Returns the new state (the old one is donated) and metrics of the batch scored *before* the update:
        loss [P], logloss [P, Y], prediction [P, Y] and label [Y] means, rate [P], stats [P, ...]: all the model reports
        but the vectors over memory slots.
        """
        return self._run(self._step, state, batch)

    def steps(
        self, state: TrainState, count: int, room: int, record: Any | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """`count` updates in one program, of a source on the device; the same bits however steps are divided.

        Args:
            count: of steps, at most `room`. room: steps that the returned metrics have room for; compiled in.
            record: what the source recorded, to be replayed; None makes batches in the step.

        Returns the new state (the old one is donated) and the metrics of `step`, every one [room, ...]; those beyond
        `count` are zero.
        """
        count_there = parallel.put_everywhere(np.int32(count), state.step.sharding)
        return self._run(self._steps, state, count_there, record, room)

    def _run(self, function: Callable[..., Any], *args: Any) -> tuple[TrainState, dict[str, Any]]:
        self._ran = self._ran or (function, jax.tree.map(_as_shape, args))
        return function(*args)

    def settled(self, state: TrainState) -> TrainState:
        """The state to evaluate and to keep: no row of a table owes L2 any more."""
        return self._settle(state) if self.options.embedding_l2 else state

    def put(self, batch: Batch) -> Batch:
        """A host batch on the device, or on the mesh with its requests split; of several processes each gives its own
        share (`parallel.own_share`) or the whole."""
        if self.mesh is None:
            return jax.device_put(batch)
        return parallel.place_batch(batch, self.mesh, self.source.requests)

    def holdout_logits(self, state: TrainState) -> Float[np.ndarray, "P batches R C Y"]:
        """Logits of the source's holdout: float32 on the host."""
        parts = [self._device_logits(state, batch) for batch in self.source.holdout()]
        return np.stack(jax.device_get(parts), axis=1)

    def batch_logits(self, state: TrainState, batch: Batch) -> Float[np.ndarray, "P R C Y"]:
        """Logits of one host batch: float32 on the host."""
        return np.asarray(jax.device_get(self._device_logits(state, batch)))

    def _device_logits(self, state: TrainState, batch: Batch) -> jax.Array:
        return self._logits(state.params, state.values, state.other, state.tables, self.put(batch))

    def holdout_slot_counts(self, state: TrainState) -> Iterator[dict[str, Num[np.ndarray, "P M"]]]:
        """Hits and weights of every memory slot, batch by batch of the holdout; see `memory_usage`."""
        if not self._memory.present:
            return
        for batch in self.source.holdout():
            yield jax.device_get(self._counts(state.params, state.values, state.other, state.tables, self.put(batch)))

    @property
    def memory_sub_keys(self) -> int | None:
        """n of the model's memories, see `MemoryValues.sub_keys`."""
        return self._memory.sub_keys

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled | None:
        """The program that trained, looked up and not compiled again; None before the first step."""
        if self._ran is None:
            return None
        function, args = self._ran
        return function.lower(*args).compile()

    @property
    def communication(self) -> dict[str, int] | None:
        """{collective: bytes of its operands on a device, a step} as compiled for the mesh; {} on one device, None
        where nothing was trained."""
        if self.mesh is None:
            return {}
        text = None if self.compiled is None else self.compiled.as_text()
        return None if text is None else collective_bytes(text)

    def model_state(self, state: TrainState) -> tuple[Any, ...]:
        """The first replica's model as `nnx.merge` takes it."""
        params, values, other = jax.tree.map(lambda a: a[0], (state.params, state.values, state.other))
        return self._graphdef, params, self._memory.state(values), other

    def _on_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, traced knowing over how many devices XLA will split it; notes what serves its operations."""

        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            ways = 1 if self.mesh is None else self.mesh.size
            with partitioned(ways), laying_out(parallel.lay_out(self.mesh)), recording(self.kernels):
                return function(*args)

        return traced

    def _initial_state(self, seeds: jax.Array, rates: jax.Array) -> TrainState:
        options = self.options

        def one(seed):
            key = jax.random.key(seed)
            model = self._build(nnx.Rngs(params=jax.random.fold_in(key, _MODEL_STREAM)))
            _, params, values, other = self._memory.split(model)
            rngs = nnx.Rngs(params=jax.random.fold_in(key, _TABLE_STREAM))
            tables = EmbeddingTables(self.schema, rngs=rngs, init_std=options.embedding_init_std).arrays()
            l2 = options.embedding_l2 > 0
            slots = {n: row_updates.init_slots(options.embedding_optimizer, t, l2=l2) for n, t in tables.items()}
            return params, other, options.optimizer.init(params), tables, slots, values, self._memory.init_slots(values)

        params, other, moments, tables, slots, values, value_slots = jax.vmap(one)(seeds)
        replicas = rates.shape[0]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            other=other,
            moments=moments,
            tables=tables,
            slots=slots,
            values=values,
            value_slots=value_slots,
            rate=rates,
            seed=seeds,
            decay_from=jnp.full((), schedule.NEVER, jnp.int32),
            decay_steps=jnp.ones((), jnp.int32),
            alive=jnp.ones(replicas, bool),
            failed_at=jnp.full(replicas, -1, jnp.int32),
        )

    def _train_step(self, state: TrainState, given: Batch | None) -> tuple[TrainState, dict[str, Any]]:
        options = self.options
        batch: Batch = parallel.split_requests(self.source.batch(state.step), self.mesh) if given is None else given
        touched = touched_rows(self.schema, batch, self.mesh)
        vectors = jax.vmap(gather_touched, in_axes=(0, None), axis_size=state.rate.shape[0])(state.tables, touched)
        if options.embedding_l2:
            vectors = self._paid(vectors, state.slots, touched)
        varied, constant = self._memory_arguments(state, vectors, batch, touched)
        graded = jax.value_and_grad(self._loss, argnums=(0, 1, 2), has_aux=True)
        axes = (0, 0, 0, 0, 0, 0, None, None, None, None)
        graded = map_replicas(graded, axes, state.rate.shape[0], self._one_by_one)
        models, now = (state.params, vectors, varied, constant), (state.other, state.seed, state.step, batch, touched)
        if options.accumulate > 1:
            (loss, aux), (grads, row_grads, value_grads) = in_parts(graded, options.accumulate, models, *now)
        else:
            (loss, aux), (grads, row_grads, value_grads) = graded(*models, *now, None)
        other, metrics, reads, pending = aux
        alive = state.alive & jnp.isfinite(loss)
        if pending is not None:
            settle = map_replicas(self._settled, (0, 0, 0, 0, 0), state.rate.shape[0], self._one_by_one)
            other = settle(state.params, state.values, other, pending, alive & finite(grads))
        factor = schedule.rate_factor(
            state.step, state.decay_from, state.decay_steps, options.warmup, options.decay_shape
        )
        rate = state.rate * factor

        updates, moments = jax.vmap(options.optimizer.update)(grads, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p - per_replica(alive, rate, u), state.params, updates)
        tables, slots = self._updated_tables(state, touched, vectors, row_grads, factor, alive)
        value_rate = memory_rows.value_rate(options.values, state.rate, factor, state.step)
        values, value_slots = self._memory.update(
            state.values, state.value_slots, reads, value_grads, value_rate, state.step, alive & finite(grads)
        )
        metrics["stats"] |= self._memory.row_norms(values)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            other=other,
            moments=moments,
            tables=tables,
            slots=slots,
            values=values,
            value_slots=value_slots,
            alive=alive,
            failed_at=jnp.where(state.alive & ~alive, state.step, state.failed_at),
        )
        metrics = {**metrics, "loss": loss, "rate": rate, "alive": alive, "failed_at": new.failed_at}
        return new, metrics

    def _many_steps(self, state: TrainState, count: jax.Array, record: Any | None, room: int) -> Any:
        def batch(step: jax.Array) -> Batch | None:
            source = self.source
            return source.replay(record, step) if record is not None and isinstance(source, Recordable) else None

        def step(i: jax.Array, carry: Any) -> Any:
            state, kept = carry
            state, metrics = self._step(state, batch(state.step))
            kept = jax.tree.map(lambda k, m: jax.lax.dynamic_update_index_in_dim(k, m, i, 0), kept, metrics)
            return state, kept

        metrics = jax.eval_shape(lambda s: self._step(s, batch(s.step))[1], state)
        kept = jax.tree.map(lambda m: jnp.zeros((room, *m.shape), m.dtype), metrics)
        return jax.lax.fori_loop(0, count, step, (state, kept))

    def _paid(self, vectors, slots, touched) -> dict[str, jax.Array]:
        """The touched rows after the L2 they owe."""
        kind, o = self.options.embedding_optimizer, self.options

        def paid(rows, slots, touched):
            own = row_updates.take_slots(slots, touched)
            return row_updates.pay(kind, rows, own, l2=o.embedding_l2, eps=o.embedding_eps)

        each = jax.vmap(paid, in_axes=(0, 0, None))
        return {name: each(rows, slots[name], touched[name]) for name, rows in vectors.items()}

    def _all_paid(self, state: TrainState) -> TrainState:
        o = self.options
        pay = functools.partial(row_updates.pay_all, o.embedding_optimizer, l2=o.embedding_l2, eps=o.embedding_eps)
        both = {name: jax.vmap(pay)(table, state.slots[name]) for name, table in state.tables.items()}
        tables, slots = ({name: pair[k] for name, pair in both.items()} for k in (0, 1))
        return dataclasses.replace(state, tables=tables, slots=slots)

    def _updated_tables(self, state: TrainState, touched, vectors, grads, factor, alive) -> tuple[Any, Any]:
        """Every embedding table and its optimiser state after one step on the rows that the batch touched."""
        kind, eps = self.options.embedding_optimizer, self.options.embedding_eps
        rate, l2 = self.options.embedding_rate * factor, self.options.embedding_l2

        def update(table, slots, touched, rows, grad, active):
            return row_updates.update_rows(kind, table, slots, touched, rows, grad, rate, active=active, l2=l2, eps=eps)

        each = jax.vmap(update, in_axes=(0, 0, None, 0, 0, 0))
        new = {
            name: each(table, state.slots[name], touched[name], vectors[name], grads[name], alive)
            for name, table in state.tables.items()
        }
        return {name: table for name, (table, _) in new.items()}, {name: slots for name, (_, slots) in new.items()}

    def _memory_arguments(self, state: TrainState, vectors, batch: Batch, touched) -> tuple[Any, Any]:
        """What the loss is differentiated by to train memory values, and the values it takes as constants.

        Under row updates these are probes (zeros added to every read) and the values; under `dense_adam` the values
        themselves and nothing.
        """
        if not self._memory.rows:
            return state.values, {}

        def reads_of_one_replica():
            first = jax.tree.map(lambda v: v[0], (state.params, vectors, state.values, state.other, state.seed))
            params, own, values, other, seed = first
            return self._loss(params, own, None, values, other, seed, state.step, batch, touched)[1][2]

        return self._memory.probes(state.values, reads_of_one_replica), state.values

    def _loss(self, params, vectors, varied, constant, other, seed, step, batch: Batch, touched, shares=None):
        """Training loss of one replica, and (new other variables, metrics, reads of memory values, what is pending).

        varied, constant: see `_memory_arguments`. shares: of a part of a batch, see `in_parts`.
        """
        values = self._memory.state(constant if self._memory.rows else varied)
        # Copied: a model may assign its own variables, which has to happen inside this trace.
        model = nnx.merge(self._graphdef, params, values, other, copy=True)
        rematerialise(model, self.options.remat)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT_STREAM), step)
        inputs = embed(self.schema, batch, touched_lookup(vectors, touched))
        if self.options.suffix is not None:
            # Of the step alone: replicas go on seeing the same batches.
            suffix_key = jax.random.fold_in(jax.random.key(_SUFFIX_STREAM), step)
            shortened = random_suffixes(inputs.user, suffix_key, *self.options.suffix)
            inputs = dataclasses.replace(inputs, user=shortened)
        with self._memory.recording(model, varied) as reads:
            output = model(inputs, key=key)
        mask = batch.label_mask * batch.valid[..., None]
        weights = self._task_weights
        if shares is not None:
            weights = tuple(weight * share for weight, share in zip(weights, shares, strict=True))
        loss, per_task = training_loss(output, batch.labels, mask, weights)
        observed = jnp.maximum(jnp.sum(mask, axis=(0, 1)), 1.0)
        metrics = {
            "logloss": per_task,
            "prediction": jnp.sum(jax.nn.sigmoid(output.logits) * mask, axis=(0, 1)) / observed,
            "label": jnp.sum(batch.labels * mask, axis=(0, 1)) / observed,
            "rows": jnp.sum(mask, axis=(0, 1)),
            "stats": {name: value for name, value in output.stats.items() if name not in slot_counts(output.stats)},
        }
        return loss, (self._memory.split(model)[3], metrics, reads, output.pending)

    def _settled(self, params, values, other, pending, ok) -> Any:
        """The other variables of one replica after its model was told that the step is over."""
        model = nnx.merge(self._graphdef, params, self._memory.state(values), other, copy=True)
        model.settle(pending, ok)
        return self._memory.split(model)[3]

    def _evaluate(self, of: Callable[..., Any], params, values, other, tables, batch: Batch) -> Any:
        """`of` the output of every replica."""

        def one(params, values, other, tables):
            model = nnx.merge(self._graphdef, params, self._memory.state(values), other)
            return of(model(embed(self.schema, batch, table_lookup(tables))))

        return jax.vmap(one)(params, values, other, tables)


def make_trainer(
    config: ConfigDict,
    source: Source,
    replicas: Sequence[tuple[int, float]],
    warmup: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Trainer:
    """The compiled step functions of a configuration for (seed, rate) replicas, on `mesh` if one is given."""
    options = step_options(config.training, source.requests * source.candidates, warmup)
    seeds, rates = zip(*replicas, strict=True)
    return Trainer(config.architecture, config.model, source, seeds, rates, options, mesh)


def _jit(function: Callable[..., Any], out_shardings: Any, **options: Any) -> Any:
    """`jax.jit`; without `out_shardings` where they are None."""
    return jax.jit(function, **options, **({} if out_shardings is None else {"out_shardings": out_shardings}))


def _as_shape(leaf: Any) -> Any:
    """What stands for an argument of a jitted function when its program is looked up."""
    if not isinstance(leaf, jax.Array):
        return leaf
    bound = leaf.sharding if leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=bound, weak_type=leaf.weak_type)
