"""Serving with the user's part computed once per request, against computing it for every candidate.

    R 8 requests, C 64 candidates each, D 256, float32, the whole model from looked-up inputs to logits

A case names an architecture and what it is compared with: another architecture of the same sizes (UG-Sep against the
unseparated backbone), or the same model with every request's inputs repeated for each candidate. Both run by turns in
one process. The promise is the ratio of their FLOPs in closed form; reached is the ratio of their times over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models import build, count
from recscale.models.inputs import Inputs, Schema, reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.pallas_kernels.names import nearest

from .serve_exported import measure_exported
from .serving_shape import ServingShape, history_schema
from .timing import Rival, race, repeated

# Logits of one model computed in two ways: float32 sums in another order.
_SAME = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        architecture, config: what reuses the user's part.
        rival: the architecture that does not, of the same schema; None is the same model, recomputed per candidate.
        rival_config: of `rival`.
        schema: what the inputs look like.
    """

    architecture: str
    config: Mapping[str, Any]
    rival: str | None = None
    rival_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schema: Callable[[], Schema] = reference_schema


def cases(shape: ServingShape) -> dict[str, Case]:
    """Every comparison by name. A model is added by a line here."""
    sizes: dict[str, Any] = {"tokenizer": "cut", "tokens": shape.tokens, "width": shape.width, "layers": shape.layers}
    # Hidden widths at the ratios of the starter sizes: F = 2.75 D, and F1 = F2 = 1.25 D.
    rankmixer = sizes | {"hidden": 11 * shape.width // 4}
    large = sizes | {"hidden": 5 * shape.width // 4, "global_token": False, "aux_weight": 0.0}
    found = {}
    for ratio, user in (("1:1", shape.tokens // 2), ("3:1", 3 * shape.tokens // 4)):
        for name, config in (("rankmixer", rankmixer), ("tokenmixer_large", large)):
            split = config | {"user_tokens": user}
            found[f"ug_{name} {ratio}"] = Case(f"ug_{name}", split, name, split)
    mixformer = {"tokens": shape.tokens, "width": shape.width, "layers": shape.layers}
    found["ui_mixformer 1:1"] = Case("ui_mixformer", mixformer, "mixformer", mixformer, history_schema)
    encoder = {"event_width": shape.width // 4, "merge": 4, "layers": shape.layers}
    longer = {"encoder": encoder, "backbone": rankmixer}
    found["longer"] = Case("longer+rankmixer", longer, schema=lambda: history_schema(256))
    return found


def measure_serving(
    *,
    names: Iterable[str] = (),
    shape: ServingShape | None = None,
    rounds: int = 10,
    per_round: int = 2,
    exported: bool = False,
    calls: int = 200,
) -> dict[str, Any]:
    """Measures and returns JSON-able figures.

    Args:
        names: which of `cases`; none given is all.
        shape: sizes. rounds, per_round: turns of each of the two models, and timed calls per turn.
        exported, calls: the figures of `serve_exported.measure_exported` instead.

    Returns:
        cases: name -> `flops_ratio` (the promise), `time_ratio` (median times), `reached` (their quotient), `cpu_ratio`
        (times of the threads), `state_elements` per request, times and FLOPs per call of `reused` and `rival`; shape.

    Raises:
        ValueError: an unknown name, or a recomputed model that gives other logits.
    """
    shape = shape or ServingShape()
    if exported:
        return measure_exported(names=names, shape=shape, calls=calls)
    known = cases(shape)
    names = list(names) or list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no serving case {name!r}{nearest(name, known)}")
    found = {name: _measure(known[name], shape, rounds, per_round) for name in names}
    return {"cases": found, "shape": dataclasses.asdict(shape)}


def _measure(case: Case, shape: ServingShape, rounds: int, per_round: int) -> dict[str, Any]:
    schema, rows = case.schema(), shape.requests * shape.candidates
    inputs = random_inputs(schema, shape.requests, shape.candidates)
    model = _make(case.architecture, schema, case.config)
    counted = count(case.architecture, schema, case.config)
    flops = {"reused": shape.requests * counted.forward_flops_user + rows * counted.forward_flops_candidate}
    steps = {"reused": _stepper(model, inputs)}
    if case.rival is None:
        alone = _per_candidate(inputs)
        flops["rival"] = rows * (counted.forward_flops_user + counted.forward_flops_candidate)
        steps["rival"] = _stepper(model, alone)
        _check_same(model, inputs, alone)
    else:
        other = count(case.rival, schema, case.rival_config)
        flops["rival"] = shape.requests * other.forward_flops_user + rows * other.forward_flops_candidate
        steps["rival"] = _stepper(_make(case.rival, schema, case.rival_config), inputs)
    times = race(steps, rounds=rounds, per_round=per_round)
    state = jax.eval_shape(lambda m, user: m.encode_user(user), model, inputs.user)
    reused, rival = times["reused"], times["rival"]
    promise, time = flops["rival"] / flops["reused"], rival["median_ms"] / reused["median_ms"]
    return {
        "flops_ratio": promise,
        "time_ratio": time,
        "reached": time / promise,
        "cpu_ratio": rival["cpu_ms"] / reused["cpu_ms"],
        "state_elements": sum(leaf.size for leaf in jax.tree.leaves(state)) // shape.requests,
        **{name: {**times[name], "flops": flops[name]} for name in steps},
    }


def _make(name: str, schema: Schema, config: Mapping[str, Any]) -> nnx.Module:
    return build(name, schema, config, rngs=nnx.Rngs(0), dtype=jnp.float32)


def _logits(model: nnx.Module, inputs: Inputs) -> jax.Array:
    return model(inputs).logits


def _stepper(model: nnx.Module, inputs: Inputs) -> Rival:
    """A function that scores the batch n times, one after the other."""
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, inputs: _logits(nnx.merge(graph, state), inputs))
    return repeated(lambda: call(state, inputs))


def _per_candidate(inputs: Inputs) -> Inputs:
    """Every candidate as a request of its own: R*C requests with C = 1."""
    each = next(iter(inputs.candidates.fields.values())).shape[1]
    user = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), inputs.user)
    candidates = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), inputs.candidates)
    return dataclasses.replace(inputs, user=user, candidates=candidates)


def _check_same(model: nnx.Module, inputs: Inputs, alone: Inputs) -> None:
    once, again = _logits(model, inputs), _logits(model, alone)
    error = float(jnp.abs(once - again.reshape(once.shape)).max())
    if not error < _SAME:
        raise ValueError(f"logits recomputed per candidate differ by {error:.2e}, expected below {_SAME:g}")
