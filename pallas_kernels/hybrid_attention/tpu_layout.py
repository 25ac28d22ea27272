"""Tiles of attention over a history on the TPU: packed heads, stacked rows, and which tiles are visited.

Lanes. Heads lie packed in the last axis, [R, N, H*d], as projections leave them, and are read in groups that fill
whole registers of 128 lanes: four heads of 32, one of 128. Nothing is transposed and narrow heads are not padded.

Rows. A tile takes `rows` query rows of all heads of a group and stacks them, head by head, into group*rows rows. With
a key head per head, the rows of a head keep their own lanes and are zero in the others', so one product with the packed
keys gives the scores of every head, and of all candidates, for one read of the keys. With one key head for all, the
rows are the heads themselves.

Numbers per row (lse, delta, positions) come as [.., row tiles, 1, group*rows] in the stacked order, on the lanes.

Tiles. A (row tile, key tile) pair is visited iff a key of the tile may be seen: it ends after the smallest position of
the row tile and starts before the request's length. Others cost neither a copy nor arithmetic: their index maps name
the tile that is already there, by these scalars, which are prefetched:

    length [R]                  valid keys
    source [R]                  the request itself if any row of it sees any key, else the last one before it of
                                which that holds (the first one, if there is none before)
    last_key [R]                last visited key tile of the source
    lowest, highest [R', tiles] smallest and largest position in a row tile; R' is 1 where requests share positions
    last_row [R', key tiles]    last row tile that may see the key tile

Letters: R requests, N query rows, S keys, H heads, d head width, dv value width, W lanes of a group.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.targets import Target

Array = jax.Array

LANES = 128
_STACKED_ROWS = 512  # of a tile, all heads of the group
_SCORES = 2**18  # of a tile of the forward pass; the backward pass holds about twice as many arrays of that size


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one attention on the TPU; all static.

    Attributes:
        N, S, H: query rows, keys, heads, as given. shared: one key head for all heads.
        group, groups: heads per group, and groups (the last one may hold heads that do not exist).
        width, value_width: of a head, padded.
        rows, row_tiles: query rows of a tile and their number. keys, key_tiles: the same of keys.
    """

    N: int
    S: int
    H: int
    shared: bool
    group: int
    groups: int
    width: int
    value_width: int
    rows: int
    row_tiles: int
    keys: int
    key_tiles: int

    @property
    def stacked(self) -> int:
        return self.group * self.rows

    @property
    def key_lanes(self) -> int:
        """Lanes of a block of keys."""
        return self.width if self.shared else self.group * self.width

    @property
    def value_lanes(self) -> int:
        return self.value_width if self.shared else self.group * self.value_width


def layout(
    target: Target | None, q_shape: tuple[int, ...], k_shape: tuple[int, ...], value_width: int, dtype, backward: bool
) -> Layout:
    """The layout for q [R, N, H, d] and k [R, S, Hk, d]."""
    _, N, H, d = q_shape
    S, shared = k_shape[1], k_shape[2] == 1 and H > 1
    width, value_width, group = _head_widths(d, value_width, H, shared)
    align = 32 // jnp.dtype(dtype).itemsize
    scores = _SCORES // 2 if backward else _SCORES
    most = max(_STACKED_ROWS // group // align * align, align)
    rows = _even(N, most, align)
    keys = min(max(scores // (group * rows), 256), 2048 if max(width, value_width) <= LANES else 1024)
    heuristic = {"rows": rows, "keys": S if S <= keys else _even(S, keys, LANES)}
    key = f"{'backward' if backward else 'forward'}_N{N}_S{S}_H{H}_Hk{k_shape[2]}_d{d}_dv{value_width}"
    blocks = block_sizes("hybrid_attention", "pallas_tpu", key, heuristic, target)
    return Layout(
        N=N,
        S=S,
        H=H,
        shared=shared,
        group=group,
        groups=-(-H // group),
        width=width,
        value_width=value_width,
        rows=blocks["rows"],
        row_tiles=-(-N // blocks["rows"]),
        keys=blocks["keys"],
        key_tiles=-(-S // blocks["keys"]),
    )


def _head_widths(d: int, dv: int, heads: int, shared: bool) -> tuple[int, int, int]:
    """(d, dv) padded so that groups of heads fill whole registers, and the heads of a group."""
    if shared:
        return _up(d, LANES), _up(dv, LANES), heads
    if heads * max(d, dv) <= LANES:  # one group, its lanes are all there are
        return d, dv, heads
    d, dv = (_up(x, LANES) if x > LANES else max(8, 1 << (x - 1).bit_length()) for x in (d, dv))
    group = max(1, LANES // d, LANES // dv)
    return (d, dv, group) if group < heads else (d, dv, heads)


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _even(count: int, most: int, multiple: int) -> int:
    """The tile, a multiple, that cuts `count` into as few tiles as `most` does, of even size."""
    return _up(-(-count // -(-count // most)), multiple)


def pack_rows(x: Array, plan: Layout, width: int) -> Array:
    """[R, N, H, x] -> [R, row tiles * rows, groups * group * width], zeros where nothing was."""
    R, N, H, own = x.shape
    x = _pad(x, (0, plan.row_tiles * plan.rows - N, plan.groups * plan.group - H, width - own))
    return x.reshape(*x.shape[:2], -1)


def unpack_rows(x: Array, plan: Layout, width: int) -> Array:
    """The inverse: -> [R, N, H, width]."""
    return x.reshape(*x.shape[:2], plan.groups * plan.group, -1)[:, : plan.N, : plan.H, :width]


def pack_keys(x: Array, plan: Layout, width: int) -> Array:
    """[R, S, Hk, x] -> [R, S, width] or [R, S, groups * group * width]; the number of keys stays."""
    R, S, heads, own = x.shape
    x = _pad(x, (0, 0, 0 if heads == 1 else plan.groups * plan.group - heads, width - own))
    return x.reshape(R, S, -1)


def unpack_keys(x: Array, plan: Layout, like: Array) -> Array:
    """The inverse: -> [R, S, Hk, width] of `like`."""
    heads = like.shape[2]
    x = x.reshape(*x.shape[:2], 1 if heads == 1 else plan.groups * plan.group, -1)
    return x[:, :, :heads, : like.shape[3]]


def stack_numbers(x: Array, plan: Layout, fill: float) -> Array:
    """[R, N, H] -> [R, groups, row tiles, 1, group * rows]."""
    R, N, H = x.shape
    x = _pad(x, (0, plan.row_tiles * plan.rows - N, plan.groups * plan.group - H), fill)
    x = x.reshape(R, plan.row_tiles, plan.rows, plan.groups, plan.group).transpose(0, 3, 1, 4, 2)
    return x.reshape(R, plan.groups, plan.row_tiles, 1, plan.stacked)


def unstack_numbers(x: Array, plan: Layout) -> Array:
    """The inverse: -> [R, N, H]."""
    x = x.reshape(x.shape[0], plan.groups, plan.row_tiles, plan.group, plan.rows).transpose(0, 2, 4, 1, 3)
    return x.reshape(x.shape[0], plan.row_tiles * plan.rows, -1)[:, : plan.N, : plan.H]


def stack_positions(positions: Array, plan: Layout) -> Array:
    """[R', N] -> float32 [R', row tiles, 1, group * rows]; exact, because no position counts beyond S < 2^24."""
    tiles = jnp.minimum(_pad_positions(positions, plan), plan.S).astype(jnp.float32)
    return jnp.tile(tiles, (1, 1, plan.group))[:, :, None]


def pack_bias(key_bias: Array, plan: Layout) -> Array:
    """[R, S, H] -> float32 [R, groups, group, S]."""
    bias = _pad(key_bias.astype(jnp.float32), (0, 0, plan.groups * plan.group - plan.H)).swapaxes(1, 2)
    return bias.reshape(bias.shape[0], plan.groups, plan.group, plan.S)


def unpack_bias(bias: Array, plan: Layout) -> Array:
    """The inverse: -> [R, S, H]."""
    return bias.reshape(bias.shape[0], -1, plan.S)[:, : plan.H].swapaxes(1, 2)


def tile_scalars(lengths: Array, positions: Array, plan: Layout) -> tuple[Array, ...]:
    """length, source, last_key, lowest, highest and last_row as above, int32 and flat."""
    length = jnp.clip(lengths.astype(jnp.int32), 0, plan.S)
    tiles = _pad_positions(positions, plan)
    lowest, highest = jnp.clip(tiles.min(axis=-1), 0, plan.S), tiles.max(axis=-1)
    sees = (lowest < length[:, None]).any(axis=1)
    request = jnp.arange(length.shape[0], dtype=jnp.int32)
    source = jax.lax.cummax(jnp.where(sees, request, -1))
    source = jnp.where(source < 0, jnp.argmax(sees).astype(jnp.int32), source)
    last_key = jnp.maximum((length[source] - 1) // plan.keys, 0)
    ends = (jnp.arange(plan.key_tiles, dtype=jnp.int32) + 1) * plan.keys
    row = jnp.arange(plan.row_tiles, dtype=jnp.int32)
    last_row = jnp.where(lowest[:, None] < ends[:, None], row, 0).max(axis=-1)
    return length, source, last_key, lowest.reshape(-1), highest.reshape(-1), last_row.reshape(-1)


def scalar_words(requests: int, plan: Layout) -> int:
    """Words of scalar memory that `tile_scalars` takes at most."""
    return requests * (3 + 2 * plan.row_tiles + plan.key_tiles)


def visited_tiles(lengths: Array, positions: Array, rows: int, keys: int) -> Array:
    """int32 [R, row tiles]: key tiles that are visited per head group, for lengths [R] and positions [1 or R, N]."""
    edge = jnp.pad(positions, ((0, 0), (0, -positions.shape[1] % rows)), mode="edge")
    lowest = edge.reshape(edge.shape[0], -1, rows).min(axis=-1)
    ends = -(-lengths[:, None] // keys)
    return jnp.where(lowest < lengths[:, None], ends - lowest // keys, 0).astype(jnp.int32)


def _pad_positions(positions: Array, plan: Layout) -> Array:
    """int32 [R', row tiles, rows]; rows that fill a tile up look like the last one."""
    more = plan.row_tiles * plan.rows - plan.N
    return jnp.pad(positions, ((0, 0), (0, more)), mode="edge").reshape(-1, plan.row_tiles, plan.rows)


def _pad(x: Array, after: tuple[int, ...], fill: float = 0.0) -> Array:
    """Padded at the end of each axis; untouched if there is nothing to add."""
    return jnp.pad(x, [(0, n) for n in after], constant_values=fill) if any(after) else x


def vmem_bytes(plan: Layout, dtype, backward: bool) -> int:
    """What a pass holds at most: two buffers of every block, the stacked rows, the sums, and scores in flight."""
    size = jnp.dtype(dtype).itemsize
    keys, rows, stacked = (_up(x, 32) for x in (plan.keys, plan.rows, plan.stacked))
    k, v = _up(plan.key_lanes, LANES), _up(plan.value_lanes, LANES)
    q, o = (_up(plan.group * x, LANES) for x in (plan.width, plan.value_width))
    blocks = 2 * size * (keys * (k + v) * (2 if backward else 1) + rows * (2 * q + 2 * o))
    held = stacked * (k + v) * (size + 4) + 4 * keys * (k + v) * backward + 3 * stacked * LANES * 4
    return blocks + held + math.prod((stacked, _up(keys, LANES), 4, 9 if backward else 6))


class RowSpecs:
    """Blocks for grid (request, group, row tile i, key tile j): where nothing is seen, the key tile stays."""

    def __init__(self, plan: Layout, positions: Array):
        self.plan, self.own = plan, positions.shape[0] > 1

    def place(self, r, g, i, j, length, source, last_key, lowest, highest, last_row):
        """(request, group, key tile) whose keys are in VMEM at a step."""
        # `//` would bring in a sign, whose lowering asks for the present device.
        keys = jnp.int32(self.plan.keys)
        first = jax.lax.div(lowest[i + (source[r] * self.plan.row_tiles if self.own else 0)], keys)
        here = jnp.minimum(jnp.maximum(j, first), last_key[r])
        # An empty request holds the last tile of its source, or waits with the first one of a source to come.
        start = jax.lax.div(lowest[source[r] * self.plan.row_tiles if self.own else 0], keys)
        there = jnp.where(source[r] > r, jnp.minimum(start, last_key[r]), last_key[r])
        group = jnp.where(source[r] > r, 0, self.plan.groups - 1)
        mine = source[r] == r
        return source[r], jnp.where(mine, g, group), jnp.where(mine, here, there)

    def row_place(self, r, g, i, j, *scalars):
        return r, g, i

    def rows(self, width: int) -> pl.BlockSpec:
        def index(*at):
            r, g, i = self.row_place(*at)
            return r, i, g

        return pl.BlockSpec((None, self.plan.rows, self.plan.group * width), index)

    def numbers(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, 1, self.plan.stacked), lambda *at: (*self.row_place(*at), 0, 0))

    def positions(self) -> pl.BlockSpec:
        def index(*at):
            r, _, i = self.row_place(*at)
            return r if self.own else 0, i, 0, 0

        return pl.BlockSpec((None, None, 1, self.plan.stacked), index)

    def keys(self, lanes: int) -> pl.BlockSpec:
        def index(*at):
            r, g, j = self.place(*at)
            return r, j, 0 if self.plan.shared else g

        return pl.BlockSpec((None, self.plan.keys, lanes), index)

    def bias(self) -> pl.BlockSpec:
        def index(*at):
            r, g, j = self.place(*at)
            return r, g, 0, j

        return pl.BlockSpec((None, None, self.plan.group, self.plan.keys), index)


class KeySpecs(RowSpecs):
    """Blocks for grid (request, group, key tile j, row tile i): where nothing is seen, both tiles stay."""

    def place(self, r, g, j, i, length, source, last_key, *rest):
        ahead, mine = source[r] > r, source[r] == r
        tile = jnp.minimum(jnp.where(mine, j, jnp.where(ahead, 0, self.plan.key_tiles)), last_key[r])
        return source[r], jnp.where(mine, g, jnp.where(ahead, 0, self.plan.groups - 1)), tile

    def row_place(self, r, g, j, i, length, source, last_key, lowest, highest, last_row):
        request, group, key_tile = self.place(r, g, j, i, length, source, last_key)
        last = last_row[key_tile + (request * self.plan.key_tiles if self.own else 0)]
        stays = (source[r] < r) | ((source[r] == r) & (j > last_key[r]))
        here = jnp.where(source[r] > r, 0, jnp.where(stays, self.plan.row_tiles, i))
        return request, group, jnp.minimum(here, last)

    def out_keys(self, lanes: int) -> pl.BlockSpec:
        shared = self.plan.shared
        return pl.BlockSpec((None, self.plan.keys, lanes), lambda r, g, j, *_: (r, j, 0 if shared else g))

    def out_bias(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.plan.group, self.plan.keys), lambda r, g, j, *_: (r, g, 0, j))
