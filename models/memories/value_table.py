"""Values of a memory: a `Table` inside a module, read sparsely, with gradients of the rows a batch hit.

A training step that must not build anything of the table's size differentiates with respect to *probes*, zeros added
to what was read, instead of the values, and gets the gradient in factored form:

    with recorded(model, probes) as tapes:          # probes: table path -> one array per read
        output = model(...)
    tapes[path].reads                               # (ids, w or x) of every read, in order
    d(loss)/d(probe) = g                            # then dV[m] = sum over hits of w * g

Two kinds of reads, with the same factors in other roles:

    sum   y[t] = sum_j w[t,j] V[ids[t,j]]           probe [N, d]: factors w (read) and g = dy
    dot   s[t,j] = <x[t], V[ids[t,j]]>              probe [N, J]: factors w = ds and g = x (read)

Letters: N reads, J hits per read, M rows, d width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recscale.models.inputs.tables import Table
from recscale.pallas_kernels.sparse_gather import sparse_dot, sparse_gather


class Constant(nnx.Variable):
    """An array that is drawn or computed once and never trained."""


@flax.struct.dataclass
class RowRead:
    """One read of a table: ids int32 [N, J], -1 = absent; factor: w [N, J] of a sum, x [N, d] of a dot product."""

    ids: Array  # transformations put other leaves here, so shapes are not checked
    factor: Array
    kind: str = flax.struct.field(pytree_node=False)


class RowGrads(NamedTuple):
    """dV in factored form over all reads of a table: dV[m] = sum over hits h with ids[h] = m of weights[h] g[read[h]].

    ids, read int32 [n], weights float32 [n], g float32 [reads, d]; ids below 0 are absent hits.
    """

    ids: Array
    weights: Array
    read: Array
    g: Array


@dataclasses.dataclass
class Tape:
    """What one table read while it was recorded; `probes` are consumed in order, None makes zeros."""

    probes: Sequence[Array] | None
    reads: list[RowRead] = dataclasses.field(default_factory=list)

    def note(self, kind: str, ids: Array, factor: Array, shape: tuple[int, ...]) -> Array:
        """Notes a read and returns its probe."""
        factor = jax.lax.stop_gradient(factor).astype(jnp.float32)
        self.reads.append(RowRead(ids, factor, kind))
        return jnp.zeros(shape, jnp.float32) if self.probes is None else self.probes[len(self.reads) - 1]


class ValueTable(nnx.Module):
    """M rows of width d drawn from N(0, std^2), trained by touched-row updates or densely; shared by who holds it.

    `frozen` values never get a gradient (the control "random values").
    """

    def __init__(self, rows: int, width: int, *, std: float, frozen: bool = False, rngs: nnx.Rngs):
        value = std * jax.random.normal(rngs.params(), (rows * width,), jnp.float32)
        kind = Constant if frozen else Table
        self.rows = kind(value.reshape(rows, width), logical_axes=("slots", "embed"))
        self.frozen = frozen
        self.tape: Tape | None = None

    def sum(
        self,
        ids: Int[Array, "N J"],
        weights: Float[Array, "N J"],
        *,
        gate: Float[Array, "N d"] | None = None,
        gate_fn: str = "none",
    ) -> Float[Array, "N d"]:
        """Weighted sums [N, d] of rows (see `sparse_gather`), float32 or in the gate's dtype."""
        shape = (ids.shape[0], self.rows.shape[1])
        probe, value_grad = self._mode("sum", ids, weights, shape)
        return sparse_gather(
            self.rows[...], ids, weights, gate=gate, gate_fn=gate_fn, probe=probe, value_grad=value_grad
        )

    def dot(self, ids: Int[Array, "N J"], x: Float[Array, "N d"]) -> Float[Array, "N J"]:
        """Products [N, J] of x [N, d] with rows, float32, 0 for absent hits."""
        probe, value_grad = self._mode("dot", ids, x, ids.shape)
        products = sparse_dot(self.rows[...], ids, x, value_grad=value_grad)
        return products if probe is None else products + probe

    def _mode(self, kind: str, ids: Array, factor: Array, shape: tuple[int, ...]) -> tuple[Array | None, str]:
        if self.frozen:
            return None, "none"
        if self.tape is None:
            return None, "dense"
        return self.tape.note(kind, ids, factor, shape), "rows"


def value_tables(model: nnx.Module) -> dict[str, ValueTable]:
    """Trained value tables of a model by their path ("blocks/1/memory/values"); a shared one appears once."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, ValueTable) and not node.frozen
    }


@contextlib.contextmanager
def recorded(model: nnx.Module, probes: Mapping[str, Sequence[Array]] | None = None) -> Iterator[dict[str, Tape]]:
    """Records the reads of every trained value table of a model while the block runs; see the file's head."""
    tables = value_tables(model)
    tapes = {path: Tape(None if probes is None else probes[path]) for path in tables}
    for path, table in tables.items():
        table.tape = tapes[path]
    try:
        yield tapes
    finally:
        for table in tables.values():
            table.tape = None


def probe_shapes(reads: Sequence[RowRead], width: int) -> list[tuple[int, ...]]:
    """Shapes of the probes of recorded reads of a table of width d."""
    return [read.ids.shape if read.kind == "dot" else (read.ids.shape[0], width) for read in reads]


def row_grads(reads: Sequence[RowRead], probe_grads: Sequence[Array]) -> RowGrads:
    """Joins the reads of one table and the gradients of their probes."""
    ids, weights, owner, vectors, start = [], [], [], [], 0
    for read, grad in zip(reads, probe_grads, strict=True):
        w, g = (grad, read.factor) if read.kind == "dot" else (read.factor, grad)
        count, per_read = read.ids.shape
        ids.append(read.ids.reshape(-1))
        weights.append(w.reshape(-1).astype(jnp.float32))
        owner.append(start + jnp.arange(count * per_read, dtype=jnp.int32) // per_read)
        vectors.append(g.astype(jnp.float32))
        start += count
    joined = (jnp.concatenate(parts) if len(parts) > 1 else parts[0] for parts in (ids, weights, owner, vectors))
    return RowGrads(*joined)
