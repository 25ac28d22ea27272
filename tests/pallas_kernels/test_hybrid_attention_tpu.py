"""Attention on the TPU's TensorCore, interpreted: against the reference over odd sizes cut into many tiles.

`Variant.run` gives o, lse and every gradient for given cotangents from one compiled program, so that a claim about
other values (junk beyond the lengths, parts of the keys, one row's cotangent) costs no compilation of its own.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from recscale.models.inputs import Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers import history_attention
from recscale.models.registry import freeze_config
from recscale.models.sequences.longer import LONGER
from recscale.pallas_kernels import targets
from recscale.pallas_kernels.cases import cases
from recscale.pallas_kernels.dispatch import recording
from recscale.pallas_kernels.hybrid_attention import (
    api,
    hybrid_attention,
    merge_attention,
    reference,
    rivals,
    shapes,
    tpu,
    tpu_layout,
)
from recscale.scaling.counting.jaxpr_flops import count_flops

LENGTHS = (0, 1, 17, 29, 0)
ROWS, KEYS = 8, 8  # of a tile in these tests
V5E = targets.get_target("tpu-v5e")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One attention over S = 29 keys, Q rows for each of C candidates; q_pos as the operation takes it."""

    Q: int
    H: int
    d: int
    dv: int | None
    C: int = 1
    Hk: int | None = None
    mode: str = "full"
    positions: tuple = ()
    bias: bool = False
    dtype: Any = jnp.float32
    S: int = 29

    @property
    def q_pos(self):
        return jnp.asarray(self.positions, jnp.int32) if self.mode == "positions" else None

    @functools.cached_property
    def arrays(self):
        """q, k, v, key_bias, do, dlse."""
        rng, R = np.random.default_rng(0), len(LENGTHS)

        def normal(*shape, dtype=self.dtype):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)

        q, k = normal(R, self.C, self.Q, self.H, self.d), normal(R, self.S, self.Hk or self.H, self.d)
        v = None if self.dv is None else normal(R, self.S, self.Hk or self.H, self.dv)
        bias = normal(R, self.S, self.H, dtype=jnp.float32) if self.bias else None
        do = normal(R, self.C, self.Q, self.H, self.dv or self.d)
        return q, k, v, bias, do, normal(*do.shape[:-1], dtype=jnp.float32)

    def run(self, implementation="pallas_tpu", lengths=LENGTHS, **changed):
        """o, lse, dq, dk, dv, dkey_bias."""
        names = ("q", "k", "v", "bias", "do", "dlse")
        arrays = [changed.get(name, x) for name, x in zip(names, self.arrays, strict=True)]
        return compiled(self, implementation)(*arrays, jnp.asarray(lengths, jnp.int32))


@functools.cache
def compiled(variant, implementation):
    """The jitted (q, k, v, bias, do, dlse, lengths) -> (o, lse, dq, dk, dv, dkey_bias)."""

    def run(q, k, v, bias, do, dlse, lengths):
        def attend(q, k, v, bias):
            return hybrid_attention(
                q,
                k,
                v,
                lengths,
                mode=variant.mode,
                q_pos=variant.q_pos,
                scale=0.4,
                key_bias=bias,
                implementation=implementation,
                interpret=implementation == "pallas_tpu",
            )

        (o, lse), pull = jax.vjp(attend, q, k, v, bias)
        return o, lse, *pull((do, dlse))

    return jax.jit(run)


# Rows of candidates follow each other, so a row tile holds positions that fall back; groups of heads that do not exist.
SLIDING = tuple(tuple(sorted((7 * i + 5 * r) % 31 for i in range(11))) for r in range(len(LENGTHS)))
CAUSAL = Variant(Q=21, H=3, d=8, dv=6, mode="causal", bias=True)
FULL = Variant(Q=5, H=2, d=8, dv=8)
FAST = {"causal": CAUSAL, "full": FULL}
SLOW = {
    "one key head for keys and values": Variant(Q=5, C=3, H=3, d=12, dv=None, Hk=1, bias=True),
    "keys are values": Variant(Q=11, C=2, H=2, d=16, dv=None, mode="causal"),
    "positions of each request": Variant(Q=11, C=3, H=2, d=8, dv=8, mode="positions", positions=SLIDING),
    "padded heads in bfloat16": Variant(Q=9, H=5, d=40, dv=20, mode="causal", dtype=jnp.bfloat16, bias=True),
    "wide heads in bfloat16": Variant(Q=18, H=2, d=136, dv=130, mode="causal", dtype=jnp.bfloat16),
    "one row": Variant(Q=1, H=1, d=8, dv=24),
}
VARIANTS = [pytest.param(v, id=name) for name, v in FAST.items()]
VARIANTS += [pytest.param(v, id=name, marks=pytest.mark.slow) for name, v in SLOW.items()]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles so small that each axis has several; only interpretation allows them."""

    def small(operation, implementation, key, heuristic, target):
        return {"rows": ROWS, "keys": KEYS}

    monkeypatch.setattr(tpu_layout, "block_sizes", small)


def as_float(x):
    return np.asarray(x.astype(jnp.float32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients(variant):
    """The reference, then exactly zero where nothing is seen, and the same bits again."""
    found, expected = variant.run(), variant.run("reference")
    exact = variant.dtype == jnp.float32
    invisible = np.asarray(expected[1]) < -1e29
    assert invisible[0].all() and invisible[4].all()
    for name, one, other in zip(("o", "lse", "dq", "dk", "dv", "dbias"), found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is None:
            continue
        assert one.dtype == other.dtype and one.shape == other.shape, name
        one, other = as_float(one), as_float(other)
        if name == "lse":
            np.testing.assert_array_equal(one[invisible], np.float32(reference.INVISIBLE))
            one, other = one[~invisible], other[~invisible]
        elif name in ("o", "dq"):
            assert (one[invisible] == 0).all(), name
        else:
            beyond = np.arange(variant.S)[None] >= np.asarray(LENGTHS)[:, None]
            assert (one[beyond] == 0).all(), name
        tolerance = (1e-5 if name in ("o", "lse") else 1e-4) if exact else 2e-2
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max(), err_msg=name)
    for one, again in zip(jax.tree.leaves(found), jax.tree.leaves(variant.run()), strict=True):
        np.testing.assert_array_equal(one, again)


def test_what_lies_beyond_the_lengths_may_be_anything():
    """NaN there changes no bit of any result."""
    _, k, v, bias, _, _ = CAUSAL.arrays
    beyond = np.arange(CAUSAL.S)[None] >= np.asarray(LENGTHS)[:, None]
    junk = {
        name: jnp.where(beyond.reshape(beyond.shape + (1,) * (x.ndim - 2)), jnp.nan, x)
        for name, x in (("k", k), ("v", v), ("bias", bias))
    }
    for one, other in zip(CAUSAL.run(), CAUSAL.run(**junk), strict=True):
        np.testing.assert_array_equal(one, other)


def test_causal_rows_see_themselves_and_older_events():
    """Gradients of row i alone: none at newer keys, some at every other valid one."""
    *_, do, dlse = CAUSAL.arrays
    for i in (0, 9, 16, 20):
        only = jnp.arange(CAUSAL.Q) == i
        _, _, dq, dk, dv, dbias = CAUSAL.run(do=do * only[:, None, None], dlse=dlse * only[:, None])
        np.testing.assert_array_equal(as_float(dq)[:, :, ~np.asarray(only)], 0)
        for leaf in (dk, dv, dbias):
            per_key = np.abs(as_float(leaf)).reshape(len(LENGTHS), CAUSAL.S, -1).max(-1) > 0
            j = np.arange(CAUSAL.S)[None]
            np.testing.assert_array_equal(per_key, (j >= i) & (j < np.asarray(LENGTHS)[:, None]))


def test_merging_two_parts_is_one_call():
    """Keys cut in two, their outputs merged, and the merge's cotangents (dlse too) sent back through both."""
    q, k, v, _, do, _ = FULL.arrays
    cut, lengths = 11, np.asarray(LENGTHS)
    rest = {name: jnp.roll(x, -cut, axis=1) for name, x in (("k", k), ("v", v))}
    parts = [({}, np.minimum(lengths, cut)), (rest, np.maximum(lengths - cut, 0))]
    outputs = [FULL.run(lengths=length, **keys)[:2] for keys, length in parts]
    (o, lse), pull = jax.vjp(lambda *parts: merge_attention(parts), *outputs)
    whole = FULL.run(dlse=jnp.zeros_like(lse))
    np.testing.assert_allclose(o, whole[0], rtol=1e-5, atol=1e-5)
    some = np.asarray(lse) > -1e29
    np.testing.assert_allclose(np.asarray(lse)[some], np.asarray(whole[1])[some], rtol=1e-5, atol=1e-5)
    back = [
        FULL.run(lengths=length, do=do, dlse=dlse, **keys)[2:5]
        for (keys, length), (do, dlse) in zip(parts, pull((do, jnp.zeros_like(lse))), strict=True)
    ]
    np.testing.assert_allclose(back[0][0] + back[1][0], whole[2], rtol=1e-4, atol=1e-5)
    for first, second, expected in zip(back[0][1:], back[1][1:], whole[3:5], strict=True):
        np.testing.assert_allclose(first + jnp.roll(second, cut, axis=1), expected, rtol=1e-4, atol=1e-5)


def flat(variant):
    """Arguments of the kernel module: candidates folded into rows."""
    q, k, v, bias, *_ = variant.arrays
    rows = q.reshape(len(LENGTHS), -1, variant.H, variant.d)
    positions = jnp.tile(api._positions(variant.mode, variant.q_pos, variant.Q), (1, variant.C))
    return rows, k, v, jnp.asarray(LENGTHS, jnp.int32), positions, bias, 0.4


def test_only_tiles_that_may_be_seen_are_visited():
    """The kernel's own count equals `visited_tiles`, and that equals a loop over the pairs of tiles."""
    arguments = flat(CAUSAL)
    count = np.asarray(tpu.counted_tiles(*arguments, target=V5E, interpret=True))
    first, row_tiles, key_tiles = np.arange(CAUSAL.Q), -(-CAUSAL.Q // ROWS), -(-CAUSAL.S // KEYS)
    by_hand = np.zeros((len(LENGTHS), row_tiles), int)
    for r, i, j in np.ndindex(len(LENGTHS), row_tiles, key_tiles):
        keys = np.arange(j * KEYS, min((j + 1) * KEYS, LENGTHS[r]))
        by_hand[r, i] += bool((keys[None] >= first[i * ROWS : (i + 1) * ROWS, None]).any())
    np.testing.assert_array_equal(tpu_layout.visited_tiles(arguments[3], arguments[4], ROWS, KEYS), by_hand)
    np.testing.assert_array_equal(count, np.broadcast_to(by_hand[:, None], count.shape))
    assert 0 < by_hand.sum() < by_hand.size * key_tiles


@pytest.mark.parametrize("by_keys", [False, True])
def test_tiles_that_nobody_sees_are_not_copied(by_keys):
    """Blocks of the inner axis, named over the whole grid, change no more often than tiles are visited."""
    variant = Variant(Q=21, H=2, d=128, dv=128, mode="causal")
    q, k, _, lengths, positions, *_ = flat(variant)
    plan = tpu_layout.layout(V5E, q.shape, k.shape, variant.dv, q.dtype, False)
    scalars = [np.asarray(x) for x in tpu_layout.tile_scalars(lengths, positions, plan)]
    specs = (tpu_layout.KeySpecs if by_keys else tpu_layout.RowSpecs)(plan, positions)
    place = specs.row_place if by_keys else specs.place
    inner = (plan.key_tiles, plan.row_tiles) if by_keys else (plan.row_tiles, plan.key_tiles)
    named = [tuple(int(x) for x in place(*at, *scalars)) for at in np.ndindex(len(LENGTHS), plan.groups, *inner)]
    copies = 1 + sum(one != other for one, other in zip(named, named[1:], strict=False))
    visited = plan.groups * int(tpu_layout.visited_tiles(lengths, positions, plan.rows, plan.keys).sum())
    assert plan.groups == 2 and copies <= visited < len(named) / 2


@pytest.mark.slow
def test_no_race_and_nothing_uninitialised():
    """The simulated TPU, its memory NaN at the start: forward and backward, where tiles reach beyond the arrays."""
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    *arguments, scale = flat(CAUSAL)
    o, lse = tpu.forward(*arguments, scale, target=V5E, interpret=parameters)
    do, dlse = (x.reshape(o.shape[:2] + x.shape[3:]) for x in CAUSAL.arrays[4:])
    found = o, lse, *tpu.backward(*arguments, scale, o, lse, do, dlse, target=V5E, interpret=parameters)
    for one, other in zip(found, CAUSAL.run("reference"), strict=True):
        np.testing.assert_allclose(one, other.reshape(one.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_under_vmap_and_rematerialisation():
    q, k, v, _, do, _ = FULL.arrays

    def total(q, k):
        o, _ = hybrid_attention(
            q, k, v, jnp.asarray(LENGTHS), scale=0.4, implementation="pallas_tpu", interpret=True, mode="causal"
        )
        return jnp.sum(o * do)

    both = jnp.stack([q, 2 * q]), jnp.stack([k, k - 1])
    found = jax.jit(jax.vmap(jax.grad(jax.checkpoint(total), argnums=(0, 1))))(*both)
    single = jax.jit(jax.grad(total, argnums=(0, 1)))
    for i in range(2):
        for one, other in zip(found, single(both[0][i], both[1][i]), strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_model_passes_through_unchanged(monkeypatch):
    """LONGER with the kernel in every layer, candidates and globals merged in, gives the tokens it gives with XLA."""
    monkeypatch.setattr(history_attention, "hybrid_attention", functools.partial(hybrid_attention, interpret=True))
    fields = (Field("user", "user", 12, vocabulary=50), Field("item", "candidate", 12, vocabulary=50))
    schema = Schema(fields, (Sequence("clicks", 23, (Field("event", "user", 10, vocabulary=50),)),))
    inputs = random_inputs(schema, 3, 2)

    def tokens(implementation):
        sizes = dict(event_width=4, merge=3, inner_heads=2, head_dim=6, queries=3, layers=2)
        config = freeze_config("longer", dict(encoder=sizes | dict(implementation=implementation)))[0]
        return LONGER.build(config, schema, rngs=nnx.Rngs(0))(inputs)

    found = tokens("pallas_tpu")
    monkeypatch.undo()
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(tokens("xla")), strict=True)
    for one, other in leaves:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_serve_is_refused():
    q, k = jax.ShapeDtypeStruct((4, 5, 2, 8), jnp.float32), jax.ShapeDtypeStruct((4, 9, 2, 8), jnp.float32)

    def reason(target="tpu-v5e", q=q.shape, k=k.shape, dtype=jnp.float32):
        return tpu.obstacle(targets.get_target(target), q, k, 8, dtype)

    assert reason() is None
    assert "float16" in reason(dtype=jnp.float16)
    assert "empty axis" in reason(k=(4, 0, 2, 8))
    assert "scalar memory" in reason(q=(100_000, 1, 2, 8), k=(100_000, 9, 2, 8))
    assert "VMEM" in reason(q=(4, 5, 512, 512), k=(4, 900, 1, 512))


def test_named_shapes_fit_every_tpu():
    for case in cases("hybrid_attention"):
        shape = case.call.keywords["shape"]
        q = (shape.R, shape.C * shape.Q, shape.H, shape.d)
        k = (shape.R, shape.S, shape.key_heads, shape.d)
        for target in targets.TARGETS.values():
            if target.platform == "tpu":
                assert tpu.obstacle(target, q, k, shape.value_width, shape.dtype) is None, (case.name, target.name)


@pytest.mark.parametrize("backward", [False, True])
def test_counted_work_is_the_closed_form(backward):
    """The kernels' cost estimates, where every row sees every key; recomputed scores are not counted."""
    shape = shapes.Shape(R=3, C=2, Q=5, S=37, H=4, d=16, dv=8)
    structs = jax.eval_shape(functools.partial(shapes._inputs, shape=shape, backward=backward), jax.random.key(0))
    call = functools.partial(shapes._backward if backward else shapes._forward, shape=shape)
    call = functools.partial(call, implementation="pallas_tpu", interpret=True)
    assert count_flops(call, *structs) == shape.flops(backward) == (3 if backward else 1) * 2 * 30 * 37 * 4 * 24


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "causal"])
def test_rivals_attend_over_the_same_pairs(mode, monkeypatch):
    """Gradients, for rows that see a key; the TPU's libraries in the interpreter."""

    def one_by_one(function):  # the interpreter cannot run splash attention under vmap
        def every(*args):
            return jnp.stack([function(*jax.tree.map(operator.itemgetter(r), args)) for r in range(shape.R)])

        return every

    monkeypatch.setattr(rivals.jax, "vmap", one_by_one)
    shape = shapes.Shape(R=2, C=1, Q=128, S=512, H=2, d=128, mode=mode, lengths="uniform", dtype=jnp.float32)
    *arrays, dlse = shapes._inputs(jax.random.key(0), shape=shape, backward=True)
    # A row that sees nothing averages padding in a rival: its cotangent is taken away.
    first = np.arange(shape.Q) if mode == "causal" else np.zeros(shape.Q)
    some = (first[None] < shape.valid()[:, None])[..., None]
    arrays[-1] = arrays[-1] * some
    expected = shapes._backward(*arrays, 0 * dlse, shape=shape, implementation="reference")[:3]
    offered = {name: rival for name, rival in rivals.of(shape, True).items() if "cudnn" not in name}
    assert set(offered) >= {"jax.nn.dot_product_attention", "splash_attention"}
    for name, rival in offered.items():
        with pltpu.force_tpu_interpret_mode():
            found = jax.jit(rival)(*arrays, dlse)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max(), err_msg=name)


@pytest.mark.slow
def test_few_keys_stay_with_xla():
    """On a TPU, without a name: scores of S <= d keys are no larger than the rows themselves."""

    def chosen(S, name=None):
        q, k = (jax.ShapeDtypeStruct((4, n, 2, 16), jnp.float32) for n in (5, S))
        lengths = jnp.full(4, S)
        served = {}
        with recording(served):
            jax.eval_shape(lambda q, k: hybrid_attention(q, k, k, lengths, scale=1.0, implementation=name), q, k)
        return next(iter(served["hybrid_attention"]))

    with targets.compiling_for("tpu-v6e"):
        assert (chosen(16), chosen(17), chosen(16, "pallas_tpu")) == ("xla", "pallas_tpu", "pallas_tpu")
