"""The stream: request q is the same bits whatever the batch, the device count or the way it is run."""

import hashlib
import re
import subprocess
import sys
from functools import partial

import forced_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.scaling.data.known_truth import (
    build_world,
    history,
    make_batch,
    make_requests,
    make_schema,
    preset,
)
from recscale.scaling.data.known_truth.batches import assemble, request_numbers
from recscale.scaling.data.known_truth.draw import draw
from recscale.scaling.data.known_truth.exact import truth
from recscale.scaling.data.known_truth.logit_parts import pair_column, permute, term_sums, unpermute
from recscale.scaling.data.known_truth.words import REQUEST, stream_key

TINY = dict(quanta=64, history_max=8, blocks=4, clusters=4, pair_items=32)

DIGEST = """
import hashlib, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from recscale.scaling.data.known_truth import build_world, make_batch, preset

def digest(tree):
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()

world = build_world(preset("smoke"))
assert jax.device_count() == 4
sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), P("data"))
make = jax.jit(lambda k: make_batch(world, 7, k, 128, 2), out_shardings=sharding)
compiled = make.lower(np.int32(3)).compile()
assert "all-gather" not in compiled.as_text()
print(digest(world), digest(compiled(np.int32(3))))
"""


@pytest.fixture(scope="module")
def world():
    return build_world(preset("smoke"))


@pytest.fixture(scope="module")
def batch(world):
    return jax.device_get(jax.jit(lambda k: make_batch(world, 7, k, 128, 2))(np.int32(3)))


@pytest.fixture(scope="module")
def run(world):
    """(seed, request numbers) -> batch of two candidates, both traced."""
    traced = jax.jit(lambda seed, request: make_requests(world, seed, request, 2))
    return lambda seed, request: jax.device_get(traced(np.int32(seed), request))


def digest(tree):
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_request_does_not_depend_on_the_batch_or_the_order(world, batch, run):
    assert_equal(run(7, request_numbers(3, 128)), batch)
    pieces = {k: run(7, request_numbers(k, 32)) for k in (15, 12, 14, 13)}
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(pieces[k] for k in range(12, 16)))
    assert_equal(joined, batch)
    shuffled = np.random.default_rng(0).permutation(128)
    assert_equal(run(7, request_numbers(3, 128)[shuffled]), jax.tree.map(lambda x: x[shuffled], batch))


@pytest.mark.slow
def test_eager_run_gives_the_same_bits(world, batch):
    assert_equal(jax.device_get(make_batch(world, 7, 3, 128, 2)), batch)


def test_four_devices_and_another_process_give_the_same_bits(world, batch):
    env = forced_devices.environment(4)
    out = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == [digest(world), digest(batch)]


def test_first_candidates_do_not_depend_on_how_many_follow(world, batch):
    one = jax.device_get(jax.jit(lambda k: make_batch(world, 7, k, 128, 1))(np.int32(3)))
    assert_equal(one.user, batch.user)
    assert_equal(one.candidates, jax.tree.map(lambda x: x[:, :1], batch.candidates))
    np.testing.assert_array_equal(one.labels, batch.labels[:, :1])


def test_seed_and_evaluation_change_the_rows(batch, run):
    other = run(8, request_numbers(3, 128))
    assert np.mean(other.user.ids["u1"] == batch.user.ids["u1"]) < 0.1
    numbers = np.asarray(request_numbers(3, 128, evaluation=True))
    np.testing.assert_array_equal(numbers, 2**31 + 3 * 128 + np.arange(128))
    held_out = run(7, numbers)
    assert np.mean(held_out.user.ids["u1"] == batch.user.ids["u1"]) < 0.1
    np.testing.assert_array_equal(request_numbers(np.int32(2**22), 512)[:1], [2**31])


def test_both_layouts_of_the_term_sum_agree():
    world = build_world(preset("smoke", domains=3, quanta=600))
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (9, 100), dtype=np.uint32)
    words[8] = 0
    domain = rng.integers(0, 3, 100).astype(np.int32)
    terms = world.terms[0]
    sums = [
        np.asarray(jax.jit(partial(term_sums, terms=terms, layout=layout))(words, domain=domain))
        for layout in ("rows", "terms")
    ]
    np.testing.assert_array_equal(sums[0], sums[1])
    sign = np.ones((len(terms.field), 100), np.int64)
    for i in range(4):
        sign *= 1 - 2 * ((words[terms.field[:, i]] >> terms.bit[:, i, None].astype(np.uint32)) & 1).astype(np.int64)
    mine = (terms.domain[:, None] < 0) | (terms.domain[:, None] == domain)
    direct = np.zeros((len(terms.groups), 100), np.int64)
    np.add.at(direct, terms.group, terms.coefficient[:, None] * sign * mine)
    np.testing.assert_array_equal(sums[0], direct)


@pytest.mark.parametrize(
    "variant", [dict(ragged=True, tasks=2), dict(match_groups=2**14), dict(continuing=True, continuing_stride=16)]
)
def test_a_history_drawn_in_pieces_or_shown_in_part_is_the_same(variant, monkeypatch):
    world = build_world(preset("base", **(TINY | dict(history_max=16) | variant)))
    rng, requests = np.random.default_rng(0), 48
    request = request_numbers(3, requests)
    given = (
        request,
        stream_key(5, REQUEST, request),
        rng.integers(0, 128, requests, dtype=np.int32),
        rng.integers(0, 17, requests, dtype=np.int32) if "ragged" in variant else np.full(requests, 16, np.int32),
        rng.integers(0, 128, (requests, 3), dtype=np.int32),
    )

    def drawing(shown):
        return jax.jit(partial(history.draw_history, world, 5, shown=shown))

    draw_all, nothing = drawing(16), np.zeros((requests, 3), np.int32)
    category = np.asarray(draw_all(*given, nothing)[1])[:, [0, 7, 15]]  # of events, so that some match
    items, categories, sums = jax.device_get(draw_all(*given, category))
    assert len(sums) == world.config.tasks and all(value.any() for value in sums)
    monkeypatch.setattr(history, "_CACHED", 1)  # six pieces of eight requests
    for shown in (11, 0):
        found = jax.device_get(drawing(shown)(*given, category))
        assert_equal((items[:, :shown], categories[:, :shown], sums), found)


def test_no_array_of_hidden_events_is_ever_live():
    rows, events = 512, 2048
    world = build_world(preset("base", history_max=events, quanta=64))
    compiled = jax.jit(lambda k: make_batch(world, 0, k, rows, history_length=8)).lower(np.int32(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * events * 4


def test_no_rows_by_quanta_array_is_ever_live():
    rows, quanta = 512, 1024
    world = build_world(preset("smoke", quanta=quanta, history_max=16))
    compiled = jax.jit(lambda k: make_batch(world, 0, k, rows)).lower(np.int32(0)).compile()
    sizes = [
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    ]
    assert max(sizes) < rows * quanta
    assert compiled.memory_analysis().temp_size_in_bytes < rows * quanta * 4


def test_id_permutation_is_a_bijection_and_inverts():
    world = build_world(preset("base", permute_ids=True, **TINY))
    ids = np.tile(np.arange(world.config.vocabulary, dtype=np.int32), (8, 1))
    shown = np.asarray(permute(world, 0, ids))
    assert (np.sort(shown) == ids).all()
    assert (shown != ids).mean() > 0.9
    assert len({tuple(row) for row in shown}) == 8
    np.testing.assert_array_equal(np.asarray(unpermute(world, 0, shown)), ids)


def test_pair_columns_are_a_bijection_per_cluster():
    world = build_world(preset("base", **TINY))
    ranks = jnp.arange(32)
    columns = [np.asarray(pair_column(world, jnp.full(32, cluster), ranks)) for cluster in range(4)]
    assert all((np.sort(column) == np.arange(32)).all() for column in columns)


VARIANTS = {
    "ragged, cascade, domains, drift": dict(ragged=True, domains=3, tasks=2, cascade=True, drift=3),
    "oracle codes, one pair field": dict(codes="oracle", pair_field=True, permute_ids=True),
    "pairs alone": dict(codes="none", pair_field=True, shares=(0.0, 0.0, 1.0, 0.0)),
    "oracle history": dict(codes="oracle_history", ragged=True),
    "continuing, permuted, soft labels": dict(
        continuing=True, continuing_stride=16, permute_ids=True, soft_labels=True, timestamps=False, match_groups=1
    ),
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_have_the_schema_s_shapes_and_decode_exactly(name):
    config = preset("base", **(TINY | VARIANTS[name]))
    world, requests, candidates = build_world(config), 96, 3
    drawn = jax.jit(lambda request: draw(world, 5, request, candidates))(request_numbers(2, requests, True))
    batch = jax.device_get(jax.jit(lambda drawn: assemble(world, drawn))(drawn))
    check_schema(make_schema(config), batch, requests, candidates)
    decoded = truth(world, batch)
    for task, parts in enumerate(jax.device_get(drawn.parts)):
        for part, value in parts.items():
            np.testing.assert_array_equal(decoded.parts[part][..., task], value / world.scale)
    np.testing.assert_array_equal(decoded.fresh, drawn.fresh)
    assert np.isfinite(decoded.z).all()
    assert ((decoded.p > 0) & (decoded.p < 1)).all()
    if config.soft_labels:
        np.testing.assert_allclose(batch.labels, decoded.p, atol=2e-6)
    else:
        assert set(np.unique(batch.labels)) == {0.0, 1.0}
    if config.cascade:
        np.testing.assert_array_equal(batch.label_mask[..., 1], batch.labels[..., 0])
        assert (batch.labels[..., 1] <= batch.labels[..., 0]).all()
    else:
        assert (batch.label_mask == 1).all()
    if not config.has_history:
        return
    clicks = batch.user.histories["clicks"]
    if config.ragged:
        empty = clicks.length == 0
        assert empty.any()
        assert (clicks.length == config.history_max).any()
        live = np.arange(config.history_max) < clicks.length[:, None]
        assert all((value[~live] == 0).all() for value in (*clicks.ids.values(), *clicks.dense.values()))
        assert (clicks.delta_s[~live] == 0).all()
        assert (decoded.parts["L"][empty] == 0).all()
    if config.continuing:
        check_overlap(clicks.ids["item"], batch.user.ids["user"], config)


def check_overlap(items, user, config):
    """Requests of one user share the events between them; other users' differ."""
    first, second = next(
        (i, j) for i in range(len(user)) for j in range(i + 1, len(user)) if user[i] == user[j] and j // 16 > i // 16
    )
    shift = second // config.continuing_stride - first // config.continuing_stride
    assert 0 < shift < config.history_max
    np.testing.assert_array_equal(items[second, shift:], items[first, : config.history_max - shift])
    other = np.flatnonzero(user != user[first])[0]
    assert (items[other] != items[first]).any()


def check_schema(schema, batch, requests, candidates):
    assert {f.name for f in schema.user_fields} == {*batch.user.ids, *batch.user.dense}
    assert {f.name for f in schema.candidate_fields} == {*batch.candidates.ids, *batch.candidates.dense}
    for field in schema.fields:
        side = batch.user if field.side == "user" else batch.candidates
        lead = (requests,) if field.side == "user" else (requests, candidates)
        check_field(field, side, lead)
    for sequence in schema.sequences:
        history = batch.user.histories[sequence.name]
        assert {f.name for f in sequence.fields} == {*history.ids, *history.dense}
        for field in sequence.fields:
            check_field(field, history, (requests, sequence.length))
        assert (history.delta_s is not None) == sequence.timestamps
        if sequence.timestamps:
            live = np.arange(sequence.length - 1) < history.length[:, None] - 1
            assert (np.diff(history.delta_s, axis=1)[live] > 0).all()
    assert batch.labels.shape == batch.label_mask.shape == (requests, candidates, len(schema.tasks))
    assert batch.valid.shape == (requests, candidates)
    assert (batch.user.domain is not None) == (schema.domains > 1)


def check_field(field, side, lead):
    if field.is_dense:
        assert side.dense[field.name].shape == (*lead, field.width)
        assert side.dense[field.name].dtype == np.float32
    else:
        ids = side.ids[field.name]
        assert ids.shape == lead
        assert ids.dtype == np.int32
        assert ids.min() >= 0
        assert ids.max() < field.vocabulary
