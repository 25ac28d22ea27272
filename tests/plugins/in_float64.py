"""What a JAX function gives in float64: NumPy computes every operation of its jaxpr.

Nothing is compiled, so a whole model costs milliseconds, where XLA takes seconds over each new program; and rounding is
far below any difference that a fault makes. What XLA makes of a program is for the tests that compile it.

Every float is a float64, whatever its declared precision. Random keys are numbers of their own with a generator of
their own: draws have the right distribution and independence, not the numbers JAX would draw. Operations that are not
here (decompositions) are left to JAX, in float32.
"""

import contextlib
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


def in_float64(function, static_argnums=()):
    """The function, computed by NumPy: takes and returns trees of arrays. Traced once for each set of shapes."""
    fixed = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
    programs = {}

    def run(*arguments):
        leaves, tree = jax.tree.flatten([None if i in fixed else a for i, a in enumerate(arguments)])
        shapes = tuple((np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves)
        known = tree, shapes, *(arguments[i] for i in fixed if i < len(arguments))
        if known not in programs:
            program, out = jax.make_jaxpr(function, fixed, return_shape=True)(*arguments)
            programs[known] = program, jax.tree.structure(out)
        program, structure = programs[known]
        return jax.tree.unflatten(structure, _run(program.jaxpr, program.consts, [_in(leaf) for leaf in leaves]))

    return run


def _in(value):
    """An array as NumPy has it here: floats in float64, keys as uint64."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(value)).astype(np.uint64)
        return data[..., 0] << np.uint64(32) | data[..., 1]
    value = np.asarray(value)
    return value.astype(np.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _run(jaxpr, consts, arguments):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(_in, consts), *arguments], strict=True))

    def read(atom):
        return values[atom] if not hasattr(atom, "val") else _in(atom.val)

    with np.errstate(all="ignore"):
        for eqn in jaxpr.eqns:
            name, operands = eqn.primitive.name, [read(atom) for atom in eqn.invars]
            if name in _WHOLE:
                found = _WHOLE[name](eqn.params, *operands)
            elif name in _ONE:
                found = [_ONE[name](*operands)]
            elif name in _WITH_PARAMS:
                found = [_WITH_PARAMS[name](eqn.params, *operands)]
            else:
                found = _left_to_jax(eqn, operands)
            values.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _left_to_jax(eqn, operands):
    inputs = [jnp.asarray(x, atom.aval.dtype) for x, atom in zip(operands, eqn.invars, strict=True)]
    found = eqn.primitive.bind(*inputs, **eqn.params)
    return [_in(x) for x in (found if eqn.primitive.multiple_results else [found])]


# ---- programs inside programs


def _closed(program, operands):
    """A jaxpr with its constants, or one that has none."""
    return _run(getattr(program, "jaxpr", program), getattr(program, "consts", ()), operands)


def _inner(params, *operands):
    return _closed(next(params[name] for name in ("call_jaxpr", "jaxpr", "fun_jaxpr") if name in params), operands)


def _scan(params, *operands):
    consts, carries = params["num_consts"], params["num_carry"]
    fixed, carry, scanned = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    order, rows = range(params["length"]), []
    for i in reversed(order) if params["reverse"] else order:
        found = _closed(params["jaxpr"], [*fixed, *carry, *(x[i] for x in scanned)])
        carry = found[:carries]
        rows.append(found[carries:])
    if params["reverse"]:
        rows.reverse()
    if not rows:  # nothing was scanned: the shapes are those of the outputs
        empty = params["jaxpr"].out_avals[carries:]
        return [*carry, *(np.zeros((0, *aval.shape), _dtype(aval.dtype)) for aval in empty)]
    return [*carry, *(np.stack(column) for column in zip(*rows, strict=True))]


def _while(params, *operands):
    conditions, bodies = params["cond_nconsts"], params["body_nconsts"]
    ask, fixed = operands[:conditions], operands[conditions : conditions + bodies]
    carry = list(operands[conditions + bodies :])
    while _closed(params["cond_jaxpr"], [*ask, *carry])[0]:
        carry = _closed(params["body_jaxpr"], [*fixed, *carry])
    return carry


def _cond(params, index, *operands):
    branches = params["branches"]
    return _closed(branches[min(max(int(index), 0), len(branches) - 1)], operands)


# ---- shapes and products


def _dtype(dtype):
    return np.float64 if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def _broadcast(params, x, *_):
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _pad(params, x, value):
    out = x
    for axis, (low, high, interior) in enumerate(params["padding_config"]):
        size = out.shape[axis] + max(out.shape[axis] - 1, 0) * interior
        wide = np.full((*out.shape[:axis], size + max(low, 0) + max(high, 0), *out.shape[axis + 1 :]), value)
        lead = (slice(None),) * axis
        wide[(*lead, slice(max(low, 0), max(low, 0) + size, interior + 1))] = out
        out = wide[(*lead, slice(max(-low, 0), wide.shape[axis] - max(-high, 0)))]
    return out


def _product(params, a, b):
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
    free_a = [i for i in range(a.ndim) if i not in (*contract_a, *batch_a)]
    free_b = [i for i in range(b.ndim) if i not in (*contract_b, *batch_b)]
    letters = dict(zip([("a", i) for i in range(a.ndim)], range(a.ndim), strict=True))
    pairs = zip([*contract_b, *batch_b], [*contract_a, *batch_a], strict=True)
    letters |= {("b", j): i for j, i in pairs}
    letters |= {("b", j): a.ndim + j for j in free_b}
    names_a, names_b = ([letters[side, i] for i in range(x.ndim)] for side, x in (("a", a), ("b", b)))
    out = [*batch_a, *free_a, *(a.ndim + j for j in free_b)]
    return np.einsum(a, names_a, b, names_b, out, optimize=True).astype(
        _dtype(params["preferred_element_type"] or a.dtype)
    )


def _windows(operand, indices, sizes, mode, index_map, collapsed, operand_batch, index_batch, offset_dims, rank):
    """Index arrays of every operand axis, which positions are in bounds, and the order of the axes of the result."""
    lead, starts = indices.shape[:-1], np.zeros((*indices.shape[:-1], operand.ndim), np.int64)
    for k, axis in enumerate(index_map):
        starts[..., axis] = indices[..., k]
    for axis, of in zip(operand_batch, index_batch, strict=True):
        starts[..., axis] = np.arange(lead[of]).reshape([-1 if i == of else 1 for i in range(len(lead))])
    last = np.asarray(operand.shape) - np.asarray(sizes)
    inside = ((starts >= 0) & (starts <= last)).all(axis=-1)
    if mode.name != "CLIP":
        starts = np.where(inside[..., None], starts, 0)
    starts, inside = np.clip(starts, 0, last), inside | (mode.name == "CLIP")
    window = [axis for axis in range(operand.ndim) if axis not in (*collapsed, *operand_batch)]
    index = []
    for axis in range(operand.ndim):
        start = starts[..., axis].reshape((*lead, *(1,) * len(window)))
        along = [-1 if other == axis else 1 for other in window]
        index.append(start + np.arange(sizes[axis]).reshape(along) if axis in window else start)
    inside = inside.reshape((*lead, *(1,) * len(window)))
    places = [axis for axis in range(rank) if axis not in offset_dims] + list(offset_dims)
    return tuple(index), inside, np.argsort(places)


def _gather(params, operand, indices):
    d = params["dimension_numbers"]
    batches = (d.operand_batching_dims, d.start_indices_batching_dims)
    rank = indices.ndim - 1 + len(d.offset_dims)
    layout = (d.start_index_map, d.collapsed_slice_dims, *batches, d.offset_dims, rank)
    index, inside, order = _windows(operand, indices, params["slice_sizes"], params["mode"], *layout)
    found, fill = operand[index], params["fill_value"]
    if fill is None:
        fill = np.nan if operand.dtype.kind == "f" else np.iinfo(operand.dtype).min if operand.dtype.kind == "i" else 0
    return np.where(inside, found, np.asarray(fill, operand.dtype)).transpose(order)


def _scatter(combine):
    def scatter(params, operand, indices, updates):
        d = params["dimension_numbers"]
        sizes, window = [1] * operand.ndim, list(d.update_window_dims)
        kept = [a for a in range(operand.ndim) if a not in (*d.inserted_window_dims, *d.operand_batching_dims)]
        for axis, of in zip(kept, window, strict=True):
            sizes[axis] = updates.shape[of]
        batches = (d.operand_batching_dims, d.scatter_indices_batching_dims)
        layout = (d.scatter_dims_to_operand_dims, d.inserted_window_dims, *batches, window, updates.ndim)
        index, inside, order = _windows(operand, indices, sizes, params["mode"], *layout)
        updates = updates.transpose(np.argsort(order))
        index, inside = np.broadcast_arrays(*index), np.broadcast_to(inside, updates.shape)
        out = operand.copy()
        combine(out, tuple(i[inside] for i in index), updates[inside])
        return out

    return scatter


def _top_k(params, x):
    k, axis = params["k"], params.get("axis", -1)
    x = np.moveaxis(x, axis, -1)
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    return [np.moveaxis(found, -1, axis) for found in (np.take_along_axis(x, order, -1), order.astype(np.int32))]


def _sort(params, *operands):
    axis = params["dimension"]
    order = np.lexsort(list(reversed(operands[: params["num_keys"]])), axis=axis)
    return [np.take_along_axis(x, order, axis) for x in operands]


def _cumulative(ufunc):
    def run(params, x):
        turn = (lambda a: np.flip(a, params["axis"])) if params["reverse"] else (lambda a: a)
        return turn(ufunc.accumulate(turn(x), axis=params["axis"]))

    return run


def _reduce(ufunc):
    return lambda params, x: ufunc.reduce(x, axis=tuple(params["axes"]))


def _argument(function):
    def run(params, x):
        (axis,) = params["axes"]
        return function(x, axis=axis).astype(params["index_dtype"])

    return run


def _dynamic_slice(params, x, *starts):
    at = [min(max(int(s), 0), n - w) for s, n, w in zip(starts, x.shape, params["slice_sizes"], strict=True)]
    return x[tuple(slice(s, s + w) for s, w in zip(at, params["slice_sizes"], strict=True))]


def _dynamic_update(params, x, update, *starts):
    at = [min(max(int(s), 0), n - w) for s, n, w in zip(starts, x.shape, update.shape, strict=True)]
    out = x.copy()
    out[tuple(slice(s, s + w) for s, w in zip(at, update.shape, strict=True))] = update
    return out


def _select(which, *cases):
    which = np.asarray(which).astype(np.intp)
    return (
        np.choose(np.broadcast_to(which, cases[0].shape), cases)
        if len(cases) > 2
        else np.where(which, cases[1], cases[0])
    )


def _converted(params, x):
    dtype = params["new_dtype"]
    return x.astype(_dtype(dtype))


def _bits_as(params, x):
    dtype = np.dtype(params["new_dtype"])
    if jnp.issubdtype(dtype, jnp.floating):
        return x.view(dtype).astype(np.float64)
    return (x.astype(np.float32) if x.dtype == np.float64 else x).view(dtype)


# ---- random keys: uint64


def _mixed(x):
    """splitmix64."""
    x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _folded(key, data):
    return _mixed(key ^ _mixed(np.asarray(data).astype(np.uint64) + np.uint64(1)))


def _split(params, key):
    count = math.prod(params["shape"])
    each = _folded(key[..., None], np.arange(count) + (1 << 33))
    return each.reshape(*key.shape, *params["shape"])


@contextlib.contextmanager
def keys_drawn_from():
    """A list that gets, of every draw while the block runs, the keys it is made from."""
    _observers.append([])
    try:
        yield _observers[-1]
    finally:
        _observers.pop()


_observers = []


def _bits(params, key):
    for observer in _observers:
        observer.append(key.reshape(-1).tolist())
    shape, dtype = params["shape"], np.dtype(f"uint{params['bit_width']}")
    drawn = [
        np.random.Generator(np.random.PCG64(int(one))).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        for one in key.reshape(-1)
    ]
    return np.stack(drawn).reshape(*key.shape, *shape)


def _gamma(params, key, alpha):
    drawn = np.empty(alpha.shape)
    for i in np.ndindex(key.shape):
        drawn[i] = np.random.Generator(np.random.PCG64(int(key[i]))).gamma(alpha[i])
    return np.log(drawn) if params["log_space"] else drawn


def _quotient(a, b):
    if a.dtype.kind == "f":
        return a / b
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.where(b == 0, 1, np.abs(b)))).astype(a.dtype)


# primitive -> operands -> the result
_ONE = {
    "add": operator.add,
    "add_any": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _quotient,
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "atan2": np.arctan2,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt_to": operator.lt,
    "le_to": operator.le,
    "nextafter": lambda x, to: np.nextafter(np.float32(x), np.float32(to)).astype(np.float64),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "shift_left": operator.lshift,
    "shift_right_logical": operator.rshift,
    "neg": operator.neg,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "square": np.square,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "logistic": special.expit,
    "erf": special.erf,
    "erfc": special.erfc,
    "erf_inv": special.erfinv,
    "is_finite": np.isfinite,
    "select_n": _select,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "stop_gradient": lambda x: x,
    "random_fold_in": _folded,
}

# primitive -> (parameters, operands) -> the result
_WITH_PARAMS = {
    "integer_pow": lambda params, x: x ** params["y"] if params["y"] >= 0 else 1 / x ** -params["y"],
    "round": lambda params, x: np.round(x) if params["rounding_method"] else np.trunc(x + np.copysign(0.5, x)),
    "broadcast_in_dim": _broadcast,
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda params, x: np.expand_dims(x, params["dimensions"]),
    "transpose": lambda params, x: x.transpose(params["permutation"]),
    "concatenate": lambda params, *parts: np.concatenate(parts, params["dimension"]),
    "stack": lambda params, *parts: np.stack(parts, params["axis"]),
    "tile": lambda params, x: np.tile(x, params["reps"]),
    "pad": _pad,
    "rev": lambda params, x: np.flip(x, params["dimensions"]),
    "slice": lambda params, x: x[
        tuple(
            slice(a, b, c)
            for a, b, c in zip(
                params["start_indices"], params["limit_indices"], params["strides"] or (1,) * x.ndim, strict=True
            )
        )
    ],
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "iota": lambda params: np.broadcast_to(
        np.arange(params["shape"][params["dimension"]], dtype=_dtype(params["dtype"])).reshape(
            [-1 if i == params["dimension"] else 1 for i in range(len(params["shape"]))]
        ),
        params["shape"],
    ),
    "convert_element_type": _converted,
    "bitcast_convert_type": _bits_as,
    "reduce_precision": lambda params, x: x,
    "dot_general": _product,
    "reduce_sum": _reduce(np.add),
    "reduce_prod": _reduce(np.multiply),
    "reduce_max": _reduce(np.maximum),
    "reduce_min": _reduce(np.minimum),
    "reduce_and": _reduce(np.logical_and),
    "reduce_or": _reduce(np.logical_or),
    "argmax": _argument(np.argmax),
    "argmin": _argument(np.argmin),
    "cumsum": _cumulative(np.add),
    "cumprod": _cumulative(np.multiply),
    "cummax": _cumulative(np.maximum),
    "cumlogsumexp": _cumulative(np.logaddexp),
    "gather": _gather,
    "scatter": _scatter(lambda out, at, x: out.__setitem__(at, x)),
    "scatter-add": _scatter(np.add.at),
    "scatter_add": _scatter(np.add.at),
    "scatter_mul": _scatter(np.multiply.at),
    "scatter_min": _scatter(np.minimum.at),
    "scatter_max": _scatter(np.maximum.at),
    "random_seed": lambda params, seed: _mixed(np.asarray(seed).astype(np.uint64)),
    "random_split": _split,
    "random_bits": _bits,
    "random_gamma": _gamma,
}

# primitive -> (parameters, operands) -> all results
_WHOLE = {
    "pjit": _inner,
    "jit": _inner,
    "closed_call": _inner,
    "core_call": _inner,
    "checkpoint": _inner,
    "remat2": _inner,
    "custom_jvp_call": _inner,
    "custom_vjp_call": _inner,
    "custom_vjp_call_jaxpr": _inner,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "split": lambda params, x: np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"]),
    "unstack": lambda params, x: list(np.moveaxis(x, params["axis"], 0)),
    "top_k": _top_k,
    "sort": _sort,
    "optimization_barrier": lambda params, *operands: list(operands),
}
