"""Models, batches and training losses as shapes alone: what counting and sizing look at instead of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recscale import models
from recscale.models.inputs import Batch, CandidateSide, Field, History, Inputs, Schema, UserSide
from recscale.models.inputs.tables import Table, embed
from recscale.models.ranker import Ranker


def abstract_model(name: str, schema: Schema, config: Any = None) -> Ranker:
    """The model as `recscale.models.build` makes it, every array a `ShapeDtypeStruct`; computes in float32."""
    return nnx.eval_shape(lambda: models.build(name, schema, config, rngs=nnx.Rngs(0), dtype=jnp.float32))


def tree_params(model: nnx.Module) -> int:
    """Sum of the sizes of a model's parameters, real or abstract: what the closed form of `dense_params` must equal.

    Values of memories, which are tables inside the model, count. Parameters marked `training_only` (auxiliary heads)
    are left out.
    """
    served = nnx.state(
        model, lambda _, v: isinstance(v, nnx.Param | Table) and not v.get_metadata().get("training_only", False)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(served))


def abstract_batch(schema: Schema, requests: int, candidates: int) -> Batch:
    """A batch of R requests with C candidates each, as shapes."""

    def side(fields: tuple[Field, ...], *lead: int) -> tuple[dict[str, Any], dict[str, Any]]:
        ids = {f.ids_name: _ids(f, *lead) for f in fields if not f.is_dense}
        return ids, {f.name: _floats(*lead, f.width) for f in fields if f.is_dense}

    histories = {}
    for sequence in schema.sequences:
        delta_s = _ints(requests, sequence.length) if sequence.timestamps else None
        ids, dense = side(sequence.fields, requests, sequence.length)
        histories[sequence.name] = History(ids, dense, _ints(requests), delta_s)
    labels = _floats(requests, candidates, len(schema.tasks))
    (user_ids, user_dense), own = (
        side(schema.user_fields, requests),
        side(schema.candidate_fields, requests, candidates),
    )
    if schema.content is not None:
        user_ids |= {"query": _ints(requests), "query_content": _ints(requests, schema.content.query_length)}
        own[0]["content"] = _ints(requests, candidates, sum(schema.content.segments))
        own[0]["content_item"] = _ints(requests, candidates)
        for name in schema.content.histories:
            histories[name].ids["content_item"] = _ints(*histories[name].length.shape, _columns(schema, name))
    return Batch(
        user=UserSide(user_ids, user_dense, histories, _ints(requests) if schema.domains > 1 else None),
        candidates=CandidateSide(*own),
        labels=labels,
        label_mask=labels,
        valid=jax.ShapeDtypeStruct((requests, candidates), jnp.bool_),
    )


def abstract_vectors(schema: Schema, batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    """Place of every id field -> the vectors looked up there: what training differentiates besides the parameters."""
    widths = {name: width for name, (_, width) in schema.tables().items()}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def record(table: str, place: str, ids: Any) -> jax.Array:
        shapes[place] = _floats(*ids.shape, widths[table])
        return jnp.zeros(shapes[place].shape)

    jax.eval_shape(lambda b: embed(schema, b, record), batch)
    return shapes


def forward_program(name: str, schema: Schema, config: Any, requests: int, candidates: int) -> tuple[Callable, tuple]:
    """(function, abstract arguments) of a forward pass from looked-up inputs to logits [R, C, Y]."""
    batch = abstract_batch(schema, requests, candidates)
    inputs = jax.eval_shape(lambda b, v: _inputs(schema, b, v), batch, abstract_vectors(schema, batch))
    graph, state = nnx.split(abstract_model(name, schema, config))
    return lambda state, inputs: nnx.merge(graph, state)(inputs).logits, (state, inputs)


def trace_forward(name: str, schema: Schema, config: Any, requests: int, candidates: int) -> None:
    """Builds a model and runs a forward pass, both as shapes alone and in one trace; raises what the model raises."""

    def logits(batch: Batch, vectors: dict[str, Any]) -> jax.Array:
        model = models.build(name, schema, config, rngs=nnx.Rngs(0), dtype=jnp.float32)
        return model(_inputs(schema, batch, vectors)).logits

    batch = abstract_batch(schema, requests, candidates)
    jax.eval_shape(logits, batch, abstract_vectors(schema, batch))


def train_program(name: str, schema: Schema, config: Any, requests: int, candidates: int) -> tuple[Callable, tuple]:
    """(function, abstract arguments) of forward and backward, with gradients of parameters and looked-up vectors.

    Raw dense fields get no gradient, as in training, and the model gets a key, as in training. The loss is the sum of
    all logits and auxiliary losses: which loss it is changes no matrix product. The optimiser is not part of it.
    """
    batch = abstract_batch(schema, requests, candidates)
    vectors = abstract_vectors(schema, batch)
    graph, params, rest = nnx.split(abstract_model(name, schema, config), nnx.Any(nnx.Param, Table), ...)

    def loss(params, vectors, rest, batch):
        model = nnx.merge(graph, params, rest, copy=True)
        output = model(_inputs(schema, batch, vectors), key=jax.random.key(0))
        logits = [logits for _, logits in output.loss_logits.values()] or [output.logits]
        contrast = jnp.zeros(()) if output.contrast is None else output.contrast.scores.sum()
        return sum(map(jnp.sum, logits)) + sum(output.losses.values(), contrast)

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, vectors, rest, batch)


def _inputs(schema: Schema, batch: Batch, vectors: dict[str, Any]) -> Inputs:
    return embed(schema, batch, lambda table, place, ids: vectors[place])


def _columns(schema: Schema, name: str) -> int:
    return next(sequence.length for sequence in schema.sequences if sequence.name == name)


def _ids(field: Field, *lead: int) -> jax.ShapeDtypeStruct:
    return _ints(*lead, field.bag) if field.bag > 1 else _ints(*lead)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
