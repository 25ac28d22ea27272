"""`product_key_topk` as one kernel on the TPU's TensorCore: scores, both selections of sub-keys, selection of pairs.

    grid (head, block of reads)      reads lie on the lanes, sub-keys and pairs on the sublanes

The MXU gives keys . q^T, [n, reads]: the layout a selection along the sublanes wants. A selection is K rounds of {the
largest score, the lowest index that has it, put -inf there}; both axes take their rounds in one loop, so that two
independent chains are in flight. Then the pairs (i, j) with (i+1)(j+1) <= K are written beside their slots, and K more
rounds pick the winners. Scores never leave the chip.

-inf marks what is taken; a masked key's score is -1e30 and stays above it, so ids stay distinct. Inputs that are not
both bfloat16 multiply at full float32 precision. Results leave with the reads last, [H, K, N], as they are in the
kernel.

Compiled for v5e, v5p, v6e and 7x; not yet run on any of them.

Letters: N reads, H heads, n sub-keys per axis, p key width per axis, K winners, P pairs.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.targets import Target

from .reference import comparable, finite_keys, pair_count

Array = jax.Array
Shape = tuple[int, ...]

_LANES, _SUBLANES = 128, 8
# Reads of a block: two groups of lanes, so that one's reductions hide behind the other's.
_READS = 256
# Sub-keys scored by one product.
_PRODUCT = 512
# Every rank has a program piece of its own; more make a program that is slow to compile.
_MOST_WINNERS = 256
_MOST_SUB_KEYS = 16 * _PRODUCT
# Share of VMEM a program may fill: the compiler needs some for itself.
_VMEM_SHARE = 0.75


def obstacle(target: Target, q_shape: Shape, keys_shape: Shape, k: int, dtypes) -> str | None:
    """Why this kernel cannot serve q [N,H,2,p] and keys [H,2,n,p] of these dtypes on that target, or None."""
    for dtype in dtypes:
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"an input is {jnp.dtype(dtype).name}, expected float32 or bfloat16"
    if 0 in q_shape:
        return f"q {q_shape} is empty"
    if k > _MOST_WINNERS:
        return f"topk is {k}, at most {_MOST_WINNERS}"
    if keys_shape[2] > _MOST_SUB_KEYS:
        return f"n is {keys_shape[2]}, at most {_MOST_SUB_KEYS}"
    needed, limit = _vmem_bytes(q_shape, keys_shape, k, target), int(_VMEM_SHARE * target.vmem_bytes)
    if needed > limit:
        return f"keys {keys_shape} and a block of reads take {needed} bytes of VMEM, more than {limit} on {target.name}"
    return None


def topk(
    q: Array, keys: Array, k: int, scale: float, *, target: Target, interpret: bool = False
) -> tuple[Array, Array]:
    """q [N,H,2,p], keys [H,2,n,p] -> scores float32 [N,H,k], ids int32 [N,H,k].

    Args:
        target: chip to compile for; one on which `obstacle` finds nothing.
        interpret: run by interpretation, on any device.
    """
    reads, heads, _, width = q.shape
    sub_keys = keys.shape[2]
    block = _block(q.shape, keys.shape, k, target)
    rows, pairs, winners = (_round_up(size, _SUBLANES) for size in (sub_keys, pair_count(k), k))
    out_spec = pl.BlockSpec((None, k, block), lambda h, i: (h, 0, i))
    scores, ids = pl.pallas_call(
        functools.partial(_kernel, _Call(k, scale, _reads_last(width), interpret)),
        out_shape=[jax.ShapeDtypeStruct((heads, k, reads), dtype) for dtype in (jnp.float32, jnp.int32)],
        grid=(heads, pl.cdiv(reads, block)),
        in_specs=[
            _query_spec(width, block),
            pl.BlockSpec((None, 2, sub_keys, width), lambda h, i: (h, 0, 0, 0)),
        ],
        out_specs=[out_spec, out_spec],
        scratch_shapes=[
            pltpu.VMEM((2, rows, block), jnp.float32),
            pltpu.VMEM((2, winners, block), jnp.float32),
            pltpu.VMEM((2, winners, block), jnp.int32),
            pltpu.VMEM((pairs, block), jnp.float32),
            pltpu.VMEM((pairs, block), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=target.vmem_bytes * 7 // 8
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * reads * heads * sub_keys * width,
            bytes_accessed=q.size * q.dtype.itemsize + keys.size * keys.dtype.itemsize + 8 * reads * heads * k,
            transcendentals=0,
        ),
        interpret=interpret,
        name="product_key_topk",
    )(q.transpose(1, 2, 3, 0) if _reads_last(width) else q, keys)
    return scores.transpose(2, 0, 1), ids.transpose(2, 0, 1)


def _reads_last(width: int) -> bool:
    """Whether queries come as [H, 2, p, N]: a width that fills no lanes would be padded in memory, by a copy."""
    return width % _LANES != 0


def _query_spec(width: int, block: int) -> pl.BlockSpec:
    if _reads_last(width):
        return pl.BlockSpec((None, 2, width, block), lambda h, i: (h, 0, 0, i))
    return pl.BlockSpec((block, None, 2, width), lambda h, i: (i, h, 0, 0))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a kernel must know beside its arrays."""

    k: int
    scale: float
    reads_last: bool
    interpret: bool


def _kernel(
    call: _Call, q_ref, keys_ref, scores_ref, ids_ref, open_ref, best_ref, index_ref, pairs_ref, slots_ref
) -> None:
    """One head and one block of reads: q [R,2,p] or [2,p,R], keys [2,n,p] -> scores and ids [k, R]."""
    k, sub_keys = call.k, keys_ref.shape[1]
    for axis in (0, 1):
        _score(call, q_ref, keys_ref, open_ref, axis)

    def pick_sub_keys(rank, _):
        for axis in (0, 1):
            best, index, left = _pick(open_ref[axis])
            open_ref[axis] = left
            best_ref[axis, pl.ds(rank, 1), :] = best
            index_ref[axis, pl.ds(rank, 1), :] = index

    jax.lax.fori_loop(0, k, pick_sub_keys, None)
    _write_pairs(best_ref, index_ref, pairs_ref, slots_ref, k, sub_keys)

    def pick_pairs(rank, _):
        best, place, left = _pick(pairs_ref[...])
        here = jax.lax.broadcasted_iota(jnp.int32, left.shape, 0) == place
        pairs_ref[...] = left
        scores_ref[pl.ds(rank, 1), :] = best
        ids_ref[pl.ds(rank, 1), :] = jnp.sum(jnp.where(here, slots_ref[...], 0), axis=0, keepdims=True)

    jax.lax.fori_loop(0, k, pick_pairs, None)


def _score(call: _Call, q_ref, keys_ref, open_ref, axis: int) -> None:
    """open[axis] = comparable(scale * keys . q^T), and -inf in the rows that fill the last tile."""
    sub_keys, rows = keys_ref.shape[1], open_ref.shape[1]
    # CPUs lack bfloat16 products; those of the same values in float32 are exact.
    full = call.interpret or jnp.float32 in (q_ref.dtype, keys_ref.dtype)
    q, contracted = (q_ref[axis], 0) if call.reads_last else (q_ref[:, axis, :], 1)
    for start in range(0, sub_keys, _PRODUCT):
        part = pl.ds(start, min(_PRODUCT, sub_keys - start))
        keys = finite_keys(keys_ref[axis, part, :])
        if full:
            keys, q = keys.astype(jnp.float32), q.astype(jnp.float32)
        products = jax.lax.dot_general(
            keys,
            q,
            (((1,), (contracted,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if full else None,
            preferred_element_type=jnp.float32,
        )
        open_ref[axis, part, :] = comparable(products * call.scale)
    if rows > sub_keys:
        open_ref[axis, pl.ds(sub_keys, rows - sub_keys), :] = jnp.full(
            (rows - sub_keys, open_ref.shape[2]), -jnp.inf, jnp.float32
        )


def _pick(scores: Array) -> tuple[Array, Array, Array]:
    """The largest of each column, the lowest row that has it, and the rest."""
    row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    best = jnp.max(scores, axis=0, keepdims=True)
    index = jnp.min(jnp.where(scores == best, row, scores.shape[0]), axis=0, keepdims=True)
    return best, index, jnp.where(row == index, -jnp.inf, scores)


def _write_pairs(best_ref, index_ref, pairs_ref, slots_ref, k: int, sub_keys: int) -> None:
    """Sums and slots of the pairs of ranks (i, j), j < k // (i+1), in (i, j) order; -inf behind them."""
    alone = k // 2  # ranks i from here on meet only the best column: one piece
    start = 0
    for i in range(alone + 1):
        down, across = (1, k // (i + 1)) if i < alone else (k - alone, 1)
        rows, columns, size = pl.ds(i, down), pl.ds(0, across), max(down, across)
        pairs_ref[pl.ds(start, size), :] = best_ref[0, rows, :] + best_ref[1, columns, :]
        slots_ref[pl.ds(start, size), :] = index_ref[0, rows, :] * sub_keys + index_ref[1, columns, :]
        start += size
    rest = pairs_ref.shape[0] - start
    if rest:
        pairs_ref[pl.ds(start, rest), :] = jnp.full((rest, pairs_ref.shape[1]), -jnp.inf, jnp.float32)
        slots_ref[pl.ds(start, rest), :] = jnp.zeros((rest, slots_ref.shape[1]), jnp.int32)


def _block(q_shape: Shape, keys_shape: Shape, k: int, target: Target | None) -> int:
    """Reads of a block: the measured number, or the rule."""
    reads, width = q_shape[0], q_shape[-1]
    heuristic = {"reads": min(_READS, _round_up(reads, _LANES))}
    return block_sizes("product_key_topk", "pallas_tpu", f"n{keys_shape[2]}_K{k}_p{width}", heuristic, target)["reads"]


def _vmem_bytes(q_shape: Shape, keys_shape: Shape, k: int, target: Target | None) -> int:
    """Two buffers of queries, keys and results, the scratch, and the scores of one product."""
    block = _block(q_shape, keys_shape, k, target)
    width, sub_keys = _round_up(q_shape[-1], _LANES), _round_up(keys_shape[2], 2 * _SUBLANES)
    lists, pairs = _round_up(k, _SUBLANES), _round_up(pair_count(k), _SUBLANES)
    buffers = 2 * 4 * (2 * block * width + 2 * sub_keys * width + 2 * lists * block)
    return buffers + 4 * block * (2 * sub_keys + 4 * lists + 2 * pairs + 2 * min(sub_keys, _PRODUCT))


def _round_up(size: int, granule: int) -> int:
    return -(-size // granule) * granule
