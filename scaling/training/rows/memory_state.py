"""The memory values of a model as a trainer holds them: named arrays beside the parameters, with their own updates.

Row updates differentiate with respect to probes, zeros added to what the tables gave, and never with respect to the
values; `dense_adam` differentiates the values themselves. A model without memories has no values and pays nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.inputs.tables import Table
from recscale.models.memories.product_key_memory import ProductKeyMemory
from recscale.models.memories.usage import row_norm_quantiles
from recscale.models.memories.value_table import RowRead, probe_shapes, recorded, row_grads, value_tables

from . import memory_rows
from .memory_rows import ValueOptions

Values = dict[str, jax.Array]
Reads = dict[str, list[RowRead]]


class MemoryValues:
    """Value tables of one kind of model, by the path of their module ("blocks/1/memory/values").

    Args:
        model: the model, abstract or not. options: how its values train.

    `present`: whether the model reads a memory at all, trained or frozen. `sub_keys`: n of its memories, None where
    they differ or an expansion permutes slots, so that rows and columns are no axes of the keys.
    """

    def __init__(self, model: nnx.Module, options: ValueOptions):
        self.options = options
        memories = [node for _, node in nnx.iter_graph(model) if isinstance(node, ProductKeyMemory)]
        self.present = bool(memories)
        sub_keys = {memory.n if memory.permutation is None else None for memory in memories}
        self.sub_keys = sub_keys.pop() if len(sub_keys) == 1 else None
        flat = nnx.to_flat_state(nnx.state(model, Table))
        self._template = {"/".join(map(str, path[:-1])): (path, variable) for path, variable in flat}
        if set(self._template) != set(value_tables(model)):
            raise ValueError(
                f"the model holds tables at {', '.join(self._template)} and value tables at "
                f"{', '.join(value_tables(model))}; a `Table` inside a model must belong to a `ValueTable`"
            )

    @property
    def rows(self) -> bool:
        """Whether there are values that train by touched-row updates."""
        return bool(self._template) and not self.options.dense

    def split(self, model: nnx.Module) -> tuple[Any, Any, Values, Any]:
        """(graph, parameters, values, everything else) of a model."""
        graph, params, tables, other = nnx.split(model, nnx.Param, Table, ...)
        named = {"/".join(map(str, path[:-1])): variable[...] for path, variable in nnx.to_flat_state(tables)}
        return graph, params, named, other

    def state(self, values: Values) -> nnx.State:
        """What `nnx.merge` takes, from named arrays."""
        return nnx.from_flat_state([(p, v.replace(values[name])) for name, (p, v) in self._template.items()])

    def init_slots(self, values: Values) -> dict[str, dict[str, jax.Array]]:
        return {name: memory_rows.init_slots(self.options, table) for name, table in values.items()}

    @contextlib.contextmanager
    def recording(self, model: nnx.Module, probes: Any) -> Iterator[Reads]:
        """Collects the reads of a model's tables while the block runs (nothing unless values train by rows)."""
        reads: Reads = {}
        if not self.rows:
            yield reads
            return
        with recorded(model, probes) as tapes:
            yield reads
        reads.update({name: tape.reads for name, tape in tapes.items()})

    def probes(self, values: Values, trace: Callable[[], Reads]) -> dict[str, list[jax.Array]]:
        """Zeros [P, ...] for every read `trace` records for one replica; nothing is computed."""
        if not self.rows:
            return {}
        found = {}
        for name, reads in jax.eval_shape(trace).items():
            replicas, _, width = values[name].shape
            found[name] = [jnp.zeros((replicas, *shape), jnp.float32) for shape in probe_shapes(reads, width)]
        return found

    def row_norms(self, values: Values) -> dict[str, jax.Array]:
        """Quantiles [P] of the norms of a sample of rows. Taken after an update: a read before it would be one more
        that XLA cannot place, and it would copy the table."""
        return {
            f"{name}/{quantile}": norm
            for name, table in values.items()
            for quantile, norm in jax.vmap(row_norm_quantiles)(table).items()
        }

    def update(
        self,
        values: Values,
        slots: dict[str, dict[str, jax.Array]],
        reads: Reads,
        grads: dict[str, Any],
        rate: jax.Array,
        step: jax.Array,
        alive: jax.Array,
    ) -> tuple[Values, dict[str, dict[str, jax.Array]]]:
        """One optimiser step of every table; arrays have a leading replica axis, `rate` and `alive` are [P].

        `grads`: of the values (`dense_adam`), else of the probes.
        """
        new_values, new_slots = {}, {}
        for name, table in values.items():

            def rows(table, slots, reads, grads, rate, active):
                factors = row_grads(reads, grads)
                return memory_rows.update_rows(self.options, table, slots, factors, rate, step, active)

            def dense(table, slots, reads, grads, rate, active):
                return memory_rows.update_dense(self.options, table, slots, grads, rate, step, active)

            update = jax.vmap(rows if self.rows else dense)
            new_values[name], new_slots[name] = update(table, slots[name], reads.get(name), grads[name], rate, alive)
        return new_values, new_slots
