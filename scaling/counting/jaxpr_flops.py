"""FLOPs of a function counted on its jaxpr: exact, and without running or allocating anything.

Counted are matrix products and convolutions, 2 per multiply-add; everything else (norms, activations, softmax, sums,
gathers, factorisations) is 0. Loops with a known number of iterations are multiplied out, of a conditional the dearest
branch is taken, work that `jax.checkpoint` repeats in the backward pass is left out unless asked for.

    count_flops(fn, *args)                      the total
    contractions(fn, *args)                     the same, product by product: where do the FLOPs come from?

Arguments may be abstract: arrays, `jax.ShapeDtypeStruct`, or pytrees of them (an `nnx.Module` from `nnx.eval_shape`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

# What JAX writes into the name stack of an equation that repeats forward work in a backward pass.
_RECOMPUTED = "rematted_computation"

# Primitives that run their one sub-jaxpr once.
_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
    | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"}
)


@dataclasses.dataclass(frozen=True)
class Counting:
    """What to count where a jaxpr leaves a choice.

    Attributes:
        recomputed: also count the forward work that `jax.checkpoint` repeats in a backward pass. Off: the useful work.
        while_trips: number of iterations assumed for every `while_loop`, whose own number a jaxpr does not know.
            None makes a loop that holds FLOPs an error.
    """

    recomputed: bool = False
    while_trips: int | None = None


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One matrix product, convolution or kernel call of a jaxpr.

    Attributes:
        primitive: "dot_general", "ragged_dot_general", "conv_general_dilated", or that of a Pallas kernel.
        shapes: operand and result shapes.
        flops: of one execution.
        times: executions, loops and devices multiplied out.
        where: name of the calling function, as JAX recorded it.
    """

    primitive: str
    shapes: str
    flops: int
    times: int
    where: str

    @property
    def total(self) -> int:
        return self.flops * self.times


def count_flops(fn: Callable, *args: Any, counting: Counting | None = None, **kwargs: Any) -> int:
    """FLOPs of `fn(*args, **kwargs)`: the sum of 2 * multiply-adds over its matrix products.

    Rules beyond `dot_general`: a scan counts its length; `cond` its dearest branch; `shard_map` the sum over its
    devices; `ragged_dot` the rows of its left operand (state the active rows by its shape); a Pallas call its
    cost estimate; a convolution only the taps that meet real input, so padding is free and gradients are exactly
    three times the forward pass.

    Args:
        fn: any function JAX can trace; differentiate it first to count a training step.
        args, kwargs: arrays or abstract arrays.
        counting: choices, see `Counting`.

    Raises:
        ValueError: a while loop with FLOPs and no `while_trips`, or a Pallas call without a cost estimate.
        NotImplementedError: a primitive with FLOPs inside that has no rule here.
    """
    return sum(c.total for c in contractions(fn, *args, counting=counting, **kwargs))


def contractions(fn: Callable, *args: Any, counting: Counting | None = None, **kwargs: Any) -> list[Contraction]:
    """Every product that `count_flops` counts, in program order. Arguments and errors as there."""
    closed = jax.make_jaxpr(fn)(*args, **kwargs)
    return list(_walk(closed.jaxpr, 1, counting or Counting()))


def _walk(jaxpr: Jaxpr, times: int, counting: Counting) -> Iterator[Contraction]:
    for eqn in jaxpr.eqns:
        if not counting.recomputed and _RECOMPUTED in str(eqn.source_info.name_stack):
            continue
        yield from _equation(eqn, times, counting)


def _equation(eqn: JaxprEqn, times: int, counting: Counting) -> Iterator[Contraction]:
    name, params = eqn.primitive.name, eqn.params
    if name in _FLOPS:
        yield Contraction(name, _shapes(eqn), _FLOPS[name](eqn), times, str(eqn.source_info.name_stack))
    elif name in _CALLS:
        for sub in jaxprs_in_params(params):
            yield from _walk(sub, times, counting)
    elif name == "scan":
        yield from _walk(_open(params["jaxpr"]), times * params["length"], counting)
    elif name == "while":
        yield from _while(eqn, times, counting)
    elif name == "cond":
        branches = [list(_walk(_open(branch), times, counting)) for branch in params["branches"]]
        yield from max(branches, key=_total)
    elif name == "custom_linear_solve":
        # The products with the matrix itself serve only its gradient, where they appear as equations of their own.
        yield from _walk(_open(params["jaxprs"].solve), times, counting)
    elif name == "shard_map":
        axes = params.get("newly_manual_axes", params.get("manual_axes", params["mesh"].axis_names))
        devices = math.prod(params["mesh"].shape[axis] for axis in axes)
        yield from _walk(_open(params["jaxpr"]), times * devices, counting)
    else:
        _refuse_unknown(eqn, counting)


def _while(eqn: JaxprEqn, times: int, counting: Counting) -> Iterator[Contraction]:
    body, test = _open(eqn.params["body_jaxpr"]), _open(eqn.params["cond_jaxpr"])
    inside = [*_walk(body, 1, counting), *_walk(test, 1, counting)]
    if not inside:
        return
    if counting.while_trips is None:
        raise ValueError(
            f"a while_loop holds {_total(inside)} FLOPs per iteration ({inside[0].shapes}) and a jaxpr does not know "
            "how often it runs; give Counting(while_trips=N), or write it as a scan or a fori_loop of fixed length"
        )
    # The condition is tested once more than the body runs.
    yield from _walk(body, times * counting.while_trips, counting)
    yield from _walk(test, times * (counting.while_trips + 1), counting)


def _refuse_unknown(eqn: JaxprEqn, counting: Counting) -> None:
    """A primitive without a rule may hold sub-programs (the addition of a reduce, say), but no FLOPs."""
    for sub in jaxprs_in_params(eqn.params):
        inside = list(_walk(sub, 1, counting))
        if inside:
            raise NotImplementedError(
                f"primitive {eqn.primitive.name!r} runs a program with FLOPs ({inside[0].shapes}) and has no rule here "
                "that says how often; add one to recscale.scaling.counting.jaxpr_flops"
            )


def _dot_general(eqn: JaxprEqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    left, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contract)


def _ragged_dot_general(eqn: JaxprEqn) -> int:
    """[m,k] x [g,k,n] by groups of rows: 2*m*k*n; also its two gradients, where the ragged axis is contracted."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    left, right = _shape(eqn.invars[0]), _shape(eqn.invars[1])
    shared = {*contract, *batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in shared)


def _convolution(eqn: JaxprEqn) -> int:
    """2 * batch * in/groups * out * (pairs of output position and tap that meet a real input), exact per axis."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    left, right, out = (_shape(v) for v in (*eqn.invars[:2], *eqn.outvars))
    flops = 2 * out[numbers.out_spec[0]] * right[numbers.rhs_spec[0]] * right[numbers.rhs_spec[1]]
    spatial = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for axis, (i, k, o) in enumerate(spatial):
        position = np.arange(out[o])[:, None] * params["window_strides"][axis] - params["padding"][axis][0]
        position = position + np.arange(right[k])[None] * params["rhs_dilation"][axis]
        spread = params["lhs_dilation"][axis]
        real = (position >= 0) & (position <= (left[i] - 1) * spread) & (position % spread == 0)
        flops *= int(real.sum())
    return flops


def _pallas_call(eqn: JaxprEqn) -> int:
    estimate = eqn.params.get("cost_estimate")
    if estimate is None:
        name = eqn.params.get("name") or eqn.source_info.name_stack
        raise ValueError(
            f"{eqn.primitive.name} {str(name)!r} has no cost estimate; give it cost_estimate=pl.CostEstimate(...)"
        )
    return round(estimate.flops)


_FLOPS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _convolution,
    "pallas_call": _pallas_call,
    # What `pl.kernel` makes (GPUs, SparseCores), depending on the version of JAX.
    "mpmd_map": _pallas_call,
    "core_map": _pallas_call,
}


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _total(inside: list[Contraction]) -> int:
    return sum(c.total for c in inside)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _shapes(eqn: JaxprEqn) -> str:
    shapes = [str(list(_shape(v))) for v in (*eqn.invars[:2], *eqn.outvars)]
    return f"{' x '.join(shapes[:-1])} -> {shapes[-1]}"
